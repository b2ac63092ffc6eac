"""Noise levels of canvases: how those of a step are spread, and what of the loss depends on them.

A token of a canvas at level t is replaced with probability t, so alpha = 1 - t of the signal is left.

Shapes: M canvases of C tokens, N = M * C positions, V vocabulary.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from nemo_diffgemma.diffusion.noise import ROTATION, keyed_bits, to_uniforms
from nemo_diffgemma.transfer import to_device

STREAM = 1 << 40  # a sample's number modulo this is its place in the stream of examples
BINS = (0.1, 0.3, 0.5, 0.7, 0.9)  # middles of the intervals by which training tells its loss
_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0
_BELOW_ONE = 1.0 - 2.0**-24
_SMALLEST = 1e-12  # level in a denominator


class Shift(NamedTuple):
    """What is added to one logit of each position, after the softcap: to that of `ids_N`, `amounts_N` (float32)."""

    ids_N: Tensor
    amounts_N: Tensor

    def part(self, cut: slice) -> Shift:
        """That of some positions."""
        return Shift(self.ids_N[cut], self.amounts_N[cut])


def spread(uniforms_M: Tensor, samples_M: Tensor, ranks_M: Tensor, batch: int, seed: int) -> Tensor:
    """Uniforms of a step's canvases that leave no gap: of the first ones of `batch` examples, one lies in each of as
    many equal intervals.

    Each example has the interval of its place in the batch, in which `uniforms_M` chooses; all are rotated by a number
    of the step, and canvas `ranks_M` of an example further by the golden ratio (Weyl's sequence). Each alone is still
    uniform in [0, 1). MDLM (arXiv 2406.07524) spreads its levels so. A function of (seed, sample, canvas), whatever
    the layout.
    """
    index_M = samples_M % STREAM
    rotations_M = to_uniforms(keyed_bits(seed, index_M // batch, ROTATION)).double()
    places_M = (index_M % batch + uniforms_M.double()) / batch
    return (places_M + rotations_M + ranks_M * _GOLDEN).remainder(1.0).float().clamp_max(_BELOW_ONE)


def leave_one_out_shift(noised_MC: Tensor, levels_M: Tensor, vocab_size: int) -> Shift:
    """What turns logits of the leave-one-out posterior into those of the denoiser.

    The posterior of a token without its own noisy observation, times the probability of that observation, is the
    posterior with it: log(1 + V alpha / (1 - alpha)) more for the observed id, as the uniform kernel keeps a token with
    probability alpha (Gourevitch et al., arXiv 2605.22765; TRL's `mean_loo`, Megatron-Bridge's `loo-ce`).
    """
    levels_M = levels_M.double()
    amounts_M = torch.log1p(vocab_size * (1.0 - levels_M) / levels_M.clamp_min(_SMALLEST)).float()
    amounts_M1 = to_device(amounts_M[:, None], noised_MC.device)
    return Shift(noised_MC.flatten(), amounts_M1.expand(noised_MC.shape).flatten())


def reciprocal_weights(levels_M: Tensor, limit: float) -> Tensor:
    """Weight of a canvas by its level: -alpha' / alpha = 1 / (1 - t), at most `limit`, [M] float64.

    MD4's weight of masked diffusion (arXiv 2406.04329), which Megatron-Bridge offers as `reweighted-ce`.
    """
    return (1.0 - levels_M.double()).clamp_min(_SMALLEST).reciprocal().clamp_max(limit)


def sums_by_level(levels_M: Tensor, losses_N: Tensor, correct_N: Tensor) -> Tensor:
    """For each interval of levels: sum over its tokens of losses and of correct ones, and their number, [3, bins].

    float64, on the device of `losses_N`; `levels_M` is on the host.
    """
    bins_M = (levels_M * len(BINS)).long().clamp_max(len(BINS) - 1)
    is_in_MB = to_device(torch.nn.functional.one_hot(bins_M, len(BINS)).double(), losses_N.device)
    values_3M = torch.stack([losses_N.double(), correct_N.double(), torch.ones_like(losses_N, dtype=torch.double)])
    return (values_3M.view(3, len(levels_M), -1).sum(2)[:, :, None] * is_in_MB).sum(1)
