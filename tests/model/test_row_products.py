"""A row of a product gets the same bits whatever the other rows are, and however many: also of thin adapters."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from nemo_diffgemma.model.row_products import BLOCK, add_product_, added_product, grouped_product, multiplied, product

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
ROWS = (1, 2, 3, 7, 8, 9, 11, 18, 27, 64, 257)


@DTYPES
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("outputs", [1, 3, 8, 20, 37, 72, 500])
def test_rows_do_not_depend_on_their_number(dtype, count, outputs, threads):
    """Nor on where they stand; and with several threads, which share them."""
    threads(count)
    draw = torch.Generator().manual_seed(outputs)
    new = lambda *shape: torch.randn(*shape, generator=draw).to(dtype)
    for features in (1, 4, 20, 352):
        x, weight, total = new(300, features), new(outputs, features), new(300, outputs)
        weights = new(2, outputs, features).transpose(1, 2)
        with torch.no_grad():
            whole = _products(x, weight, total, weights)
            for rows in ROWS:
                for start in (0, 43):
                    part = slice(start, start + rows)
                    for ours, expected in zip(_products(x[part], weight, total[part], weights), whole, strict=True):
                        assert torch.equal(ours, expected[part]), (features, rows, start)


def _products(x, weight, total, weights):
    added = total.clone()
    add_product_(added, x, weight.t())
    of_expert = grouped_product(x.clone(), weights, torch.tensor([0, len(x)], dtype=torch.int32))
    return product(x, weight), added_product(total, x, weight), multiplied(x, weight.t().contiguous()), added, of_expert


@DTYPES
@pytest.mark.parametrize("count", [1, 2, 4])
def test_layers_of_a_padded_stream_need_no_padding(dtype, count, threads):
    """Of Megatron's layers, which call torch themselves: tokens of a stream are a multiple of `BLOCK`."""
    threads(count)
    draw = torch.Generator().manual_seed(0)
    for features, outputs in [(16, 64), (64, 32), (64, 504), (352, 128), (512, 1024)]:
        x, weight = (torch.randn(*shape, generator=draw).to(dtype) for shape in ((320, features), (outputs, features)))
        with torch.no_grad():
            whole = F.linear(x, weight)
            for rows in range(BLOCK, 129, BLOCK):
                assert torch.equal(F.linear(x[:rows], weight), whole[:rows]), (features, outputs, rows)


@DTYPES
@given(rows=st.integers(0, 20), features=st.integers(0, 40), outputs=st.integers(0, 40), grad=st.booleans())
def test_products_of_any_size(dtype, rows, features, outputs, grad):
    """Also of none: a rank may have no ids of a small vocabulary."""
    draw = torch.Generator().manual_seed(rows)
    x, w, total = (
        torch.randint(-3, 4, shape, generator=draw).to(dtype)  # sums of them are exact
        for shape in ((rows, features), (features, outputs), (rows, outputs))
    )
    expected, added = (x.float() @ w.float()).to(dtype), (total.float() + x.float() @ w.float()).to(dtype)
    with torch.set_grad_enabled(grad):
        assert torch.equal(product(x, w.t().contiguous()), expected)
        assert torch.equal(multiplied(x, w), expected)
        assert torch.equal(multiplied(x, w, out=torch.full_like(total, 9)), expected)
        assert torch.equal(added_product(total, x, w.t().contiguous()), added)
        add_product_(total, x, w)
    assert torch.equal(total, added)
