"""RMS normalisation as Gemma 4 has it: computed in float32, multiplied by `weight` (not 1 + weight), cast back."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last axis, in float32, returned in the dtype of `x`."""
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y if weight is None else y * weight.float()).to(x.dtype)


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
