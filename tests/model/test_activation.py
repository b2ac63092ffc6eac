"""An element's activation is the same in any tensor, at any place, in any number of threads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from nemo_diffgemma.model.activation import gelu


@pytest.mark.parametrize("count", [1, 2, 3])
def test_gelu_has_the_same_bits_at_any_place(threads, count):
    threads(count)

    @settings(max_examples=40, deadline=None)
    @given(
        rows=st.integers(1, 1000),
        width=st.sampled_from([16, 33, 64, 80, 96, 176, 352]),
        start=st.integers(0, 999),
        halves=st.booleans(),
        dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    )
    def check(rows, width, start, halves, dtype):
        """A row alone, or some rows, are what they are among all; parts of a tensor as the experts' gate, too."""
        x = torch.randn(rows, 2 * width, generator=torch.Generator().manual_seed(0)).mul_(3).to(dtype)
        x = x[:, :width] if halves else x[:, :width].contiguous()
        start = start % rows
        among = gelu(x, False)
        for end in (start + 1, rows):
            assert torch.equal(gelu(x[start:end], False), among[start:end])
        torch.testing.assert_close(among, F.gelu(x, approximate="tanh"))

    check()


def test_gelu_of_the_ends_of_numbers():
    x = torch.tensor([-torch.inf, -1e30, -20.0, -0.0, 0.0, 20.0, 1e30, torch.inf, torch.nan]).repeat(3, 1)
    expected = F.gelu(x.double(), approximate="tanh").float()
    torch.testing.assert_close(gelu(x, False), expected, equal_nan=True)
