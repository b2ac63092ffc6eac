"""RMS normalisation as Gemma 4 has it: computed in float32, multiplied by `weight` (not 1 + weight), cast back."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last axis, in float32, returned in the dtype of `x`.

    torch's own: one kernel on CUDA, which keeps `x` and one number a row for the backward pass; elsewhere the same
    steps as transformers, bit for bit. Either way the weight is multiplied in float32, before the one rounding.
    """
    return F.rms_norm(x, x.shape[-1:], weight, eps)


class RMSNorm(nn.Module):
    """RMS norm with a weight that every rank holds.

    Each tensor-parallel rank sees other tokens (sequence parallelism) or other heads, so gradients must be summed over
    the group: Megatron does that for parameters marked `sequence_parallel`.
    """

    def __init__(self, width: int, eps: float, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width, dtype=dtype, device=device))
        self.weight.sequence_parallel = True  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)
