"""A layout that cannot be is refused where it is made, and the message says which can."""

from __future__ import annotations

import dataclasses

import pytest

from nemo_diffgemma import DiffusionGemma, ModelConfig, ParallelLayout
from nemo_diffgemma.parallel import LayoutError, groups, initialize

RELEASED = ModelConfig()


@pytest.mark.parametrize(
    ("layout", "world", "replicas"),
    [
        ({}, 1, 1),
        (dict(tensor=2, expert=2), 2, 1),
        (dict(tensor=2, expert=4), 4, 2),
        (dict(tensor=4, expert=6), 12, 3),
        (dict(tensor=2, expert=2, expert_tensor=2), 4, 2),
    ],
    ids=str,
)
def test_the_smallest_world_is_what_dense_and_expert_axes_share(layout, world, replicas):
    made = ParallelLayout(**layout)
    assert made.world_size == world and made.replicas(world) == replicas
    assert made.replicas(3 * world) == 3 * replicas


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (dict(tensor=3), "tensor=3 cannot divide 16 attention heads; use tensor=1, 2, 4, 8 or 16"),
        (dict(expert=3), "expert=3 cannot divide 128 experts; use expert=1, 2, 4"),
        (dict(expert_tensor=3), "expert_tensor=3 cannot divide 704 rows of moe_intermediate_size"),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_a_layout_that_does_not_divide_the_model(layout, message):
    with pytest.raises(LayoutError) as raised:
        ParallelLayout(**layout).check(RELEASED)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_key_value_heads_and_ranks_must_divide_one_another():
    config = dataclasses.replace(RELEASED, num_attention_heads=12, num_key_value_heads=6, num_global_key_value_heads=2)
    ParallelLayout(tensor=2).check(config)
    with pytest.raises(LayoutError, match="tensor=4 and num_key_value_heads=6: one must divide the other"):
        ParallelLayout(tensor=4).check(config)


@pytest.mark.parametrize("tensor", [1, 2, 4, 8, 16])
def test_the_released_model_is_cut_over_every_size_its_heads_allow(tensor):
    ParallelLayout(tensor=tensor, expert=128).check(RELEASED)


def test_the_vocabulary_is_named_where_it_is_what_cannot_be_divided():
    config = dataclasses.replace(RELEASED, vocab_size=100, num_attention_heads=256, intermediate_size=256)
    with pytest.raises(LayoutError, match="tensor=256 cannot divide 128 rows of the padded vocabulary; use .*"):
        ParallelLayout(tensor=256).check(config)


@pytest.mark.parametrize("value", [0, -1, 1.5, "2", True, 10**30])
def test_a_size_is_a_whole_number(value):
    with pytest.raises(LayoutError, match="must be a whole number of at least 1"):
        ParallelLayout(tensor=value)


@pytest.mark.parametrize("axis", ["pipeline", "context"])
def test_axes_that_are_not_there_yet(axis):
    with pytest.raises(LayoutError, match=f"{axis}=2 is not supported yet; use {axis}=1 and cut over tensor or expert"):
        ParallelLayout(**{axis: 2})


def test_a_world_is_whole_replicas(single):
    with pytest.raises(LayoutError) as raised:
        initialize(ParallelLayout(tensor=2, expert=2))
    assert "needs 2 processes or a multiple of it, but there are 1" in str(raised.value)
    assert "torchrun --nproc-per-node 2" in str(raised.value)


def test_a_model_needs_process_groups_first(single, monkeypatch):
    monkeypatch.setattr(groups, "_layout", None)
    with pytest.raises(LayoutError, match=r"call nemo_diffgemma.parallel.initialize\(ParallelLayout\(...\)\) first"):
        DiffusionGemma(ModelConfig(num_hidden_layers=1))


def test_every_rank_is_told(pool):
    errors = pool(2).run("tests.distributed.cases:error_of", case="load", path="nowhere", layout=dict(tensor=4))
    assert all("LayoutError" in error and "needs 4 processes" in error for error in errors)
