"""Any architecture that transformers runs has the same logits here, or is refused in our words."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from nemo_diffgemma.errors import UserError
from tests.distributed import cases
from tests.parity.questions import TOLERANCE, answer, question
from tests.reference import randomised_model, save_released_layout, tiny_config

SLIDING, FULL = "sliding_attention", "full_attention"


@st.composite
def architectures(draw) -> dict:
    """Few experts or many, all of them chosen or one, one layer, windows of two tokens or beyond the positions.

    A window of one token is not among them: transformers fails in its cache.
    """
    heads = draw(st.sampled_from([1, 2, 3, 4, 6, 8]))
    divisors = [n for n in range(1, heads + 1) if heads % n == 0]
    experts = draw(st.sampled_from([1, 2, 3, 5, 8, 31, 64]))
    return dict(
        vocab_size=draw(st.sampled_from([50, 64, 128, 129])),
        hidden_size=draw(st.sampled_from([8, 24, 32])),
        intermediate_size=draw(st.sampled_from([1, 7, 48])),
        layer_types=(*draw(st.lists(st.sampled_from([SLIDING, FULL]), max_size=2)), FULL),
        num_attention_heads=heads,
        num_key_value_heads=draw(st.sampled_from(divisors)),
        head_dim=draw(st.sampled_from([2, 6, 16])),
        num_global_key_value_heads=draw(st.sampled_from(divisors)),
        global_head_dim=draw(st.sampled_from([2, 8, 32])),
        sliding_window=draw(st.sampled_from([2, 3, 8, 4096])),
        num_experts=experts,
        top_k_experts=draw(st.sampled_from(sorted({1, min(2, experts), experts}))),
        moe_intermediate_size=draw(st.sampled_from([1, 3, 24])),
        canvas_length=draw(st.sampled_from([1, 4, 9])),
    )


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(sizes=architectures(), seed=st.integers(0, 99))
@example(sizes=dict(num_experts=8, top_k_experts=1), seed=0)
@example(sizes=dict(num_experts=1, top_k_experts=1), seed=0)
@example(sizes=dict(num_experts=64, top_k_experts=64), seed=0)
@example(sizes=dict(layer_types=(FULL,)), seed=0)
@example(sizes=dict(layer_types=(SLIDING, FULL), sliding_window=4096), seed=0)
@example(sizes=dict(layer_types=(SLIDING, FULL), sliding_window=2), seed=0)
@example(sizes=dict(num_attention_heads=3, num_key_value_heads=3, num_global_key_value_heads=1), seed=0)
@example(sizes=dict(hidden_size=8, num_attention_heads=6, num_key_value_heads=1, num_global_key_value_heads=6), seed=0)
def test_a_random_architecture_has_the_logits_of_transformers(single, sizes, seed):
    theirs = randomised_model(tiny_config(sizes), seed)
    asked = question(theirs, "padded", 9)
    with tempfile.TemporaryDirectory() as folder:
        save_released_layout(theirs, Path(folder), flat_per_layer_config=False)
        try:
            ours = cases.load(folder, {})
        except UserError as error:
            raise AssertionError(f"{sizes} is refused: {error}") from None
    with torch.no_grad():
        difference = cases.answer(ours, **asked.asked()) - answer(theirs, asked)
    assert difference.abs().max() < TOLERANCE
