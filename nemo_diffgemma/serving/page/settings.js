// What every request has beside its text. Empty fields are left out: the checkpoint's or the server's value holds.

import { element, find } from "./dom.js";

// id of a field -> its name in a request; those below `diffusion` apart
const OUTER = { seed: "seed", "max-tokens": "max_tokens" };
const DIFFUSION = {
  steps: "max_denoising_steps",
  bound: "entropy_bound",
  "t-min": "t_min",
  "t-max": "t_max",
  "canvas-length": "canvas_length",
};
const CHECKPOINT = { steps: "max_denoising_steps", "t-min": "t_min", "t-max": "t_max" };

function given(names) {
  const values = {};
  for (const [id, name] of Object.entries(names)) {
    const field = find(id);
    if (field.validity.badInput) throw new Error(`${field.labels[0].textContent}: a number is expected`);
    if (field.value !== "") values[name] = Number(field.value);
  }
  return values;
}

export const settings = {
  key: () => find("key").value.trim(), // nowhere but in this field: a reload forgets it
  pace: () => Number(find("pace").value),

  // Fields of a request. Raises for what is no number.
  fields() {
    return { model: find("model").value, ...given(OUTER), diffusion: given(DIFFUSION) };
  },

  // The model's own values as placeholders.
  show(models, diffusion) {
    find("model").replaceChildren(...models.map(({ id }) => element("option", { value: id }, id)));
    for (const [id, name] of Object.entries(CHECKPOINT)) find(id).placeholder = diffusion.sampler[name];
    find("bound").placeholder = diffusion.sampler.sampler_config?.entropy_bound ?? diffusion.sampler.entropy_bound;
    find("canvas-length").max = diffusion.canvas_length;
    find("canvas-length").placeholder = diffusion.canvas_length;
  },
};
