"""A row of a product gets the same bits whatever the other rows are, and however many: also of thin adapters."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemo_diffgemma.model.row_products import add_product_, added_product, grouped_product, multiplied, product


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rank", [1, 2, 3, 4, 8, 16, 20, 64])
def test_rows_do_not_depend_on_their_number(dtype, rank):
    draw = torch.Generator().manual_seed(rank)
    new = lambda *shape: torch.randn(*shape, generator=draw).to(dtype)
    for features in (16, 96, 352, 2816):
        x, a, b, middle, total = new(300, features), new(rank, features), new(64, rank), new(300, rank), new(300, 64)
        padded = new(-(-rank // 8) * 8, features)[None].transpose(1, 2)
        with torch.no_grad():
            whole = product(x, a), added_product(total, middle, b), grouped_product(x, padded, ends(300))
            for rows in (1, 2, 3, 7, 8, 9, 11, 31, 64, 257):
                for start in (0, 5, 43):
                    part = slice(start, start + rows)
                    assert torch.equal(product(x[part], a), whole[0][part])
                    assert torch.equal(added_product(total[part], middle[part], b), whole[1][part])
                    assert torch.equal(grouped_product(x[part].clone(), padded, ends(rows)), whole[2][part])


def ends(rows: int) -> torch.Tensor:
    return torch.tensor([rows], dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
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
