"""Gradients of the token table, added where Megatron's DDP sums them as soon as they are made.

The table is by far the largest weight, and every pass uses it twice or more. Through autograd each use would make a
gradient of its whole size. Where the table has a `main_grad` the functions here add to it instead, and give autograd no
gradient at all: DDP's hook of the table never runs, `training.overlap.finalize_gradients` completes its bucket.

Shapes: N tokens or positions, H hidden, v rows of this rank's table, c of a part.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

PRODUCT_BYTES = 128 << 20  # of a part of a gradient that is not yet in its float32 sum


def main_gradient(weight: Tensor) -> Tensor | None:
    """Where DDP sums the gradient of `weight`, float32; None without DDP."""
    return getattr(weight, "main_grad", None)


def input_of(weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """What a `torch.autograd.Function` takes for `weight`: itself, or a part of no graph and a leaf for the graph."""
    if main_gradient(weight) is None or not torch.is_grad_enabled():
        return weight, None
    return weight.detach(), torch.zeros((), device=weight.device, requires_grad=True)


def add_product(sum_vH: Tensor, left_Nv: Tensor, right_NH: Tensor) -> None:
    """sum += left.T @ right, without a temporary of its size where the sum has another dtype."""
    if sum_vH.dtype == left_Nv.dtype:
        sum_vH.addmm_(left_Nv.t(), right_NH)
        return
    rows = max(1, PRODUCT_BYTES // (right_NH.shape[1] * right_NH.element_size()))
    for part_cH, left_Nc in zip(sum_vH.split(rows), left_Nv.split(rows, dim=1), strict=True):
        part_cH.add_(left_Nc.t() @ right_NH)


def add_rows(sum_vH: Tensor, ids_N: Tensor, rows_NH: Tensor) -> None:
    """sum[id] += row for every id, in the same order of sums each time.

    Rows of equal ids are summed first, so that what is added to the table has no id twice: on a GPU adding is atomic,
    and its order another one each time. Without a count of the ids, which the host would wait for, N sums are made;
    those that no id has are zero and go to row 0.
    """
    if len(ids_N) >= len(sum_vH):
        sum_vH.add_(_sums(rows_NH, ids_N, len(sum_vH)))
        return
    sorted_N, order_N = ids_N.sort(stable=True)
    begins_N = torch.ones_like(sorted_N)
    begins_N[1:] = sorted_N[1:] != sorted_N[:-1]
    place_N = begins_N.cumsum(0) - 1
    target_N = torch.zeros_like(ids_N).scatter_(0, place_N, sorted_N)
    sums_NH = _sums(rows_NH, torch.empty_like(ids_N).scatter_(0, order_N, place_N), len(ids_N))
    sum_vH.index_add_(0, target_N, sums_NH.to(sum_vH.dtype))


def _sums(rows_NH: Tensor, ids_N: Tensor, count: int) -> Tensor:
    """Sums of the rows of each id, [count, H]."""
    return torch.ops.aten.embedding_dense_backward(rows_NH, ids_N, count, -1, False)


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids_N: Tensor, weight: Tensor, anchor: Tensor, sum_vH: Tensor) -> Tensor:
        ctx.save_for_backward(ids_N)
        ctx.sum_vH = sum_vH
        return F.embedding(ids_N, weight)

    @staticmethod
    def backward(ctx: Any, gradient_NH: Tensor) -> tuple[None, None, None, None]:
        (ids_N,) = ctx.saved_tensors
        add_rows(ctx.sum_vH, ids_N, gradient_NH)
        return None, None, None, None


def look_up(ids_N: Tensor, weight: Tensor) -> Tensor:
    """Rows of the table, [N, H]."""
    table, anchor = input_of(weight)
    if anchor is None:
        return F.embedding(ids_N, table)
    return _LookUp.apply(ids_N, table, anchor, main_gradient(weight))
