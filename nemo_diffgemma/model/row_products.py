"""Products of which a row gets the same bits whatever the other rows are, and however many.

Other rows of a pass may be another request's. CPU libraries compute fewer than `FEWEST_ROWS` rows by another kernel,
which adds up in another order; without gradient such rows are padded with zeros there.

Shapes: R rows, L matrices, K features, N outputs.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor
from torch.nn import functional as F

# From so many rows on a row of a product does not depend on their number, on CPUs (tests/serving): 4 are enough in
# float32, 5 in bfloat16.
FEWEST_ROWS = 8
FEWEST_OUTPUTS = 2  # one output is a product of a matrix and a vector
_SMALL = 16 * 16 * 16  # rows * features * outputs up to which torch multiplies bfloat16 itself, above oneDNN does


def product(x_RK: Tensor, weight_NK: Tensor) -> Tensor:
    """`x @ weight.T`, [R, N]."""
    outputs, features = weight_NK.shape
    rows, more = _missing_rows(x_RK, features, outputs), FEWEST_OUTPUTS - outputs
    if (not rows and more <= 0) or _is_free(x_RK):
        return F.linear(x_RK, weight_NK)
    padded = F.linear(F.pad(x_RK, (0, 0, 0, rows)), F.pad(weight_NK, (0, 0, 0, max(0, more))))
    return padded[: len(x_RK), :outputs]


def added_product(sum_RN: Tensor, x_RK: Tensor, weight_NK: Tensor) -> Tensor:
    """`sum + x @ weight.T`, [R, N]."""
    rows = _missing_rows(x_RK, *weight_NK.shape)
    if not rows or _is_free(x_RK):
        return torch.addmm(sum_RN, x_RK, weight_NK.t())
    total, x = (F.pad(values, (0, 0, 0, rows)) for values in (sum_RN, x_RK))
    return torch.addmm(total, x, weight_NK.t())[: len(x_RK)]


def multiplied(x_RK: Tensor, weight_KN: Tensor, out: Tensor | None = None) -> Tensor:
    """`x @ weight`, [R, N]."""
    rows, more = _missing_rows(x_RK, *weight_KN.shape), max(0, FEWEST_OUTPUTS - weight_KN.shape[1])
    if (not rows and not more) or _is_free(x_RK):
        return torch.mm(x_RK, weight_KN, out=out)
    padded = torch.mm(F.pad(x_RK, (0, 0, 0, rows)), F.pad(weight_KN, (0, more)))
    result = padded[: len(x_RK), : weight_KN.shape[1]]
    return result if out is None else out.copy_(result)


def add_product_(sum_RN: Tensor, x_RK: Tensor, weight_KN: Tensor) -> None:
    """`sum += x @ weight`."""
    if not _missing_rows(x_RK, *weight_KN.shape) or _is_free(x_RK):
        sum_RN.addmm_(x_RK, weight_KN)
    else:
        sum_RN.copy_(added_product(sum_RN, x_RK, weight_KN.t()))


def grouped_product(x_RK: Tensor, weights_LKN: Tensor, ends_L: Tensor) -> Tensor:
    """Rows sorted by matrix times their matrix, [R, N]; those behind the last matrix's are undefined."""
    result = F.grouped_mm(x_RK, weights_LKN, offs=ends_L)
    if _is_free(x_RK):
        return result
    for index, (start, end) in enumerate(itertools.pairwise([0, *ends_L.tolist()])):
        missing = _missing_rows(x_RK[start:end], *weights_LKN.shape[1:])
        if missing and end > start:
            rows = F.pad(x_RK[start:end], (0, 0, 0, missing))
            result[start:end] = torch.mm(rows, weights_LKN[index])[: end - start]
    return result


def _missing_rows(x_RK: Tensor, *sizes: int) -> int:
    """Rows to pad with, for a product of a matrix of these sizes."""
    fewest = FEWEST_ROWS
    if x_RK.dtype != torch.float32:
        fewest = max(fewest, _SMALL // max(1, math.prod(sizes)) + 1)  # a rank may have no ids of the vocabulary
    return max(0, fewest - len(x_RK))


def fewest_tokens(device: torch.device, ranks: int) -> int:
    """Of a stream that so many ranks share, padding included: then no product of its tokens lacks rows."""
    return 0 if _any_kernel(device) else FEWEST_ROWS * ranks


def _is_free(x_RK: Tensor) -> bool:
    """Whether any kernel will do for these rows."""
    return _any_kernel(x_RK.device) or len(x_RK) == 0


def _any_kernel(device: torch.device) -> bool:
    return device.type != "cpu" or torch.is_grad_enabled()
