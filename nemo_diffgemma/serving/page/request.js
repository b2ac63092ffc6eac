// One request at a time in a form: its button asks, another stops.

import { ask } from "./asking.js";
import { announce, showError } from "./dom.js";

export class Asking {
  // `stop` is a button, `alert` shows errors, `busy(isBusy)` hears of begin and end.
  constructor(stop, alert, busy) {
    this.stop = stop;
    this.alert = alert;
    this.busy = busy;
    this.controller = null;
    stop.addEventListener("click", () => this.controller?.abort());
  }

  get isBusy() {
    return this.controller !== null;
  }

  // "done", "stopped" or "failed".
  async run(path, body, heard) {
    this.controller = new AbortController();
    this.stop.disabled = false;
    const from = document.activeElement;
    this.busy(true);
    if (from.disabled) this.stop.focus(); // or the keyboard would begin at the top of the page again
    showError(this.alert, null);
    announce("Generating.");
    try {
      await ask(path, body(), this.controller.signal, heard);
      return "done";
    } catch (error) {
      if (error.name === "AbortError") {
        announce("Stopped.");
        return "stopped";
      }
      showError(this.alert, error);
      return "failed";
    } finally {
      this.controller = null;
      this.busy(false);
      if (document.activeElement === this.stop) from.focus();
      this.stop.disabled = true;
    }
  }
}
