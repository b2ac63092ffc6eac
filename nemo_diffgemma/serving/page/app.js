// The page at /: which views there are depends on the model.

import { models } from "./asking.js";
import { startChat } from "./chat.js";
import { find, showError } from "./dom.js";
import { startInfill } from "./infill.js";
import { settings } from "./settings.js";
import { startSudoku } from "./sudoku.js";

const VIEWS = ["sudoku", "chat", "infill"];
const EXAMPLES = {
  sudoku: { prompt: "..4.2..1.2..1...", text: "{2}4{1}2{2}1{1}2{2}1{3}" },
  text: { prompt: "", text: "Once upon a time {12} and they lived happily ever after." },
};

const RETRY = 2000; // ms

function choose(view) {
  for (const name of VIEWS) {
    find(name).hidden = name !== view;
    if (name === view) find(`show-${name}`).setAttribute("aria-current", "page");
    else find(`show-${name}`).removeAttribute("aria-current");
  }
}

// Ask what is served; again where a key was wanted.
async function begin() {
  try {
    const list = await models();
    const { diffusion } = list[0];
    settings.show(list, diffusion);
    showError(find("alert"), null);
    const isSudoku = diffusion.task === "sudoku";
    find("show-sudoku").hidden = !isSudoku;
    if (isSudoku) {
      startSudoku();
      find("max-tokens").value = diffusion.canvas_length;
    }
    startChat(diffusion.takes_conversations);
    startInfill(isSudoku ? EXAMPLES.sudoku : EXAMPLES.text);
    if (!diffusion.takes_text) {
      showError(find("alert"), new Error("This model has no tokenizer: it takes token ids only, through /v1/completions."));
    }
    find("key").removeEventListener("change", begin);
    find("views").hidden = false;
    choose(isSudoku ? "sudoku" : "chat");
  } catch (error) {
    showError(find("alert"), error);
    if (error.status === 401) find("settings").open = true;
    else setTimeout(begin, RETRY); // it loads the model, or starts again
  }
}

for (const name of VIEWS) find(`show-${name}`).addEventListener("click", () => choose(name));
const narrow = matchMedia("(max-width: 60rem)");
find("settings").open = !narrow.matches;
narrow.addEventListener("change", () => (find("settings").open = !narrow.matches));
find("key").addEventListener("change", begin);
find("fields").addEventListener("submit", (event) => event.preventDefault());
begin();
