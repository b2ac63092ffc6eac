// A canvas as cells: colour says how uncertain a cell is, its border whether it was accepted.

import { element } from "./dom.js";

export const BOUNDS = [0.01, 0.1, 0.5, 1, 2]; // nats; between them the colours of the legend

export const colour = (entropy) => BOUNDS.filter((bound) => entropy >= bound).length;

export const shown = (piece) => (piece === "" ? "∅" : piece.replaceAll("\n", "↵"));

export function describe(frame) {
  const accepted = frame.accepted.filter(Boolean).length;
  const mean = frame.entropy.reduce((sum, entropy) => sum + entropy, 0) / frame.entropy.length;
  const place = `canvas ${frame.canvas + 1}, step ${frame.step}`;
  return `${place}: ${accepted} of ${frame.accepted.length} accepted, mean entropy ${mean.toFixed(2)} nats`;
}

export function titleOf(frame, index) {
  const state = frame.locked?.[index] ? "locked" : frame.accepted[index] ? "accepted" : "open";
  return `token ${frame.token_ids[index]}, ${state}, ${frame.entropy[index].toFixed(3)} nats`;
}

// Fills `place`, an element that a screen reader reads as one picture with the text of the canvas.
export function drawCells(place, frame) {
  place.setAttribute("aria-label", `${describe(frame)}. ${frame.text ?? frame.pieces.join(" ")}`);
  const cells = frame.pieces.flatMap((piece, index) => {
    const cell = element("span", { className: "cell", title: titleOf(frame, index) }, shown(piece));
    cell.dataset.entropy = colour(frame.entropy[index]);
    if (frame.accepted[index]) cell.dataset.accepted = "";
    if (frame.locked?.[index]) cell.dataset.locked = "";
    return piece.includes("\n") ? [cell, element("br")] : [cell];
  });
  place.replaceChildren(...cells);
}

export function legend() {
  const names = BOUNDS.map((bound, index) => (index ? `${BOUNDS[index - 1]}–${bound}` : `under ${bound}`));
  const colours = [...names, `over ${BOUNDS.at(-1)}`].map((name, index) => {
    const cell = element("span", { className: "cell" }, name);
    cell.dataset.entropy = index;
    return cell;
  });
  const accepted = element("span", { className: "cell" }, "accepted");
  accepted.dataset.accepted = "";
  const open = element("span", { className: "cell" }, "still open");
  const locked = element("span", { className: "cell" }, "locked");
  locked.dataset.locked = "";
  return element("p", { className: "legend" }, "Entropy in nats: ", ...colours, " ", accepted, open, locked);
}
