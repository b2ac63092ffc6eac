"""GELU in its tanh form, whose bits do not depend on where an element stands.

torch's kernel for CPUs computes elements that fill no whole vector by another tanh: the last of a row, or those at the
end of a thread's share. A token's activation would then depend on how many other tokens are in its pass.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_VECTORS = 64  # elements that the kernel takes at a time, or a multiple of it
_ROWS = 256  # at a time, in a buffer that stays in the processor's cache
_CUBIC, _SCALE = 0.044715, (2 / torch.pi) ** 0.5


def gelu(x: Tensor, has_gradient: bool) -> Tensor:
    """`F.gelu(x, approximate="tanh")` of [T, W]. Without gradient an element gets the same in any tensor."""
    if x.device.type != "cpu" or has_gradient:
        return F.gelu(x, approximate="tanh")
    if torch.get_num_threads() > 1:
        return _by_parts(x)
    rows, width = x.shape
    if width % _VECTORS == 0 and x.is_contiguous():
        return F.gelu(x, approximate="tanh")
    active = x.new_empty(rows, width)
    some = x.new_zeros(min(rows, _ROWS) + -(-_VECTORS // width), width)  # the last elements are nobody's
    for part, of_part in zip(x.split(_ROWS), active.split(_ROWS), strict=True):
        some[: len(part)] = part
        of_part.copy_(F.gelu(some, approximate="tanh")[: len(part)])
    return active


def _by_parts(x: Tensor) -> Tensor:
    """From operations that compute all elements alike."""
    wide = x.float()
    inner = (wide * wide).mul_(_CUBIC).add_(1.0).mul_(wide).mul_(_SCALE)
    return inner.tanh_().add_(1.0).mul_(wide).mul_(0.5).to(x.dtype)
