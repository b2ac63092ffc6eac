"""Initial weights as a function of (seed, tensor name, expert): the same in every layout."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from nemo_diffgemma.diffusion.seeds import check_seed
from nemo_diffgemma.model.network import Network
from nemo_diffgemma.parallel.sharding import shard_of


@torch.no_grad()
def initialise(network: Network, seed: int) -> None:
    """Matrices from N(0, initializer_range), everything else ones. Each rank draws the full matrix and keeps its part.

    Expert matrices are drawn expert by expert, so a rank draws only those that it holds.
    Raises `UserError` for a seed of more than 64 bits.
    """
    check_seed(seed)
    std = network.model_config.initializer_range
    for name, tensor in network.named_parameters():
        if tensor.ndim == 1:
            tensor.fill_(1.0)
            continue
        shard = shard_of(tensor)
        spans = shard.slices(tuple(tensor.shape))
        full = shard.full_shape(tuple(tensor.shape))
        if shard.expert:
            for local, expert in enumerate(range(spans[0].start, spans[0].stop)):
                tensor[local] = _draw(f"{seed}/{name}/{expert}", full[1:], std)[spans[1:]]
        else:
            tensor.copy_(_draw(f"{seed}/{name}", full, std)[spans])
    for buffer in network.buffers():
        buffer.fill_(1.0)


def _draw(key: str, shape: tuple[int, ...], std: float) -> Tensor:
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std
