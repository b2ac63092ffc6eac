"""Noise levels that are spread over a step leave no gap, whatever the layout, and each alone is uniform."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_diffgemma.diffusion.levels import STREAM
from nemo_diffgemma.diffusion.objective import choose_canvases, corrupt
from nemo_diffgemma.diffusion.rows import Rows


def levels(samples: list[int], canvases: int, wanted: int, batch: int, seed: int) -> torch.Tensor:
    """Of the chosen canvases of each sample, [samples, wanted]; no noise floor."""
    length = 2 + 4 * canvases
    rows = Rows(
        torch.zeros(len(samples) * length, dtype=torch.long),
        [((2, length),)] * len(samples),
        [length] * len(samples),
        samples,
        1,
    )
    chosen = choose_canvases(rows, 4, wanted, seed)
    found = corrupt(rows, chosen, 4, 61, seed, noise_floor=0.0, spread_over=batch).levels_M
    return found.view(len(samples), wanted)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 70),
    step=st.integers(0, 10**6),
    seed=st.integers(-(2**31), 2**31),
    wanted=st.integers(1, 3),
    stream=st.integers(0, 5),
)
def test_each_interval_has_one_example_of_a_step(batch, step, seed, wanted, stream):
    """In order around the circle, the levels of a step's n-th canvases are one interval apart, within an interval."""
    samples = [stream * STREAM + step * batch + place for place in range(batch)]
    for of_rank in levels(samples, 3, wanted, batch, seed).T.double():
        assert of_rank.min() >= 0 and of_rank.max() < 1
        inside = of_rank.sort().values * batch - torch.arange(batch)
        assert inside.max() - inside.min() < 1 + 1e-3


@pytest.mark.parametrize("rank", [0, 1])
def test_the_level_of_one_example_is_uniform_over_seeds(rank):
    found = torch.cat([levels([5], 2, 2, 8, seed)[:, rank] for seed in range(2000)])
    counts = torch.histc(found, bins=20, min=0, max=1).double()
    assert abs(float(((counts - 100) ** 2 / 100).sum()) - 19) < 5 * math.sqrt(2 * 19)


@settings(max_examples=20, deadline=None)
@given(order=st.permutations(range(6)), seed=st.integers(0, 2**31))
def test_a_level_does_not_depend_on_who_else_is_in_the_micro_batch(order, seed):
    together = levels(list(range(6)), 3, 2, 8, seed)
    alone = torch.cat([levels([sample], 3, 2, 8, seed) for sample in order])
    assert torch.equal(together[list(order)], alone)


def test_sources_that_alternate_see_all_levels():
    """A place in the batch belongs to no level: the rotation moves it from step to step."""
    first = torch.cat([levels([step * 2], 1, 1, 2, seed=0) for step in range(2000)]).flatten().double()
    counts = torch.histc(first, bins=10, min=0, max=1)
    assert abs(float(((counts - 200) ** 2 / 200).sum()) - 9) < 5 * math.sqrt(2 * 9)
