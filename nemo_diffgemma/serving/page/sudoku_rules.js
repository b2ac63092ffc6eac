// 4x4 Sudoku: a grid is 16 digits row by row, 0 where empty.

export const SIZE = 4;
const BOX = 2;
const all = [...Array(SIZE).keys()];

// {name, cells} of every row, column and box.
export const UNITS = [
  ...all.map((row) => ({ name: `row ${row + 1}`, cells: all.map((column) => row * SIZE + column) })),
  ...all.map((column) => ({ name: `column ${column + 1}`, cells: all.map((row) => row * SIZE + column) })),
  ...all.map((box) => {
    const first = Math.floor(box / BOX) * BOX * SIZE + (box % BOX) * BOX;
    return { name: `box ${box + 1}`, cells: all.map((one) => first + Math.floor(one / BOX) * SIZE + (one % BOX)) };
  }),
];

const PEERS = all.flatMap((row) =>
  all.map((column) => {
    const cell = row * SIZE + column;
    return [...new Set(UNITS.filter(({ cells }) => cells.includes(cell)).flatMap(({ cells }) => cells))];
  }),
);

const clashes = (grid, cell) => PEERS[cell].some((peer) => peer !== cell && grid[peer] === grid[cell]);

// Cells whose digit stands twice in a row, column or box.
export const conflicts = (grid) => grid.map((digit, cell) => digit !== 0 && clashes(grid, cell));

// The first `limit` solutions.
export function solve(grid, limit = 2, start = 0) {
  const cell = grid.indexOf(0, start);
  if (cell < 0) return conflicts(grid).some(Boolean) ? [] : [grid];
  const found = [];
  for (const digit of shuffled([1, 2, 3, 4])) {
    const next = grid.with(cell, digit);
    if (!clashes(next, cell)) found.push(...solve(next, limit - found.length, cell + 1));
    if (found.length >= limit) break;
  }
  return found;
}

function shuffled(items) {
  const keys = new Map(items.map((item) => [item, Math.random()]));
  return items.toSorted((a, b) => keys.get(a) - keys.get(b));
}

// A puzzle with one solution, of as few clues as leaving out cells in random order allows, and at least `clues`.
export function newPuzzle(clues = 6) {
  let [grid] = solve(Array(SIZE * SIZE).fill(0), 1);
  for (const cell of shuffled([...grid.keys()])) {
    if (grid.filter(Boolean).length <= clues) break;
    const less = grid.with(cell, 0);
    if (solve(less).length === 1) grid = less;
  }
  return grid;
}

// Why nobody can solve a puzzle, in words; null where somebody can.
export function impossible(puzzle) {
  if (conflicts(puzzle).some(Boolean)) return "the marked digits stand twice in a row, column or box";
  return solve(puzzle, 1).length ? null : "no digits fit into the empty cells";
}

// What is wrong with a full grid, in words; null where it is a solution that keeps the clues of `puzzle`.
export function fault(puzzle, grid) {
  const changed = grid.findIndex((digit, cell) => puzzle[cell] !== 0 && puzzle[cell] !== digit);
  if (changed >= 0) return `the clue in row ${Math.floor(changed / SIZE) + 1}, column ${(changed % SIZE) + 1} was changed`;
  const wrong = UNITS.find(({ cells }) => new Set(cells.map((cell) => grid[cell])).size < SIZE);
  if (wrong) return `${wrong.name} does not have each of 1 to 4`;
  return grid.every((digit) => digit >= 1 && digit <= SIZE) ? null : "not every cell has a digit from 1 to 4";
}
