"""GELU in its tanh form, whose bits do not depend on where an element stands.

torch's kernel for CPUs computes elements that fill no whole vector by another tanh: the last of a row, or those at the
end of a thread's share. A token's activation would then depend on how many other tokens are in its pass.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_VECTORS = 64  # elements that the kernel takes at a time, or a divisor of it
_CUBIC, _SCALE = 0.044715, (2 / torch.pi) ** 0.5


def gelu(x: Tensor, has_gradient: bool) -> Tensor:
    """`F.gelu(x, approximate="tanh")` of [T, W]. Without gradient an element gets the same in any tensor."""
    # rows with a gap between them are computed one by one, and so all alike
    alike = torch.get_num_threads() == 1 and (x.shape[1] % _VECTORS == 0 or x.stride(0) > x.shape[1])
    if x.device.type != "cpu" or has_gradient or alike:
        return F.gelu(x, approximate="tanh")
    wide = x.float()
    inner = (wide * wide).mul_(_CUBIC).add_(1.0).mul_(wide).mul_(_SCALE)
    return inner.tanh_().add_(1.0).mul_(wide).mul_(0.5).to(x.dtype)
