"""Products of which a row gets the same bits whatever the other rows are, and however many.

Other rows of a pass may be another request's. Libraries of CPUs compute what remains of a matrix beside whole blocks by
other kernels, which add up in another order, and where that begins depends on the number of rows and of threads. So
without gradient all sizes of a product are padded with zeros to whole blocks there.

Shapes: R rows, L matrices, K features, N outputs.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn import functional as F

# Measured with one to eight threads (tests/model/test_row_products.py). For one thread 4 rows are enough in float32 and
# 5 in bfloat16; with several a row differs where 1 to 3 remain.
BLOCK = 8
_SMALL = 16 * 16 * 16  # rows * features * outputs up to which torch multiplies bfloat16 itself, above oneDNN does


def product(x_RK: Tensor, weight_NK: Tensor) -> Tensor:
    """`x @ weight.T`, [R, N]."""
    if _is_free(x_RK, weight_NK):
        return F.linear(x_RK, weight_NK)
    return multiplied(x_RK, weight_NK.t())


def added_product(sum_RN: Tensor, x_RK: Tensor, weight_NK: Tensor) -> Tensor:
    """`sum + x @ weight.T`, [R, N]."""
    if _is_free(x_RK, weight_NK):
        return torch.addmm(sum_RN, x_RK, weight_NK.t())
    x, weight = _padded(x_RK, weight_NK.t())
    rows, outputs = sum_RN.shape
    return torch.addmm(_with_zeros(sum_RN, len(x), weight.shape[1]), x, weight)[:rows, :outputs]


def multiplied(x_RK: Tensor, weight_KN: Tensor, out: Tensor | None = None) -> Tensor:
    """`x @ weight`, [R, N]."""
    if _is_free(x_RK, weight_KN):
        return torch.mm(x_RK, weight_KN, out=out)
    x, weight = _padded(x_RK, weight_KN)
    if out is not None and out.shape == (len(x), weight.shape[1]):
        return torch.mm(x, weight, out=out)
    result = torch.mm(x, weight)[: len(x_RK), : weight_KN.shape[1]]
    return result if out is None else out.copy_(result)


def add_product_(sum_RN: Tensor, x_RK: Tensor, weight_KN: Tensor) -> None:
    """`sum += x @ weight`."""
    if _is_free(x_RK, weight_KN):
        sum_RN.addmm_(x_RK, weight_KN)
        return
    x, weight = _padded(x_RK, weight_KN)
    if sum_RN.shape == (len(x), weight.shape[1]):
        sum_RN.addmm_(x, weight)
    else:
        sum_RN.copy_(added_product(sum_RN, x_RK, weight_KN.t()))


def grouped_product(x_RK: Tensor, weights_LKN: Tensor, ends_L: Tensor) -> Tensor:
    """Rows sorted by matrix times their matrix, [R, N]; those behind the last matrix's are undefined."""
    if _is_free(x_RK, weights_LKN):
        return F.grouped_mm(x_RK, weights_LKN, offs=ends_L)
    result = x_RK.new_empty(len(x_RK), weights_LKN.shape[2])
    for weight_KN, (start, end) in zip(weights_LKN, itertools.pairwise([0, *ends_L.tolist()]), strict=True):
        if end > start:
            multiplied(x_RK[start:end], weight_KN, out=result[start:end])
    return result


def _padded(x_RK: Tensor, weight_KN: Tensor) -> tuple[Tensor, Tensor]:
    """Both with zeros behind their rows, features and outputs."""
    features, outputs = (size + -size % BLOCK for size in weight_KN.shape)
    rows = BLOCK
    if x_RK.dtype != torch.float32:
        rows = max(rows, _SMALL // (features * outputs) + 1)
    rows = max(rows, len(x_RK) + -len(x_RK) % BLOCK)
    return _with_zeros(x_RK, rows, features), _with_zeros(weight_KN, features, outputs)


def _with_zeros(matrix: Tensor, rows: int, columns: int) -> Tensor:
    more = (0, columns - matrix.shape[1], 0, rows - matrix.shape[0])
    return F.pad(matrix, more) if any(more) else matrix


def multiple_of_tokens(device: torch.device, ranks: int) -> int:
    """What the tokens of a stream that so many ranks share are padded to: then products of them need no padding.

    Tiny weights in bfloat16 apart, of 512 numbers and fewer.
    """
    return ranks if any_kernel(device) else BLOCK * ranks


def _is_free(*factors: Tensor) -> bool:
    """Whether any kernel will do for this product."""
    return any_kernel(factors[0].device) or any(factor.numel() == 0 for factor in factors)


def any_kernel(device: torch.device) -> bool:
    """Whether bits may depend on what stands beside: on a GPU, which computes tiles, and where gradients are wanted."""
    return device.type != "cpu" or torch.is_grad_enabled()
