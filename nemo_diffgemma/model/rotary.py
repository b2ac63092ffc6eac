"""Rotary position embedding, split-half pairing, angles in float32.

Sliding layers rotate every pair; global layers ("proportional") rotate only the first part of the pairs, with exponents
over the full head width, so the rotated dimensions are [0, n) and [D/2, D/2 + n) (transformers' modeling_rope_utils).
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_diffgemma.config import GLOBAL, ModelConfig


def inverse_frequencies(config: ModelConfig, kind: str, device: torch.device) -> Tensor:
    """[D/2] float32; zero where a pair is not rotated."""
    width = config.global_head_dim if kind == GLOBAL else config.head_dim
    theta = config.global_rope_theta if kind == GLOBAL else config.rope_theta
    rotated = int(config.global_partial_rotary_factor * width // 2) if kind == GLOBAL else width // 2
    exponents = torch.arange(0, 2 * rotated, 2, dtype=torch.float32, device=device) / width
    frequencies = torch.zeros(width // 2, dtype=torch.float32, device=device)
    frequencies[:rotated] = 1.0 / theta**exponents
    return frequencies


def cosine_and_sine(positions_T: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Tables [..., T, 1, D] for `rotate`: the sine of the first half is negative, as the rotation has it."""
    angles = positions_T.float()[..., None] * frequencies
    cosine, sine = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat([cosine, cosine], dim=-1)[..., None, :], torch.cat([-sine, sine], dim=-1)[..., None, :]


def rotate(x_TND: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate pairs (i, i + D/2) of every head."""
    cosine, sine = tables
    return torch.addcmul(x_TND * cosine, x_TND.roll(x_TND.shape[-1] // 2, dims=-1), sine)
