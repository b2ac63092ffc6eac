"""Products of which a row gets the same bits whatever the other rows are, and however many.

Other rows of a pass may be another request's. Libraries of CPUs compute what remains of a matrix beside whole blocks by
other kernels, which add up in another order, and where that begins depends on the number of rows and of threads. So
without gradient all sizes of a product are padded with zeros to whole blocks there.

Shapes: R rows, L matrices, K features, N outputs.
"""

from __future__ import annotations

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
    features, outputs = weights_LKN.shape[1:]
    fewest, *sizes = _blocks(x_RK.dtype, features, outputs)
    x, weights = _with_zeros(x_RK, len(x_RK), sizes[0]), _with_zeros(weights_LKN, *sizes)
    result, start = x.new_empty(len(x) + max(fewest, BLOCK), sizes[1]), 0
    for weight_KN, end in zip(weights.unbind(), ends_L.tolist(), strict=True):
        if end > start:  # a block is filled by the next matrix's rows, whose turn comes then
            behind = start + max(fewest, end - start + (start - end) % BLOCK)
            rows = x[start:behind] if behind <= len(x) else _with_zeros(x[start:end], behind - start, sizes[0])
            torch.mm(rows, weight_KN, out=result[start:behind])
        start = end
    return result[: len(x), :outputs]


def _padded(x_RK: Tensor, weight_KN: Tensor) -> tuple[Tensor, Tensor]:
    """Both with zeros behind their rows, features and outputs."""
    fewest, features, outputs = _blocks(x_RK.dtype, *weight_KN.shape)
    rows = max(fewest, len(x_RK) + -len(x_RK) % BLOCK)
    return _with_zeros(x_RK, rows, features), _with_zeros(weight_KN, features, outputs)


def _blocks(dtype: torch.dtype, features: int, outputs: int) -> tuple[int, int, int]:
    """The fewest rows for a matrix of these sizes, and its sizes in whole blocks."""
    features, outputs = features + -features % BLOCK, outputs + -outputs % BLOCK
    return BLOCK if dtype == torch.float32 else max(BLOCK, _SMALL // (features * outputs) + 1), features, outputs


def _with_zeros(matrix: Tensor, rows: int, columns: int) -> Tensor:
    more = (0, columns - matrix.shape[-1], 0, rows - matrix.shape[-2])
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
