"""Recorded steps without a GPU: a recording that is computed anew in every replay, into the same results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nemo_diffgemma.model import fixed_step
from nemo_diffgemma.model.fixed_step import FixedSteps


class Rerun:
    """In place of `CudaGraphs`: results keep their addresses, and a replay that others follow overwrites them."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, function: Callable[[], tuple[Tensor, ...]]) -> tuple[Any, tuple[Tensor, ...]]:
        results = function()
        for result in results:
            result.zero_()  # recording computes nothing
        self.recorded += 1
        return _Graph(self, function, results), results


class _Graph:
    def __init__(self, recorder: Rerun, function: Callable[[], tuple[Tensor, ...]], results: tuple[Tensor, ...]):
        self._recorder, self._function, self._results = recorder, function, results

    def replay(self) -> None:
        self._recorder.replayed += 1
        for kept, result in zip(self._results, self._function(), strict=True):
            kept.copy_(result)


def fixed(model: Any, fewest: int = 8) -> Rerun:
    """Let `model` take fixed steps, in buckets from `fewest` columns up."""
    fixed_step.FEWEST = fewest
    recorder = Rerun()
    model.fixed_steps = FixedSteps(recorder)
    return recorder


def generations(path: str, layout: dict[str, int], asked: list[dict[str, Any]]) -> list[tuple[Any, Any, int]]:
    """What `cases.generated` gives for each of the arguments: as steps are, and with fixed ones; replays of these."""
    from tests.distributed import cases

    model = cases.load(path, layout)
    plain = [cases.generated(model, **arguments) for arguments in asked]
    recorder = fixed(model)
    return [
        (before, cases.generated(model, **given), recorder.replayed) for before, given in zip(plain, asked, strict=True)
    ]


def failing_on_one_rank(path: str, layout: dict[str, int], asked: dict[str, Any]) -> tuple[Any, Any, int, bool]:
    """The same of one generation where the last rank cannot record; would this rank try again?"""
    from tests.distributed import cases

    model = cases.load(path, layout)
    plain = cases.generated(model, **asked)
    fixed(model)
    recorded: list[Any] = []

    def record(function: Callable[[], tuple[Tensor, ...]]) -> Any:
        if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            raise RuntimeError("out of memory")
        recorded.append(function)
        return None, ()  # a graph is made without the other ranks

    model.fixed_steps.recorder = record
    return plain, cases.generated(model, **asked), len(recorded), model.fixed_steps.recorder is None
