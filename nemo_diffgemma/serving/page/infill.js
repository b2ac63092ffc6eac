// Text with holes: what stands around them is locked, {8} is a hole of 8 tokens, {4-12} one of 4 to 12.

import { drawCells, legend } from "./cells.js";
import { announce, element, find } from "./dom.js";
import { figures } from "./figures.js";
import { Player } from "./player.js";
import { Asking } from "./request.js";
import { settings } from "./settings.js";

const HOLE = /\{(\d+)(?:-(\d+))?\}/g;

// Parts of /v1/infill: strings and {hole}.
export function partsOf(text) {
  const parts = [];
  let end = 0;
  for (const match of text.matchAll(HOLE)) {
    if (match.index > end) parts.push(text.slice(end, match.index));
    const [least, most] = [Number(match[1]), Number(match[2] ?? match[1])];
    parts.push({ hole: least === most ? least : { min: least, max: most } });
    end = match.index + match[0].length;
  }
  if (end < text.length) parts.push(text.slice(end));
  return parts;
}

function lengthOf({ hole }) {
  if (hole === 1) return "1 token";
  return typeof hole === "number" ? `${hole} tokens` : `${hole.min} to ${hole.max} tokens`;
}

function preview() {
  const parts = partsOf(find("template").value).map((part) =>
    typeof part === "string" ? part : element("span", { className: "hole" }, lengthOf(part)),
  );
  find("preview").replaceChildren(...parts);
}

// Which cells of a frame are locked: those in no hole.
function withLocks(frame, holes) {
  const first = frame.canvas * frame.token_ids.length;
  const isFree = (place) => holes.some(({ start, token_ids: ids }) => place >= start && place < start + ids.length);
  return { ...frame, locked: frame.token_ids.map((_, cell) => !isFree(first + cell)) };
}

// Text with what was put into its holes marked.
function filled(parts, holes) {
  let next = 0;
  return parts.map((part) => (typeof part === "string" ? part : element("mark", {}, holes[next++].text)));
}

function finish(result, player, answer, parts) {
  const best = answer.tried?.reduce((a, b) => (b.logprob > a.logprob ? b : a));
  const frames = answer.frames.filter(({ key }) => !best || key === String(best.lengths));
  player.replace(frames.map((frame) => withLocks(frame, answer.holes)));
  const text = element("p", { className: "text filled" }, ...filled(parts, answer.holes));
  result.prepend(element("h3", {}, "Filled"), text);
  if (best) {
    const many = `${answer.tried.length} lengths were tried; ${best.lengths.join(", ")} tokens fit best.`;
    result.append(element("p", { className: "note" }, many));
  }
  result.append(figures(answer));
  announce(`The holes are filled: ${answer.text}`);
}

export function startInfill(example) {
  const [box, result] = [find("template"), find("infill-result")];
  find("before").value = example.prompt;
  box.value = example.text;
  const asking = new Asking(find("infill-stop"), find("infill-alert"), (busy) => (find("fill").disabled = busy));

  const fill = async () => {
    if (asking.isBusy) return;
    const parts = partsOf(box.value);
    const cells = element("div", { className: "canvas", role: "img" });
    const player = new Player((frame) => drawCells(cells, frame));
    result.replaceChildren(cells, player.element, legend());
    let last = null;
    const body = () => {
      const { max_tokens: _, ...fields } = settings.fields(); // the text says how long it is
      return { ...fields, prompt: find("before").value, text: parts };
    };
    const outcome = await asking.run("v1/infill", body, (answer, isFrame) => {
      last = answer;
      if (isFrame && answer.frames.at(-1).key === answer.frames[0].key) player.add(answer.frames.at(-1));
    });
    player.finish();
    if (outcome === "done") finish(result, player, last, parts);
    else if (!player.frames.length) result.replaceChildren();
  };

  find("infill").addEventListener("submit", (event) => {
    event.preventDefault();
    fill();
  });
  box.addEventListener("input", preview);
  find("insert-hole").addEventListener("click", () => {
    box.setRangeText(`{${find("hole-length").value || 8}}`, box.selectionStart, box.selectionEnd, "end");
    preview();
    box.focus();
  });
  preview();
}
