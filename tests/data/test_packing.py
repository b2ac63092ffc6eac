"""Packed steps: the examples of the step, each once, no pass above the budget, replicas alike in passes and cost."""

from __future__ import annotations

from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_diffgemma.data import Batches, Example, PackedBatches, collate, collate_packed
from nemo_diffgemma.data.packing import Size, pack
from nemo_diffgemma.errors import ConfigurationError, UserError

sizes_of_a_step = st.lists(st.builds(Size, st.integers(2, 60), st.integers(1, 40)), min_size=1, max_size=24)


@given(sizes_of_a_step, st.integers(1, 4), st.integers(0, 200))
def test_every_example_is_in_one_pass_and_no_pass_is_empty_or_above_the_budget(sizes, replicas, slack):
    sizes = sizes * replicas
    budget = max(size.total for size in sizes) + slack
    dealt = pack(sizes, replicas, budget)
    assert len(dealt) == replicas and len({len(passes) for passes in dealt}) == 1
    assert sorted(chain(*chain(*dealt))) == list(range(len(sizes)))
    for places in chain(*dealt):
        assert places == sorted(places) != [] and sum(sizes[place].total for place in places) <= budget


def test_replicas_are_alike_in_cost_and_passes_are_few():
    lengths = [50 + 37 * n % 900 for n in range(256)]
    sizes = [Size(length, 256 * (1 + length // 300)) for length in lengths]
    dealt = pack(sizes, 8, 8192)
    costs = [sum(sizes[place].cost for place in chain(*passes)) for passes in dealt]
    assert max(costs) < 1.03 * min(costs)
    for moment in zip(*dealt, strict=True):
        cost = [sum(sizes[place].cost for place in places) for places in moment]
        assert max(cost) < 1.1 * min(cost)
    needed = sum(size.total for size in sizes) / (8 * 8192)
    assert len(dealt[0]) <= needed + 1
    in_order = [sum(size.cost for size in sizes[r * 32 : (r + 1) * 32]) for r in range(8)]
    assert max(in_order) / min(in_order) > max(costs) / min(costs)


@given(replicas=st.integers(1, 4), first=st.integers(0, 5))
def test_steps_are_those_of_unpacked_batches(replicas, first):
    size = lambda index: Size(3 + index * 7 % 11, 4)
    packed = [list(PackedBatches(12, replica, replicas, 40, size, first, 7)) for replica in range(replicas)]
    plain = list(Batches(12, 0, 1, first, 7))
    for step, ranks in zip(plain, zip(*packed, strict=True), strict=True):
        assert sorted(chain(*chain(*ranks))) == step
    assert len(PackedBatches(12, 0, replicas, 40, size, first, 7)) == 7 - first
    with pytest.raises(UserError, match="cannot be shared by 5"):
        PackedBatches(12, 0, 5, 40, size)


def test_a_budget_below_the_longest_example_is_refused():
    with pytest.raises(
        ConfigurationError, match="data.tokens_per_micro_batch=20, but the longest example has 21 tokens"
    ):
        pack([Size(5, 4), Size(17, 4)], 1, 20)


def test_packed_rows_are_split_as_they_were_packed():
    examples = [Example(tuple(range(2, 4 + n)), ((1, 2 + n),), n) for n in range(5)]
    rows = collate_packed(
        [[examples[0], examples[3]], [examples[1]], [examples[2], examples[4]]], canvas_length=4, fill_id=1
    )
    assert rows.passes == [2, 1, 2] and rows.samples == [0, 3, 1, 2, 4]
    parts = rows.to("cpu").split(rows.passes)
    for part, wanted in zip(parts, ([0, 3], [1], [2, 4]), strict=True):
        alone = collate([examples[index] for index in wanted], 4, 1)
        assert part.tokens_T.tolist() == alone.tokens_T.tolist()
        assert (part.answers, part.lengths, part.samples, part.passes) == (
            alone.answers,
            alone.lengths,
            alone.samples,
            (),
        )
