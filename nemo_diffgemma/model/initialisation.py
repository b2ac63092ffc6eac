"""Initial weights as a function of (seed, tensor name, expert): the same in every layout."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nemo_diffgemma.diffusion.seeds import check_seed, seed_of
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
        fill(tensor, f"{seed}/{name}", lambda shape, generator: torch.randn(shape, generator=generator) * std)
    for buffer in network.buffers():
        buffer.fill_(1.0)


def fill(tensor: Tensor, key: str, draw: Callable[[tuple[int, ...], torch.Generator], Tensor]) -> None:
    """This rank's part of what `draw(shape, generator)` gives for the whole tensor, or for each expert that it holds.

    A function of the key and, where `tensor` is cut over experts, of the expert.
    """
    shard, local = shard_of(tensor), tuple(tensor.shape)
    spans, full = shard.slices(local), shard.full_shape(local)

    def drawn(key: str, shape: tuple[int, ...]) -> Tensor:
        return draw(shape, torch.Generator().manual_seed(seed_of(key)))

    if shard.expert:
        for index, expert in enumerate(range(spans[0].start, spans[0].stop)):
            tensor[index] = drawn(f"{key}/{expert}", full[1:])[spans[1:]]
    else:
        tensor.copy_(drawn(key, full)[spans])
