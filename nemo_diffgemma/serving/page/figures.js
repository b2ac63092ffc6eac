// Throughput of an answer.

import { element } from "./dom.js";

const round = (value) => (value >= 100 ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : value.toFixed(2));

export function figures(answer) {
  const list = [
    ["tokens/s", answer.seconds ? round(answer.tokens / answer.seconds) : "–"],
    ["tokens a step", answer.steps ? round(answer.tokens / answer.steps) : "–"],
    ["tokens", answer.tokens],
    ["steps", answer.steps],
    ["canvases", answer.canvases],
    ["first canvas", answer.firstCanvas === null ? "–" : `${round(answer.firstCanvas / 1000)} s`],
    ["seed", answer.seed ?? "–"],
  ];
  const pairs = list.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, String(value))));
  return element("dl", { className: "figures" }, ...pairs);
}
