// Steps of an answer: follows them as they come, goes back through all of them, plays them again.

import { describe } from "./cells.js";
import { element } from "./dom.js";
import { settings } from "./settings.js";

const CATCH_UP = 8; // of a backlog, one such part is skipped at a time, so that what is shown never lags far behind

export class Player {
  // `draw(frame)` shows a step. `shown` resolves when all have been, or whoever watches has paused.
  constructor(draw) {
    this.draw = draw;
    this.shown = new Promise((resolve) => (this.resolve = resolve));
    this.frames = [];
    this.index = -1;
    this.live = true; // more may come
    this.playing = true;
    this.timer = null;
    this.slider = element("input", { type: "range", min: 0, max: 0, value: 0, disabled: true, "aria-label": "Step" });
    this.button = element("button", { type: "button", className: "play", disabled: true }, "Pause");
    this.back = element("button", { type: "button", disabled: true, "aria-label": "One step back" }, "‹");
    this.forward = element("button", { type: "button", disabled: true, "aria-label": "One step forward" }, "›");
    this.said = element("span", { className: "position" });
    const bar = element("div", { className: "bar" }, this.button, this.back, this.slider, this.forward);
    this.element = element("div", { className: "player" }, bar, this.said);
    this.slider.addEventListener("input", () => this.stay(Number(this.slider.value)));
    this.back.addEventListener("click", () => this.stay(this.index - 1));
    this.forward.addEventListener("click", () => this.stay(this.index + 1));
    this.button.addEventListener("click", () => (this.playing ? this.stay(this.index) : this.play()));
  }

  get atEnd() {
    return this.index === this.frames.length - 1;
  }

  add(frame) {
    this.frames.push(frame);
    this.slider.max = this.frames.length - 1;
    for (const control of [this.slider, this.button, this.back, this.forward]) control.disabled = false;
    if (this.index < 0) this.show(0);
    else if (this.playing) this.wait();
  }

  // Other frames in place of those there are; the last is shown.
  replace(frames) {
    this.end();
    this.frames = [];
    this.live = false;
    for (const frame of frames) this.add(frame);
    this.show(frames.length - 1);
  }

  // No more will come.
  finish() {
    this.live = false;
    if (this.atEnd || !this.playing) this.end();
  }

  play() {
    this.playing = true;
    this.button.textContent = "Pause";
    if (this.atEnd && !this.live) this.show(0);
    this.wait();
  }

  // Show one step and stay there.
  stay(index) {
    this.end();
    this.show(Math.min(Math.max(index, 0), this.frames.length - 1));
  }

  end() {
    clearTimeout(this.timer);
    this.timer = null;
    this.playing = false;
    this.button.textContent = "Play";
    if (!this.live) this.resolve();
  }

  wait() {
    if (this.timer === null) this.timer = setTimeout(() => this.tick(), settings.pace());
  }

  tick() {
    this.timer = null;
    const backlog = this.frames.length - 1 - this.index;
    const most = settings.pace() ? Math.ceil(backlog / CATCH_UP) : backlog;
    if (backlog) this.show(this.index + (this.live ? most : 1));
    if (!this.atEnd) this.wait();
    else if (!this.live) this.end();
  }

  show(index) {
    this.index = index;
    const frame = this.frames[index];
    if (!frame) return;
    this.draw(frame);
    const text = describe(frame);
    this.slider.value = index;
    this.slider.setAttribute("aria-valuetext", text);
    this.said.textContent = `Step ${index + 1} of ${this.frames.length} · ${text}`;
  }
}
