"""Cross-entropy and signal over a cut vocabulary have the loss and gradients of a dense float64 computation.

Shapes: N positions, H hidden, V ids.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nemo_diffgemma.model import table_gradient
from tests.model import cases
from tests.model.cases import dense, problem


def loss_problem(seed: int, positions: int, ids: int, hidden: int, scale: float) -> dict[str, Any]:
    asked = problem(seed, positions, ids, hidden, scale)
    generator = torch.Generator().manual_seed(seed + 1)
    return dict(
        hidden_NH=asked["hidden_NH"],
        table_VH=asked["table_VH"],
        labels_N=torch.randint(ids, (positions,), generator=generator),
        weights_N=torch.rand(positions, generator=generator),
        softcap=30.0,
    )


def check_loss(ranks: list[dict[str, Tensor]], asked: dict[str, Any], scale: float = 1.0) -> None:
    """Shares of the hidden gradient add up; rows of the table's lie one below the other, padding without gradient."""
    hidden, table = asked["hidden_NH"].double().requires_grad_(), asked["table_VH"].double().requires_grad_()
    z_NV = dense(hidden, table, asked["softcap"])
    losses_N = torch.nn.functional.cross_entropy(z_NV, asked["labels_N"], reduction="none")
    loss = (losses_N * asked["weights_N"].double()).sum()
    (loss * scale).backward()
    assert hidden.grad is not None and table.grad is not None
    terms_NV = asked["hidden_NH"].abs() @ asked["table_VH"].abs().T
    bound = 1e-6 * (1 + max(float(z_NV.detach().abs().max()), float(terms_NV.max())))
    for found in ranks:
        torch.testing.assert_close(found["losses_N"].double(), losses_N.detach(), atol=bound, rtol=1e-6)
        torch.testing.assert_close(found["loss"].double(), loss.detach(), atol=bound * len(losses_N), rtol=1e-6)
    # a probability next to 1 loses its distance from 1 below float32's epsilon, however small the gradient is
    rounding = 2.0**-23 * abs(scale)
    shares = sum(found["hidden"] for found in ranks)
    atol = bound * float(hidden.grad.abs().max()) + rounding * float(table.detach().abs().max())
    torch.testing.assert_close(shares.double(), hidden.grad, atol=atol, rtol=1e-5)
    rows = torch.cat([found["table"] for found in ranks])
    ids = len(table)
    atol = bound * float(table.grad.abs().max()) + rounding * float(hidden.detach().abs().max())
    torch.testing.assert_close(rows[:ids].double(), table.grad, atol=atol, rtol=1e-5)
    assert (rows[ids:] == 0).all()


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    positions=st.integers(1, 9),
    ids=st.integers(2, 300),
    scale=st.sampled_from([0.1, 2.0, 20.0]),
    loss_bytes=st.sampled_from([1, 4 * 128 * 2, 4 * 384 * 3, 1 << 28]),
    factor=st.sampled_from([1.0, -0.25]),
)
def test_cross_entropy_and_its_gradients(single, seed, positions, ids, scale, loss_bytes, factor):
    """One position at a time, a few, or all: the bytes allowed change memory, not values."""
    asked = loss_problem(seed, positions, ids, 24, scale)
    check_loss([cases.cross_entropy(1, **asked, loss_bytes=loss_bytes, scale=factor)], asked, factor)


@pytest.mark.parametrize("tensor", [2, 4])
@pytest.mark.parametrize("loss_bytes", [1, 1 << 28], ids=["one at a time", "at once"])
@pytest.mark.parametrize("ids", [61, 257])
def test_cross_entropy_over_a_cut_vocabulary(pool, tensor, loss_bytes, ids):
    asked = loss_problem(5, 6, ids, 24, 3.0)
    ranks = pool(tensor).run(
        "tests.model.cases:cross_entropy", tensor=tensor, **asked, loss_bytes=loss_bytes, scale=0.5
    )
    check_loss(ranks, asked, 0.5)


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("ids", [61, 257, 2500])
def test_soft_embedding_is_differentiable_in_the_table_alone(single, pool, tensor, ids):
    """2500 ids are more than one chunk. The probabilities are those of the first pass: they have no gradient."""
    asked = problem(9, 5, ids, 24, 3.0)
    gradient = torch.randn(5, 24, generator=torch.Generator().manual_seed(2))
    arguments = dict(hidden_NH=asked["hidden_NH"], table_VH=asked["table_VH"], softcap=30.0, gradient_NH=gradient)
    if tensor == 1:
        ranks = [cases.soft_embedding(1, **arguments)]
    else:
        ranks = pool(tensor).run("tests.model.cases:soft_embedding", tensor=tensor, **arguments)
    table = asked["table_VH"].double().requires_grad_()
    p_NV = dense(asked["hidden_NH"], asked["table_VH"], 30.0).softmax(-1)
    soft_NH = p_NV @ table
    soft_NH.backward(gradient.double())
    for found in ranks:
        torch.testing.assert_close(found["soft"].double(), soft_NH.detach(), atol=1e-5, rtol=0)
        assert found["hidden"] is None
    rows = torch.cat([found["table"] for found in ranks])
    torch.testing.assert_close(rows[:ids].double(), table.grad, atol=1e-5, rtol=0)
    assert (rows[ids:] == 0).all()


# -- where training lets the table's gradient go -----------------------------------------------------------------------


def check_accumulated(ranks: list[dict[str, Tensor]], asked: dict[str, Any]) -> None:
    """Loss, signal and look-up of one table: its gradients are one sum, whichever tensor holds it."""
    table = asked["table_VH"].double().requires_grad_()
    hidden = asked["hidden_NH"].double().requires_grad_()
    z_NV = dense(hidden, table, asked["softcap"])
    losses_N = torch.nn.functional.cross_entropy(z_NV, asked["labels_N"], reduction="none")
    loss = (losses_N * asked["weights_N"].double()).sum()
    soft_NH = z_NV.detach().softmax(-1) @ table
    ((soft_NH + table[asked["labels_N"]]) * asked["gradient_NH"].double()).sum().add(loss).backward()
    assert hidden.grad is not None and table.grad is not None
    for found in ranks:
        torch.testing.assert_close(found["loss"].double(), loss.detach(), atol=1e-5, rtol=1e-5)
    shares = sum(found["hidden"] for found in ranks)
    torch.testing.assert_close(shares.double(), hidden.grad, atol=1e-5, rtol=1e-5)
    rows = torch.cat([found["table"] for found in ranks])
    torch.testing.assert_close(rows[: len(table)].double(), table.grad, atol=1e-5, rtol=1e-5)
    assert (rows[len(table) :] == 0).all()


def accumulated_problem(seed: int, positions: int, ids: int) -> dict[str, Any]:
    gradient_NH = torch.randn(positions, 24, generator=torch.Generator().manual_seed(seed))
    return dict(loss_problem(seed, positions, ids, 24, 2.0), gradient_NH=gradient_NH)


@settings(max_examples=30)
@given(seed=st.integers(0, 2**31), positions=st.integers(1, 9), ids=st.integers(2, 300), main=st.booleans())
def test_gradients_of_the_table_are_one_sum(single, seed, positions, ids, main):
    """With Megatron's main gradient nothing of the table's goes through autograd."""
    asked = accumulated_problem(seed, positions, ids)
    check_accumulated([cases.accumulated(1, **asked, main=main)], asked)


@pytest.mark.parametrize("tensor", [2, 4])
@pytest.mark.parametrize("main", [True, False])
@pytest.mark.parametrize("ids", [61, 257])
def test_gradients_of_a_cut_table_are_one_sum(pool, tensor, main, ids):
    """61 ids leave a rank of 4 nothing but padding."""
    asked = accumulated_problem(3, 6, ids)
    check_accumulated(pool(tensor).run("tests.model.cases:accumulated", tensor=tensor, **asked, main=main), asked)


@settings(max_examples=60)
@given(seed=st.integers(0, 2**31), ids=st.integers(1, 40), count=st.integers(1, 60), distinct=st.integers(1, 40))
def test_rows_of_equal_ids_add_up(seed, ids, count, distinct):
    """Fewer ids than the table has rows, or more; each many times, or once."""
    generator = torch.Generator().manual_seed(seed)
    ids_N = torch.randint(min(ids, distinct), (count,), generator=generator)
    rows_NH, before = torch.randn(count, 3, generator=generator), torch.randn(ids, 3, generator=generator)
    found = before.clone()
    table_gradient.add_rows(found, ids_N, rows_NH)
    expected = before.double().index_add(0, ids_N, rows_NH.double())
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


def test_a_main_gradient_of_another_dtype_is_summed_in_parts(monkeypatch):
    """bfloat16 products go into a float32 sum, a few rows of the table at a time."""
    monkeypatch.setattr(table_gradient, "PRODUCT_BYTES", 3 * 2 * 24)
    generator = torch.Generator().manual_seed(0)
    left_Nv, right_NH = (torch.randn(8, n, generator=generator).bfloat16() for n in (50, 24))
    found = torch.ones(50, 24)
    table_gradient.add_product(found, left_Nv, right_NH)
    torch.testing.assert_close(found, 1 + left_Nv.float().T @ right_NH.float(), atol=0.1, rtol=2**-7)
