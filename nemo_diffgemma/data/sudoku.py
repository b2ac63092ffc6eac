"""4x4 Sudoku: a task small enough for a CPU, whose answers can be checked.

A grid is its cells row by row, 0 where empty. There are 288 full 4x4 grids; a task holds some out and tests on puzzles
whose only solution is one of those, so a model that only remembers its training grids solves none of them.

    task = SudokuTask(seed=0)
    SudokuDataset(task)[7]                  # <bos>....2..1...4....<sep>4123234132141432
    puzzles = [puzzle for puzzle, _ in task.test_set]
    solve_rate(puzzles, responses_NC)

Rules, solver and display also take 6x6 and 9x9 grids; the task is 4x4.
Shapes: N puzzles, C canvas positions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import islice
from math import isqrt
from operator import index as as_index
from random import Random

from torch import Tensor

from nemo_diffgemma.data.example import Example
from nemo_diffgemma.data.sudoku_tokenizer import BOS_ID, EOS_ID, SEP_ID, VOCABULARY
from nemo_diffgemma.errors import UserError

Grid = tuple[int, ...]

_BOX = {4: (2, 2), 6: (2, 3), 9: (3, 3)}  # size of the grid -> rows and columns of a box
_EMPTY_ID = VOCABULARY.index(".")
_ZERO_ID = VOCABULARY.index("0")  # digits follow one another


# Rules


@cache
def _units(cells: int) -> tuple[Grid, ...]:
    """Positions of every row, column and box of a grid with so many cells."""
    size = isqrt(cells)
    if size * size != cells or size not in _BOX:
        raise UserError(f"a grid of {cells} cells; expected 16 (4x4), 36 (6x6) or 81 (9x9), row by row, 0 where empty")
    height, width = _BOX[size]
    rows = [tuple(range(row * size, (row + 1) * size)) for row in range(size)]
    columns = [tuple(range(column, cells, size)) for column in range(size)]
    boxes = [
        tuple((top + row) * size + left + column for row in range(height) for column in range(width))
        for top in range(0, size, height)
        for left in range(0, size, width)
    ]
    return (*rows, *columns, *boxes)


@cache
def _peers(cells: int) -> tuple[frozenset[int], ...]:
    """For every cell, the others that may not hold its digit."""
    units = _units(cells)
    return tuple(frozenset(p for unit in units if cell in unit for p in unit) - {cell} for cell in range(cells))


def is_solution(puzzle: Sequence[int], cells: Sequence[int]) -> bool:
    """Whether `cells` is a full valid grid that keeps every clue of `puzzle`.

    Raises `UserError` for a puzzle of no known size.
    """
    units = _units(len(puzzle))
    if len(cells) != len(puzzle):
        return False
    digits = set(range(1, isqrt(len(puzzle)) + 1))
    return all(clue in (0, cell) for clue, cell in zip(puzzle, cells, strict=True)) and all(
        {cells[position] for position in unit} == digits for unit in units
    )


def solve(cells: Sequence[int], limit: int = 2) -> list[Grid]:
    """The solutions of a puzzle, at most `limit` of them: two are enough to know that a puzzle is not unique.

    Empty where the clues contradict each other. Raises `UserError` for a wrong number of cells or a digit out of range.
    """
    peers = _peers(len(cells))
    size = isqrt(len(cells))
    if not all(0 <= digit <= size for digit in cells):
        raise UserError(f"digits {sorted(set(cells))} in a {size}x{size} grid; expected 1..{size}, and 0 where empty")
    grid = list(cells)
    if any(digit and grid[peer] == digit for cell, digit in enumerate(grid) for peer in peers[cell]):
        return []

    def options(cell: int) -> list[int]:
        taken = {grid[peer] for peer in peers[cell]}
        return [digit for digit in range(1, size + 1) if digit not in taken]

    def search() -> Iterator[Grid]:
        open_cells = [(options(cell), cell) for cell, digit in enumerate(grid) if not digit]
        if not open_cells:
            yield tuple(grid)
            return
        digits, cell = min(open_cells, key=lambda choice: len(choice[0]))  # fewest options first keeps the tree small
        for digit in digits:
            grid[cell] = digit
            yield from search()
        grid[cell] = 0

    return list(islice(search(), limit))


@cache
def all_grids() -> tuple[Grid, ...]:
    """The 288 full 4x4 grids, in lexicographic order."""
    return tuple(sorted(solve([0] * 16, limit=289)))


# Tokens and text


def encode_puzzle(cells: Sequence[int]) -> list[int]:
    """Token ids of a prompt: <bos>, one of '.' and the digits a cell, <sep>; 18 ids for a 4x4 puzzle."""
    return [BOS_ID, *(_ZERO_ID + digit if digit else _EMPTY_ID for digit in cells), SEP_ID]


def decode_response(ids: Sequence[int] | Tensor) -> list[int] | None:
    """The grid that a response spells before its first <eos>; None where that is not digits 1..9 for a whole grid."""
    ids = ids.tolist() if isinstance(ids, Tensor) else list(ids)
    if EOS_ID in ids:
        ids = ids[: ids.index(EOS_ID)]
    cells = [id - _ZERO_ID for id in ids]
    whole = len(cells) in (size * size for size in _BOX)
    return cells if whole and all(1 <= cell <= 9 for cell in cells) else None


def solve_rate(puzzles: Sequence[Sequence[int]], responses_NC: Tensor) -> float:
    """Share of the N puzzles that their response ids [N, C] solve: a valid grid with every clue kept.

    A puzzle with several solutions accepts each of them. Raises ValueError where N differs or is 0.
    """
    if not puzzles or len(puzzles) != len(responses_NC):
        raise ValueError(
            f"{len(puzzles)} puzzles and {len(responses_NC)} responses; expected one response for each of at least 1"
        )
    answers = map(decode_response, responses_NC.tolist())
    pairs = zip(puzzles, answers, strict=True)
    return sum(answer is not None and is_solution(puzzle, answer) for puzzle, answer in pairs) / len(puzzles)


def format_grid(cells: Sequence[int]) -> str:
    """A grid as a drawing with its boxes, '.' where empty; no newline at the end.

    Raises `UserError` for a wrong number of cells.
    """
    _units(len(cells))
    size = isqrt(len(cells))
    height, width = _BOX[size]

    def rule(left: str, middle: str, right: str) -> str:
        return left + middle.join(["─" * (2 * width + 1)] * (size // width)) + right

    def line(row: Sequence[int]) -> str:
        boxes = [row[left : left + width] for left in range(0, size, width)]
        return "".join("│ " + "".join(f"{digit or '.'} " for digit in box) for box in boxes) + "│"

    lines = [line(cells[start : start + size]) for start in range(0, len(cells), size)]
    bands = ["\n".join(lines[top : top + height]) for top in range(0, size, height)]
    return "\n".join([rule("┌", "┬", "┐"), f"\n{rule('├', '┼', '┤')}\n".join(bands), rule("└", "┴", "┘")])


# Task
#
# Everything random below comes from Random.random(), seeded with a string: a draw and a seeding that Python promises to
# keep across versions, and that do not depend on PYTHONHASHSEED. So a run resumes elsewhere with the same data.


def _between(random: Random, low: int, high: int) -> int:
    return low + int(random.random() * (high - low + 1))


def _shuffled(random: Random, items: Sequence) -> list:
    return sorted(items, key=lambda _: random.random())


@dataclass(frozen=True)
class SudokuTask:
    """Which grids are trained on, which are held out, and the puzzles of the test; all a function of these fields.

    Clue counts are inclusive and drawn uniformly; for the test, puzzles with more than one solution are then rejected,
    which favours many clues. Raises `UserError` for counts outside the grid.
    """

    seed: int = 0
    held_out: int = 28  # of the 288 grids
    clues: tuple[int, int] = (0, 12)  # in a training prompt
    test_clues: tuple[int, int] = (4, 8)  # below 4, no 4x4 puzzle is unique
    test_puzzles: int = 400

    def __post_init__(self) -> None:
        if not 1 <= self.held_out < len(all_grids()):
            raise UserError(
                f"held_out={self.held_out} of {len(all_grids())} grids; expected 1..{len(all_grids()) - 1}, such as 28"
            )
        for name in ("clues", "test_clues"):
            low, high = getattr(self, name)
            if not 0 <= low <= high <= 16:
                raise UserError(f"{name}=({low}, {high}); expected 0 <= fewest <= most <= 16, such as (4, 8)")

    @cached_property
    def _split(self) -> list[Grid]:
        return _shuffled(Random(f"sudoku split {self.seed}"), all_grids())

    @property
    def test_grids(self) -> list[Grid]:
        """The held-out grids: solutions of the test, never trained on."""
        return self._split[: self.held_out]

    @property
    def train_grids(self) -> list[Grid]:
        """All other grids."""
        return self._split[self.held_out :]

    @cached_property
    def test_set(self) -> list[tuple[Grid, Grid]]:
        """`test_puzzles` different (puzzle, its only solution), each solution held out.

        Raises `UserError` where so many cannot be found in 100 tries each.
        """
        random = Random(f"sudoku test {self.seed}")
        grids = self.test_grids
        puzzles: dict[Grid, Grid] = {}
        for _ in range(100 * self.test_puzzles):
            if len(puzzles) == self.test_puzzles:
                break
            solution = grids[_between(random, 0, len(grids) - 1)]
            shown = set(_shuffled(random, range(16))[: _between(random, *self.test_clues)])
            puzzle = tuple(digit if cell in shown else 0 for cell, digit in enumerate(solution))
            if solve(puzzle, limit=2) == [solution]:
                puzzles[puzzle] = solution
        if len(puzzles) < self.test_puzzles:
            raise UserError(
                f"test_puzzles={self.test_puzzles} with test_clues={tuple(self.test_clues)}, held_out={self.held_out}: "
                f"found only {len(puzzles)} puzzles with one solution; use fewer test_puzzles or test_clues=(4, 8)"
            )
        return list(puzzles.items())


class SudokuDataset:
    """The endless stream of training examples of a task: `dataset[index]`, a pure function of (task, index).

    A random training grid with a random number of clues at random positions: prompt of 18 ids, answer of 16.
    No length; every index from 0 is valid, below raises IndexError.
    """

    def __init__(self, task: SudokuTask) -> None:
        self.task = task
        self._responses = [tuple(_ZERO_ID + digit for digit in grid) for grid in task.train_grids]

    def __getitem__(self, index: int) -> Example:
        index = as_index(index)
        if index < 0:
            raise IndexError(f"index {index} of an endless stream; expected 0 or more")
        random = Random(f"sudoku train {self.task.seed} {index}")
        response = self._responses[_between(random, 0, len(self._responses) - 1)]
        prompt = [BOS_ID, *[_EMPTY_ID] * 16, SEP_ID]
        for cell in _shuffled(random, range(16))[: _between(random, *self.task.clues)]:
            prompt[1 + cell] = response[cell]
        return Example((*prompt, *response), ((len(prompt), len(prompt) + len(response)),), sample=index)
