"""Log-probabilities of tokens and the largest at their places are those of a dense float64 softmax.

Shapes: N positions, V ids, T of the largest.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.model import cases


def asked(seed: int, positions: int, ids: int, alike: int, **arguments: Any) -> dict[str, Any]:
    """Of `alike` different rows the table is made, so that logits are equal where rows are."""
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randn(alike, 16, generator=draw)
    return dict(
        hidden_NH=torch.randn(positions, 16, generator=draw),
        table_VH=rows[torch.randint(alike, (ids,), generator=draw)],
        ids_N=torch.randint(ids, (positions,), generator=draw),
        softcap=30.0,
        **arguments,
    )


def check(found: Tensor, asked: dict[str, Any]) -> None:
    z_NV = cases.dense(asked["hidden_NH"], asked["table_VH"], asked["softcap"]).log_softmax(-1)
    top = min(asked["top"], z_NV.shape[1])
    own_N1, best_NT, ids_NT = found.split([1, top, top], dim=1)
    torch.testing.assert_close(own_N1, z_NV.gather(1, asked["ids_N"][:, None]), atol=1e-5, rtol=0)
    torch.testing.assert_close(best_NT, z_NV.topk(top).values, atol=1e-5, rtol=0)
    torch.testing.assert_close(best_NT, z_NV.gather(1, ids_NT.long()), atol=1e-5, rtol=0)
    for best, ids in zip(best_NT.tolist(), ids_NT.tolist(), strict=True):
        order = list(zip([-logprob for logprob in best], ids, strict=True))
        assert order == sorted(set(order)), "each id once; of equal logits the smallest first"
    last_N1 = best_NT[:, -1:]
    mine = own_N1[:, 0] > last_N1[:, 0]
    assert (ids_NT == asked["ids_N"][:, None]).any(1)[mine].all(), "what is more probable than the last is among them"


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 1 << 30), st.integers(1, 40), st.integers(1, 700), st.integers(1, 700), st.integers(1, 20))
def test_scores_are_those_of_a_dense_softmax(single, seed, positions, ids, alike, top):
    chunk = [7, 64, 1024, None][seed % 4]
    problem = asked(seed, positions, ids, alike, top=top, chunk=chunk)
    check(cases.token_scores(1, **problem), problem)


@pytest.mark.parametrize("ids, alike", [(700, 700), (700, 5), (130, 130), (3, 3)])
def test_scores_over_a_cut_vocabulary_are_those_of_a_whole_one(single, pool, ids, alike):
    """Of 3 ids most ranks have padding alone."""
    problem = asked(ids, 9, ids, alike, top=20)
    whole = cases.token_scores(1, **problem)
    for found in pool(4).run("tests.model.cases:token_scores", tensor=4, **problem):
        check(found, problem)
        torch.testing.assert_close(found, whole, atol=1e-5, rtol=0)


def test_of_equal_logits_the_smallest_ids_are_kept(single):
    problem = asked(0, 4, 300, 1, top=6, chunk=64)
    found = cases.token_scores(1, **problem)
    assert found[:, 7:].tolist() == [list(range(6))] * 4
