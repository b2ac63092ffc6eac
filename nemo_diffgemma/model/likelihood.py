"""What a bound on likelihood needs of a vocabulary that is cut: three numbers a position, some positions at a time.

Shapes: N positions, n of a part, H hidden, v ids of this rank. No gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_diffgemma.diffusion.levels import Shift
from nemo_diffgemma.model.loss import positions_at_once, probabilities_and_losses, probability_of, shifted_logits
from nemo_diffgemma.model.vocabulary import VocabularyShard


class Mixture(NamedTuple):
    """Of the ratio 1 + k p(y), for a factor k of each position: its logarithm at two ids, and the sum over all ids.

    [N] float32 each, equal on every tensor-parallel rank.
    """

    log_noised_N: Tensor
    log_clean_N: Tensor
    log_sum_N: Tensor


@torch.no_grad()
def mixture(
    hidden_NH: Tensor,
    weight: Tensor,
    noised_N: Tensor,
    clean_N: Tensor,
    factors_N: Tensor,
    shard: VocabularyShard,
    softcap: float,
    shift: Shift | None = None,
) -> Mixture:
    """`Mixture` of the softmax of softcapped and shifted logits, with the factors `factors_N` [N] float32."""
    parts, step = [], positions_at_once(weight)
    for start in range(0, hidden_NH.shape[0], step):
        cut = slice(start, start + step)
        part = None if shift is None else shift.part(cut)
        z_nv = shifted_logits(hidden_NH[cut], weight[: shard.size], softcap, part, shard)
        p_nv, _, _ = probabilities_and_losses(z_nv, clean_N[cut], shard)
        picked = [probability_of(p_nv, ids_N[cut], shard) for ids_N in (noised_N, clean_N)]
        ratios_3n = torch.stack([*picked, p_nv.mul_(factors_N[cut, None]).log1p_().sum(1)])
        if shard.parallel:
            dist.all_reduce(ratios_3n, group=shard.group)
        ratios_3n[:2] = ratios_3n[:2].mul_(factors_N[cut]).log1p_()
        parts.append(ratios_3n)
    return Mixture(*torch.cat(parts, dim=1))
