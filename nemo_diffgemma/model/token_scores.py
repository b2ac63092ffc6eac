"""Log-probabilities of chosen tokens, and the largest at their places: one more sweep over a cut vocabulary.

Only positions whose request asks for them are swept, so what they cost falls on nobody else. Nothing is tempered. Of
equal logits the smallest id comes first, in every layout and on every device: logits and ids are ordered as one int64.

Shapes: N positions, H hidden, v ids of this rank, V ids in all, c ids of a chunk, T of the largest kept.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_diffgemma.model.vocabulary import MASKED_LOGIT, capped_logits, chunk_of

_NO_KEY = torch.iinfo(torch.int64).min


@torch.no_grad()
def token_scores(
    hidden_NH: Tensor, ids_N: Tensor, weight: Tensor, shard: Any, softcap: float, top: int, chunk: int | None = None
) -> Tensor:
    """Log-probability of `ids_N`, then the T largest at their places, then their ids: [N, 1 + 2 T] float64.

    T is `top`, or V where that is less. The distribution is softmax(softcap * tanh(hidden @ weight.T /
    softcap)); `weight` [v + padding, H] and `shard` are as in `vocabulary`. Equal on every tensor-parallel rank.
    """
    sweep = _Sweep(ids_N, min(top, shard.vocab_size))
    chunk = chunk or chunk_of(hidden_NH)
    for start in range(0, shard.size, chunk):
        rows = weight[start : min(start + chunk, shard.size)]
        sweep.add(shard.first_id + start, capped_logits(hidden_NH, rows, softcap, softcap))
    numbers_N3, keys_NT = sweep.numbers(), sweep.keys_NT
    if shard.parallel:
        packed = torch.cat([numbers_N3.view(torch.int64), keys_NT], dim=1)
        parts = packed.new_empty(shard.group.size() * len(packed), packed.shape[1])
        dist.all_gather_into_tensor(parts, packed, group=shard.group)
        parts = parts.unflatten(0, (-1, len(packed)))
        numbers_N3 = _of_all(parts[..., :3].contiguous().view(torch.float64))
        keys_NT = parts[..., 3:].transpose(0, 1).flatten(1).topk(keys_NT.shape[1]).values
    maximum_N1, mass_N1, own_N1 = numbers_N3.split(1, dim=1)
    log_sum_exp_N1 = maximum_N1 + mass_N1.log()
    top_NT, top_ids_NT = _logits_and_ids(keys_NT)
    return torch.cat([own_N1 - log_sum_exp_N1, top_NT - log_sum_exp_N1, top_ids_NT.double()], dim=1)


class _Sweep:
    """What is kept of the chunks so far: largest logit, mass relative to it, logits of the ids, and the T largest."""

    def __init__(self, ids_N: Tensor, top: int) -> None:
        self._ids_N1 = ids_N[:, None]
        self._mass_N1 = torch.zeros(self._ids_N1.shape, dtype=torch.float32, device=ids_N.device)
        self._maximum_N1 = torch.full_like(self._mass_N1, MASKED_LOGIT)
        self._own_N1 = torch.full_like(self._mass_N1, MASKED_LOGIT)
        self.keys_NT = torch.full((len(ids_N), top), _NO_KEY, dtype=torch.int64, device=ids_N.device)

    def add(self, first_id: int, z_Nc: Tensor) -> None:
        """Take the logits of the ids from `first_id` on."""
        place_N1 = self._ids_N1 - first_id
        is_here_N1 = (place_N1 >= 0) & (place_N1 < z_Nc.shape[1])
        own_N1 = z_Nc.gather(1, place_N1.clamp(0, z_Nc.shape[1] - 1))
        self._own_N1 = torch.where(is_here_N1, own_N1, self._own_N1)
        keys_Nc = _keys(z_Nc, first_id)
        keys_NT = keys_Nc.topk(min(self.keys_NT.shape[1], z_Nc.shape[1])).values
        self.keys_NT = torch.cat([self.keys_NT, keys_NT], dim=1).topk(self.keys_NT.shape[1]).values
        maximum_N1 = torch.maximum(self._maximum_N1, z_Nc.amax(1, keepdim=True))
        mass_N1 = z_Nc.sub_(maximum_N1).exp_().sum(1, keepdim=True)
        self._mass_N1 = self._mass_N1 * (self._maximum_N1 - maximum_N1).exp() + mass_N1
        self._maximum_N1 = maximum_N1

    def numbers(self) -> Tensor:
        """Maximum, mass and own logit, [N, 3] float64."""
        return torch.cat([self._maximum_N1, self._mass_N1, self._own_N1], dim=1).double()


def _of_all(parts_RN3: Tensor) -> Tensor:
    """The numbers of all ranks as if one had swept all ids, [N, 3]."""
    maximum_RN1, mass_RN1, own_RN1 = parts_RN3.split(1, dim=2)
    maximum_N1 = maximum_RN1.amax(0)
    mass_N1 = (mass_RN1 * (maximum_RN1 - maximum_N1).exp()).sum(0)
    return torch.cat([maximum_N1, mass_N1, own_RN1.amax(0)], dim=1)


def _keys(z_Nc: Tensor, first_id: int) -> Tensor:
    """Logits and their ids as int64 that are ordered by logit, and among equal ones from the largest id down."""
    bits = (z_Nc + 0.0).view(torch.int32)  # there is one zero
    rising = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    ids = torch.arange(first_id, first_id + z_Nc.shape[1], device=z_Nc.device)
    return (rising.long() << 32) + (0xFFFFFFFF - ids)


def _logits_and_ids(keys: Tensor) -> tuple[Tensor, Tensor]:
    """What `_keys` was made of; logits in float64."""
    rising = (keys >> 32).int()
    bits = rising ^ ((rising >> 31) & 0x7FFFFFFF)
    return bits.view(torch.float32).double(), 0xFFFFFFFF - (keys & 0xFFFFFFFF)
