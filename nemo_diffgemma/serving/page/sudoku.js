// A grid that a person edits and the model solves, cell by cell as the canvas settles.

import { colour, legend, titleOf } from "./cells.js";
import { announce, element, find } from "./dom.js";
import { figures } from "./figures.js";
import { Player } from "./player.js";
import { Asking } from "./request.js";
import { settings } from "./settings.js";
import { SIZE, conflicts, fault, impossible, newPuzzle } from "./sudoku_rules.js";

const CELLS = SIZE * SIZE;
const EXAMPLE = "..4.2..1.2..1..."; // its solution is one of those that the demo's model was not trained on
const MOVES = { ArrowUp: -SIZE, ArrowDown: SIZE, ArrowLeft: -1, ArrowRight: 1 };

const digitOf = (piece) => (/^[1-9]$/.test(piece) ? Number(piece) : 0);

class Grid {
  constructor(place) {
    this.puzzle = [...EXAMPLE].map(digitOf);
    this.frame = null; // of the model, over the empty cells
    this.inputs = this.puzzle.map((_, cell) => this.input(cell));
    place.append(...this.inputs);
    this.draw();
  }

  input(cell) {
    const made = element("input", { type: "text", inputMode: "numeric", maxLength: 1, autocomplete: "off" });
    made.addEventListener("input", () => this.edit(cell, digitOf(made.value)));
    made.addEventListener("focus", () => made.select());
    made.addEventListener("keydown", (event) => this.move(event, cell));
    return made;
  }

  move(event, cell) {
    const to = cell + (MOVES[event.key] ?? 0);
    const leavesRow = event.key in MOVES && MOVES[event.key] ** 2 === 1 && Math.floor(to / SIZE) !== Math.floor(cell / SIZE);
    if (to === cell || leavesRow || to < 0 || to >= CELLS) return;
    event.preventDefault();
    this.inputs[to].focus();
  }

  edit(cell, digit) {
    this.set(this.puzzle.with(cell, digit <= SIZE ? digit : 0));
  }

  set(puzzle) {
    this.puzzle = puzzle;
    this.frame = null;
    this.draw();
    this.edited();
  }

  edited() {}

  lock(isLocked) {
    for (const input of this.inputs) input.readOnly = isLocked;
  }

  show(frame) {
    this.frame = frame;
    this.draw();
  }

  // Digits as they stand: clues, and what the model has put around them.
  get digits() {
    return this.puzzle.map((clue, cell) => clue || digitOf(this.frame?.pieces[cell] ?? ""));
  }

  draw() {
    const wrong = conflicts(this.puzzle);
    this.inputs.forEach((input, cell) => {
      const { frame } = this;
      const clue = this.puzzle[cell];
      const piece = clue ? String(clue) : (frame?.pieces[cell] ?? "");
      if (input.value !== piece) input.value = piece;
      const state = clue ? "clue" : frame ? titleOf(frame, cell) : "empty";
      const place = `Row ${Math.floor(cell / SIZE) + 1}, column ${(cell % SIZE) + 1}`;
      input.setAttribute("aria-label", `${place}, ${state}`);
      input.setAttribute("aria-invalid", wrong[cell]);
      input.title = state;
      input.toggleAttribute("data-clue", clue !== 0);
      input.toggleAttribute("data-accepted", !clue && (frame?.accepted[cell] ?? false));
      if (clue || !frame) delete input.dataset.entropy;
      else input.dataset.entropy = colour(frame.entropy[cell]);
    });
  }
}

export function startSudoku() {
  const grid = new Grid(find("grid"));
  const verdict = find("sudoku-verdict");
  const result = find("sudoku-result");
  const asking = new Asking(find("sudoku-stop"), find("sudoku-alert"), (busy) => {
    for (const id of ["solve", "new-puzzle", "clear"]) find(id).disabled = busy;
    grid.lock(busy);
  });
  let player = null;

  const forget = () => {
    player?.end();
    player = null;
    result.replaceChildren();
    verdict.textContent = "";
  };
  grid.edited = forget;

  const say = (text, isSolved) => {
    verdict.textContent = text;
    verdict.dataset.solved = isSolved;
    announce(text);
  };

  const judge = (answer) => {
    const wrong = fault(grid.puzzle, answer.frames.at(-1).pieces.map(digitOf));
    say(wrong ? `Not solved: ${wrong}.` : `Solved in ${answer.steps} steps.`, wrong === null);
  };

  const solve = async () => {
    if (asking.isBusy) return;
    forget();
    const why = impossible(grid.puzzle);
    if (why) return say(`There is no solution: ${why}.`, false);
    const own = new Player((frame) => grid.show(frame));
    player = own;
    result.replaceChildren(own.element, legend());
    let last;
    const body = () => {
      const { max_tokens: _, ...fields } = settings.fields(); // the grid says how long it is
      const prompt = grid.puzzle.map((digit) => digit || ".").join("");
      const text = grid.puzzle.map((digit) => (digit ? String(digit) : { hole: 1 }));
      return { ...fields, prompt, text };
    };
    const outcome = await asking.run("v1/infill", body, (answer, isFrame) => {
      last = answer;
      if (isFrame) own.add(answer.frames.at(-1));
    });
    own.finish();
    if (outcome === "done") {
      await own.shown;
      if (own !== player) return; // the puzzle was edited meanwhile
      result.append(figures(last));
      judge(last);
    } else if (!own.frames.length) forget();
  };

  find("sudoku").addEventListener("submit", (event) => {
    event.preventDefault();
    solve();
  });
  find("new-puzzle").addEventListener("click", () => grid.set(newPuzzle()));
  find("clear").addEventListener("click", () => {
    grid.set(Array(CELLS).fill(0));
    grid.inputs[0].focus();
  });
}
