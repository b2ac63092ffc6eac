"""The checkpoint that an adapter belongs to, recognised by its weights and not by its path or format.

The fingerprint is a hash of one number a weight: the sum of the bits of its values, rounded to bfloat16. A sum does not
depend on how a weight is cut or laid out, so a Hugging Face directory, its sharded copy and a `.nemo` have the same, in
either dtype, in any layout.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from nemo_diffgemma.checkpoint.names import released_name, text_tensors
from nemo_diffgemma.checkpoint.tensor_files import CheckpointError
from nemo_diffgemma.model.network import Network
from nemo_diffgemma.parallel.groups import process_groups
from nemo_diffgemma.parallel.sharding import shard_of

_PIECE = 1 << 26  # values that are rounded at a time


@torch.no_grad()
def fingerprint(network: Network) -> str:
    """Of the weights without their adapters. Collective."""
    tensors = {released_name(name): tensor for name, tensor in text_tensors(network)}
    sums = torch.stack([bits_of(tensor) if _counts_here(tensor) else _zero(tensor) for tensor in tensors.values()])
    dist.all_reduce(sums)
    return of_sums(dict(zip(tensors, sums.tolist(), strict=True)))


def of_sums(sums: Mapping[str, int]) -> str:
    """The fingerprint from `bits_of` each weight, by released name."""
    text = "".join(f"{name}:{sums[name] % (1 << 64)}\n" for name in sorted(sums))
    return xxhash.xxh3_128(text.encode()).hexdigest()


def bits_of(tensor: Tensor) -> Tensor:
    """Sum of the bits of the values, [] int64, which may wrap."""
    pieces = tensor.detach().flatten().split(_PIECE)
    return torch.stack([piece.to(torch.bfloat16).view(torch.int16).sum(dtype=torch.int64) for piece in pieces]).sum()


def _zero(tensor: Tensor) -> Tensor:
    return torch.zeros((), dtype=torch.int64, device=tensor.device)


def _counts_here(tensor: Tensor) -> bool:
    """Whether this rank is the first of those that hold the same part."""
    shard, groups = shard_of(tensor), process_groups()
    if shard.expert:
        return groups.expt_dp.rank() == 0
    return groups.dp_cp.rank() == 0 and (bool(shard.cuts) or groups.tp.rank() == 0)


def check(expected: str, found: str, adapter: str, base: str) -> None:
    """Raise `CheckpointError` where an adapter was made for other weights. Without a fingerprint nobody can tell."""
    if expected and expected != found:
        raise CheckpointError(
            f"the adapter {adapter} was trained on another base than {base}: the fingerprint of the weights is "
            f"{found}, expected {expected}; give the base that it was trained on, in base_model_name_or_path of its "
            "adapter_config.json or as model.checkpoint"
        )
