"""Micro-batches by a budget of tokens: whole examples of a step, as many as fit, no padding, replicas alike in cost.

    batches = PackedBatches(64, replica, replicas, budget=16_384, size=lambda index: Size(900, canvas_tokens=512))
    next(iter(batches))         # [[3, 17, 40], [5, 8]]: indices of the examples of each pass of this replica

The examples of a step are those that `Batches` would give; only who reads them, and in which pass, follows from their
sizes. The loss is a mean over the step, so it depends on neither.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from nemo_diffgemma.data.example import Batches
from nemo_diffgemma.errors import ConfigurationError


class Size(NamedTuple):
    """Tokens of a row, and of the canvases of it that are scored."""

    tokens: int
    canvas_tokens: int

    @property
    def total(self) -> int:
        """What a pass has to hold of it."""
        return self.tokens + self.canvas_tokens

    @property
    def cost(self) -> int:
        """In passes of one token: forward, and twice that backward; canvases once more, for self-conditioning."""
        return 3 * self.tokens + 4 * self.canvas_tokens


class PackedBatches:
    """As `Batches`, with micro-batches of at most `budget` tokens; every replica has as many of them in a step."""

    def __init__(
        self,
        global_batch_size: int,
        replica: int,
        replicas: int,
        budget: int,
        size: Callable[[int], Size],
        first_step: int = 0,
        steps: int | None = None,
    ) -> None:
        self._steps = Batches(global_batch_size, 0, 1, first_step, steps)
        Batches(global_batch_size, replica, replicas)  # raises where replicas could be left without an example
        self.replica, self.replicas, self.budget, self.size = replica, replicas, budget, size

    def __iter__(self) -> Iterator[list[list[int]]]:
        for indices in self._steps:
            sizes = [self.size(index) for index in indices]
            passes = pack(sizes, self.replicas, self.budget)[self.replica]
            yield [[indices[place] for place in places] for places in passes]

    def __len__(self) -> int:
        return len(self._steps)


def pack(sizes: Sequence[Size], replicas: int, budget: int) -> list[list[list[int]]]:
    """Places of `sizes` by replica and pass: the fewest passes that are found, none above `budget`, none empty.

    Longest first, each into the pass that has the least to do (Graham, 1969). Passes of one moment have like costs, as
    replicas that share experts wait for one another. Raises `ConfigurationError` for a size above the budget.
    """
    largest = max(size.total for size in sizes)
    if largest > budget:
        raise ConfigurationError(too_small(budget, largest))
    passes = max(1, -(-sum(size.total for size in sizes) // (budget * replicas)))
    while (bins := _packed(sizes, passes * replicas, budget)) is None:
        passes += 1
    bins.sort(key=lambda places: -sum(sizes[place].cost for place in places))
    moments = [bins[start : start + replicas] for start in range(0, len(bins), replicas)]
    # to and fro, so that no replica always has the largest of a moment
    dealt = [moment if number % 2 == 0 else moment[::-1] for number, moment in enumerate(moments)]
    return [[sorted(moment[replica]) for moment in dealt] for replica in range(replicas)]


def _packed(sizes: Sequence[Size], count: int, budget: int) -> list[list[int]] | None:
    """Places in `count` bins; None where they do not fit."""
    bins: list[list[int]] = [[] for _ in range(count)]
    costs, totals = [0] * count, [0] * count
    for place in sorted(range(len(sizes)), key=lambda place: (-sizes[place].cost, place)):
        fits = [bin for bin in range(count) if totals[bin] + sizes[place].total <= budget]
        if not fits:
            return None
        bin = min(fits, key=costs.__getitem__)
        bins[bin].append(place)
        costs[bin] += sizes[place].cost
        totals[bin] += sizes[place].total
    return bins


def too_small(budget: int, largest: int) -> str:
    """The error text for a budget that some example exceeds."""
    return (
        f"data.tokens_per_micro_batch={budget}, but the longest example has {largest} tokens, those of its scored "
        f"canvases included; use {largest} or more, a smaller data.max_length, or fewer canvases: "
        "model.objective.canvases_per_example"
    )
