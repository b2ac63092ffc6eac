"""Sudoku: the rules hold, the solver is exact, and the test cannot be solved by remembering the training grids."""

from collections import Counter
from hashlib import sha256
from itertools import permutations, product

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nemo_diffgemma.data import (
    BOS_ID,
    EOS_ID,
    PAD_ID,
    SEP_ID,
    VOCABULARY,
    SudokuDataset,
    SudokuTask,
    all_grids,
    decode_response,
    encode_puzzle,
    format_grid,
    is_solution,
    solve,
    solve_rate,
)

TASK = SudokuTask()
STREAM = SudokuDataset(TASK)
NINE = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
NINE_SOLVED = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"

grids = st.sampled_from(all_grids())
shown = st.sets(st.integers(0, 15))
any_clues = st.lists(st.sampled_from([0, 0, 0, 1, 2, 3, 4]), min_size=16, max_size=16)


def cells_of(text):
    return [0 if character == "." else int(character) for character in text]


def masked(grid, shown):
    return [digit if cell in shown else 0 for cell, digit in enumerate(grid)]


def fits(puzzle, grid):
    return all(clue in (0, digit) for clue, digit in zip(puzzle, grid, strict=True))


# Rules and solver


def test_all_grids_are_what_brute_force_over_rows_finds():
    def different(cells):
        return len(set(cells)) == 4

    def valid(a, b, c, d):
        boxes = (a[:2] + b[:2], a[2:] + b[2:], c[:2] + d[:2], c[2:] + d[2:])
        return all(map(different, boxes)) and all(map(different, zip(a, b, c, d, strict=True)))

    found = {sum(rows, ()) for rows in product(permutations(range(1, 5)), repeat=4) if valid(*rows)}
    assert len(found) == len(all_grids()) == 288
    assert found == set(all_grids())


@given(st.one_of(st.builds(masked, grids, shown), any_clues))
@example([1, 1] + [0] * 14)
@example([1, 1, 3, 4] + [0] * 12)  # the row has no open cell left that could notice
def test_solver_finds_exactly_the_grids_that_fit_the_clues(puzzle):
    expected = {grid for grid in all_grids() if fits(puzzle, grid)}
    found = solve(puzzle, limit=289)
    assert len(found) == len(expected) and set(found) == expected
    assert solve(puzzle, limit=2) == found[:2]


@pytest.mark.parametrize("puzzle, solution", [(NINE, NINE_SOLVED), ("." * 81, None), ("." * 36, None)])
def test_solver_obeys_the_rules_of_larger_grids(puzzle, solution):
    puzzle = cells_of(puzzle)
    found = solve(puzzle, limit=2)
    assert all(is_solution(puzzle, grid) for grid in found)
    assert found == [tuple(cells_of(solution))] if solution else len(found) == 2


@given(st.one_of(any_clues, grids.map(list)), grids, shown)
def test_a_solution_is_a_grid_that_keeps_the_clues(cells, grid, shown):
    puzzle = masked(grid, shown)
    assert is_solution(puzzle, cells) == (tuple(cells) in all_grids() and fits(puzzle, cells))


@given(grids, st.integers(0, 15), st.integers(0, 9))
def test_one_wrong_cell_spoils_a_solution(grid, cell, digit):
    changed = [*grid[:cell], digit, *grid[cell + 1 :]]
    assert is_solution([0] * 16, changed) == (digit == grid[cell])


def test_puzzles_of_no_known_size_or_digit_are_refused():
    for refuses in (solve, format_grid, lambda cells: is_solution(cells, cells)):
        with pytest.raises(ValueError, match="a grid of 17 cells; expected 16"):
            refuses([0] * 17)
    with pytest.raises(ValueError, match=r"expected 1\.\.4"):
        solve([5] + [0] * 15)


# The task


@given(st.integers(0, 2**48))
def test_every_training_response_solves_its_prompt_with_a_training_grid(index):
    example = STREAM[index]
    clues, solution = [VOCABULARY[id] for id in example.tokens[:18]], decode_response(example.tokens[18:])
    puzzle = cells_of("".join(clues[1:-1]))
    assert example.sample == index
    assert list(example.tokens[:18]) == encode_puzzle(puzzle) and example.answers == ((18, 34),)
    assert is_solution(puzzle, solution)
    assert tuple(solution) in TASK.train_grids
    assert 0 <= 16 - puzzle.count(0) <= 12


@settings(max_examples=20)
@given(seed=st.integers(), held_out=st.integers(1, 287))
def test_no_training_grid_is_held_out(seed, held_out):
    task = SudokuTask(seed=seed, held_out=held_out)
    assert len(task.test_grids) == held_out
    assert sorted(task.train_grids + task.test_grids) == list(all_grids())


def test_a_test_puzzle_has_one_solution_and_it_is_held_out():
    puzzles = TASK.test_set
    assert len(puzzles) == len({puzzle for puzzle, _ in puzzles}) == 400
    for puzzle, solution in puzzles:
        assert [grid for grid in all_grids() if fits(puzzle, grid)] == [solution]
        assert solution in TASK.test_grids and solution not in TASK.train_grids
        assert 4 <= 16 - puzzle.count(0) <= 8


def test_grids_clue_counts_and_positions_are_uniform():
    examples = [STREAM[index] for index in range(13_000)]
    responses = Counter(example.tokens[18:] for example in examples)
    counts = Counter(18 - 2 - example.tokens[:18].count(VOCABULARY.index(".")) for example in examples)
    cells = [sum(example.tokens[1 + cell] != VOCABULARY.index(".") for example in examples) for cell in range(16)]
    assert len(responses) == 260 and all(abs(n - 50) < 5 * 50**0.5 for n in responses.values())
    assert set(counts) == set(range(13)) and all(abs(n - 1000) < 5 * 1000**0.5 for n in counts.values())
    assert all(abs(n - 13_000 * 6 / 16) < 5 * (13_000 * 6 / 16 * 10 / 16) ** 0.5 for n in cells)


def test_an_example_depends_on_task_and_index_alone():
    other = SudokuDataset(SudokuTask(seed=0))
    order = [5, 0, 10**12, 5]
    assert [other[index] for index in order] == [STREAM[index] for index in order]
    assert len({SudokuDataset(SudokuTask(seed=seed))[0].tokens[18:] for seed in range(-8, 8)}) > 8


def test_the_data_of_seed_0_never_change():
    # PYTHONHASHSEED differs from one session to the next, so a digest that holds does not depend on it.
    stream = [(example.tokens[:18], example.tokens[18:]) for example in map(STREAM.__getitem__, range(100))]
    assert sha256(repr(TASK.test_set).encode()).hexdigest()[:16] == "2fb079fdf2cebbd1"
    assert sha256(repr(stream).encode()).hexdigest()[:16] == "6bce3d8a5290e09e"


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"held_out": 288}, "held_out=288 of 288 grids; expected 1..287"),
        ({"clues": (0, 17)}, r"clues=\(0, 17\); expected 0 <="),
        ({"test_clues": (8, 4)}, r"test_clues=\(8, 4\); expected 0 <="),
    ],
)
def test_an_impossible_task_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        SudokuTask(**fields)


def test_a_test_that_cannot_be_filled_says_so_instead_of_searching_forever():
    with pytest.raises(ValueError, match=r"found only 0 puzzles .* test_clues=\(4, 8\)"):
        _ = SudokuTask(test_clues=(0, 3), test_puzzles=5).test_set


def test_a_stream_has_no_index_below_0():
    with pytest.raises(IndexError, match="expected 0 or more"):
        STREAM[-1]


# Tokens and text


@given(grids, shown)
def test_a_prompt_is_bos_cells_sep(grid, shown):
    puzzle = masked(grid, shown)
    prompt = encode_puzzle(puzzle)
    assert (prompt[0], prompt[-1], len(prompt)) == (BOS_ID, SEP_ID, 18)
    assert [VOCABULARY[id] for id in prompt[1:-1]] == [str(digit) if digit else "." for digit in puzzle]


@given(grids, st.lists(st.integers(0, 63), max_size=5))
def test_a_response_ends_at_its_first_eos(grid, tail):
    ids = encode_puzzle(grid)[1:-1]
    assert decode_response(ids) == decode_response(torch.tensor(ids)) == list(grid)
    assert decode_response([*ids, EOS_ID, *tail]) == list(grid)
    assert decode_response(ids[:-1] + [EOS_ID]) is None


@given(grids, st.integers(0, 15), st.sampled_from([PAD_ID, EOS_ID, BOS_ID, SEP_ID, *map(VOCABULARY.index, ".0a+")]))
def test_a_response_with_anything_but_digits_is_no_grid(grid, cell, id):
    ids = encode_puzzle(grid)[1:-1]
    ids[cell] = id
    assert decode_response(ids) is None


def test_solve_rate_counts_exact_grids_that_keep_the_clues():
    puzzles = [puzzle for puzzle, _ in TASK.test_set[:8]]
    right = torch.tensor([encode_puzzle(solution)[1:-1] for _, solution in TASK.test_set[:8]])
    assert solve_rate(puzzles, right) == 1.0
    wrong = right.clone()
    wrong[0] = wrong[0].flip(0)  # a valid grid, of other clues
    wrong[1, 3] = VOCABULARY.index(".")
    wrong[2] = wrong[2].sort().values
    assert is_solution([0] * 16, decode_response(wrong[0])) and not is_solution(puzzles[0], decode_response(wrong[0]))
    assert solve_rate(puzzles, wrong) == 5 / 8


def test_solve_rate_accepts_every_solution_of_an_open_puzzle():
    responses = torch.tensor([encode_puzzle(grid)[1:-1] for grid in all_grids()])
    assert solve_rate([[0] * 16] * 288, responses) == 1.0


@pytest.mark.parametrize("puzzles, responses", [(0, 0), (2, 1)])
def test_solve_rate_refuses_unequal_or_no_puzzles(puzzles, responses):
    with pytest.raises(ValueError, match=f"{puzzles} puzzles and {responses} responses"):
        solve_rate([[0] * 16] * puzzles, torch.zeros(responses, 16, dtype=torch.int64))


def test_a_grid_is_drawn_with_its_boxes():
    assert format_grid(cells_of("1..4..3.2......1")).splitlines() == [
        "┌─────┬─────┐",
        "│ 1 . │ . 4 │",
        "│ . . │ 3 . │",
        "├─────┼─────┤",
        "│ 2 . │ . . │",
        "│ . . │ . 1 │",
        "└─────┴─────┘",
    ]
    six = format_grid([0] * 36).splitlines()
    assert six[:4] == ["┌───────┬───────┐", "│ . . . │ . . . │", "│ . . . │ . . . │", "├───────┼───────┤"]
    assert len(six) == 6 + 4
