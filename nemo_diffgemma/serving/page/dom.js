// Elements from names and text. Text becomes text nodes, never HTML: what a model writes cannot change the page.

export const find = (id) => document.getElementById(id);

// `properties` are those of the element; names with a dash, and role, are attributes.
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role") made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children);
  return made;
}

// What a screen reader says now: starts, ends and errors, not every step.
export function announce(text) {
  find("announcements").textContent = text;
}

// Shows an error as text in `place`, which has role=alert.
export function showError(place, error) {
  place.textContent = error ? error.message : "";
  place.hidden = !error;
}
