"""The entropy-bound sampler: which tokens of a denoised canvas to keep, at what temperature, and when to stop.

Each step samples a candidate for every position, keeps those of the most certain positions and fills the others with
fresh noise. Nothing is ever frozen within a canvas: acceptance is decided anew at every step.

Shapes: B rows, C canvas positions. Entropies are in nats and of the tempered distribution.
Rule: Ben-Hamu et al., arXiv 2505.24857; as in transformers' generation_diffusion_gemma.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_diffgemma.diffusion.sampler_config import SamplerConfig


def accept(entropy_BC: Tensor, bound: float | Tensor) -> Tensor:
    """Mask of accepted positions, [B, C] bool; at least one a row.

    Positions are taken from the most certain upwards while the entropies of those before them sum to at most `bound`.
    """
    ranked_BC, order_BC = entropy_BC.sort(dim=-1)
    before_BC = ranked_BC.cumsum(-1) - ranked_BC  # entropy already accepted when this one is considered
    return torch.zeros_like(order_BC, dtype=torch.bool).scatter(-1, order_BC, before_BC <= bound)


def choose_chunk(mass_NK: Tensor, uniforms_N: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse CDF, first half: the chunk of ids in which the cumulative mass exceeds the uniform's share of it.

    `mass_NK` [N, K] is the unnormalised mass of K chunks of the vocabulary, in order. Returns the chunk and what is
    left of the target inside it, [N, 1] each. Two levels, because one running sum over a whole vocabulary loses digits.
    """
    cumulative_NK = mass_NK.cumsum(1)
    target_N1 = uniforms_N.float()[:, None] * cumulative_NK[:, -1:]
    # rounding may leave the target at the very end: the last chunk, and in it the last id, that has mass
    chunk_N1 = (cumulative_NK <= target_N1).sum(1, keepdim=True)
    chunk_N1 = torch.minimum(chunk_N1, _last_positive(mass_NK))
    return chunk_N1, target_N1 - (cumulative_NK.gather(1, chunk_N1) - mass_NK.gather(1, chunk_N1))


def choose_inside(mass_Nc: Tensor, rest_N1: Tensor) -> Tensor:
    """Inverse CDF, second half: the first place in the chunk where the cumulative mass exceeds the rest, [N, 1]."""
    inside_N1 = (mass_Nc.cumsum(1) <= rest_N1).sum(1, keepdim=True)
    return torch.minimum(inside_N1, _last_positive(mass_Nc))


def _last_positive(mass: Tensor) -> Tensor:
    """Index of the last positive entry of each row, [N, 1]."""
    places = torch.arange(mass.shape[1], device=mass.device)
    return torch.where(mass > 0, places, 0).amax(1, keepdim=True)


class StableAndConfident:
    """Stopping rule of one canvas: the arg-max canvas stayed the same and the mean entropy is low."""

    def __init__(self, config: SamplerConfig) -> None:
        self._config = config
        self._history: list[Tensor] = []

    def __call__(self, argmax_BC: Tensor, entropy_BC: Tensor) -> Tensor:
        """Rows that may stop after this step, [B] bool. Call once a step."""
        confident_B = entropy_BC.mean(-1) < self._config.confidence_threshold
        wanted = self._config.stability_threshold
        if wanted == 0:
            return confident_B
        stable_B = torch.full_like(confident_B, len(self._history) == wanted)
        for earlier_BC in self._history:
            stable_B &= (earlier_BC == argmax_BC).all(-1)
        self._history = [*self._history, argmax_BC][-wanted:]
        return stable_B & confident_B


def is_eos(canvas_BC: Tensor, eos_ids: tuple[int, ...]) -> Tensor:
    """Which tokens end a sequence, [B, C] bool; ids are compared one by one, so none is copied to a device."""
    is_eos_BC = torch.zeros_like(canvas_BC, dtype=torch.bool)
    for eos_id in eos_ids:
        is_eos_BC = is_eos_BC | (canvas_BC == eos_id)
    return is_eos_BC


def pad_after_eos(canvas_BC: Tensor, eos_ids: tuple[int, ...], pad_token_id: int) -> Tensor:
    """Replace everything after the first end-of-sequence id of a row; the id itself stays."""
    return pad_after(canvas_BC, is_eos(canvas_BC, eos_ids), pad_token_id)


def pad_after(canvas_BC: Tensor, ends_BC: Tensor, pad_token_id: int) -> Tensor:
    """Replace everything after the first token of a row that ends it."""
    after_BC = (ends_BC.cumsum(-1) - ends_BC.long()) > 0
    return canvas_BC.masked_fill(after_BC, pad_token_id)
