// A conversation; each answer has its text and, below it, all steps of its canvases.

import { drawCells, legend } from "./cells.js";
import { announce, element, find } from "./dom.js";
import { figures } from "./figures.js";
import { Player } from "./player.js";
import { Asking } from "./request.js";
import { settings } from "./settings.js";

// One turn of the model's on the page.
class Turn {
  constructor() {
    this.text = element("p", { className: "text" });
    this.thought = element("p", { className: "text" });
    this.thinking = element("details", { hidden: true }, element("summary", {}, "Thinking"), this.thought);
    const cells = element("div", { className: "canvas", role: "img" });
    this.player = new Player((frame) => drawCells(cells, frame));
    this.steps = element("details", { open: true }, element("summary", {}, "Canvas, step by step"));
    this.steps.append(cells, this.player.element, legend());
    this.end = element("div", { className: "end" });
    const head = element("h3", {}, "Model");
    this.element = element("article", { className: "turn model" }, head, this.thinking, this.text, this.steps, this.end);
  }

  hear(answer, isFrame) {
    if (isFrame) this.player.add(answer.frames.at(-1));
    else {
      this.text.textContent = answer.text;
      this.thought.textContent = answer.thought;
      this.thinking.hidden = !answer.thought;
    }
  }

  finish(answer, outcome) {
    this.player.finish();
    if (answer?.canvases) this.end.append(figures(answer));
    const notes = { stopped: "Stopped by you.", failed: "Ended by an error.", done: "" };
    const note = outcome === "done" && answer.reason === "length" ? "Cut at its limit of tokens." : notes[outcome];
    if (note) this.end.prepend(element("p", { className: "note" }, note));
    if (!this.player.frames.length) this.steps.remove();
  }
}

function userTurn(text) {
  return element("article", { className: "turn user" }, element("h3", {}, "You"), element("p", { className: "text" }, text));
}

// `conversations` is false for a model without a chat template: each message then stands alone.
export function startChat(conversations) {
  const log = find("log");
  const box = find("message");
  let messages = [];
  const asking = new Asking(find("stop"), find("chat-alert"), (busy) => {
    find("send").disabled = busy;
    find("new-chat").disabled = busy;
  });
  find("alone").hidden = conversations;

  const send = async () => {
    const content = box.value;
    if (asking.isBusy || !content.trim()) return;
    box.value = "";
    for (const steps of log.querySelectorAll("details[open]")) steps.open = false;
    const before = messages;
    messages = conversations ? [...messages, { role: "user", content }] : [{ role: "user", content }];
    const turn = new Turn();
    log.append(userTurn(content), turn.element);
    turn.element.scrollIntoView({ block: "nearest" });
    let last = null;
    const outcome = await asking.run("v1/chat/completions", () => ({ ...settings.fields(), messages }), (answer, isFrame) => {
      last = answer;
      turn.hear(answer, isFrame);
    });
    turn.finish(last, outcome);
    turn.element.scrollIntoView({ block: "nearest" });
    if (last?.text) messages = [...messages, { role: "assistant", content: last.text }];
    else messages = before; // an answer that never began: the next message is asked without it
    if (outcome === "failed" && !last) {
      box.value ||= content;
      turn.element.previousSibling.remove();
      turn.element.remove();
    }
    if (outcome === "done") announce(`The answer is complete: ${last.text}`);
  };

  find("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  box.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  });
  find("new-chat").addEventListener("click", () => {
    messages = [];
    log.replaceChildren();
    box.focus();
  });
}
