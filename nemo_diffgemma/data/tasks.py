"""The data of a run: its stream of training examples and its held-out ones, by `data.kind`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nemo_diffgemma.config import ModelConfig
from nemo_diffgemma.data import VOCABULARY, Example, SudokuDataset, SudokuTask, encode_puzzle
from nemo_diffgemma.schema import ConfigurationError, DataGroup

KINDS = ("sudoku",)
_SEEDS = 1 << 20  # streams that do not overlap before example 2^40


def sudoku_task(data: DataGroup) -> SudokuTask:
    """The task of `data`: the same split into trained and held-out grids whatever the seed of the run."""
    _check_kind(data)
    return SudokuTask(
        held_out=data.held_out,
        clues=(data.clues[0], data.clues[1]),
        test_clues=(data.test_clues[0], data.test_clues[1]),
        test_puzzles=data.test_puzzles,
    )


class _Stream:
    """The part of an endless dataset that belongs to a seed."""

    def __init__(self, dataset: SudokuDataset, seed: int) -> None:
        self._dataset, self._first = dataset, (seed % _SEEDS) << 40

    def __getitem__(self, index: int) -> Example:
        return self._dataset[self._first + index]


def training_examples(data: DataGroup, seed: int) -> Any:
    """An endless stream, a function of (data, seed, index)."""
    return _Stream(SudokuDataset(sudoku_task(data)), seed)


def held_out_examples(data: DataGroup, wanted: int) -> Sequence[Example]:
    """The first `wanted` test puzzles with their solutions."""
    solved = sudoku_task(data).test_set[:wanted]
    digits = [VOCABULARY.index(str(digit)) for digit in range(10)]
    return [
        Example(tuple(encode_puzzle(puzzle)), tuple(digits[digit] for digit in solution), sample)
        for sample, (puzzle, solution) in enumerate(solved)
    ]


def fill_id(model: ModelConfig) -> int:
    """The id that fills the last canvas of a response."""
    return model.eos_token_id if isinstance(model.eos_token_id, int) else model.eos_token_id[0]


def check(data: DataGroup, model: ModelConfig) -> None:
    """Raise `ConfigurationError` where the network cannot read this data."""
    _check_kind(data)
    if model.vocab_size < len(VOCABULARY):
        raise ConfigurationError(
            f"data.kind=sudoku has {len(VOCABULARY)} token ids, but the network has vocab_size={model.vocab_size}; use "
            f"model.architecture.vocab_size={len(VOCABULARY)}"
        )


def _check_kind(data: DataGroup) -> None:
    if data.kind not in KINDS:
        raise ConfigurationError(f"data.kind={data.kind!r}; use one of {', '.join(KINDS)}")
