"""Processes that build, check or run one bundle together, as srun or torchrun started them; or one process alone.

team = Team.of_processes()
with team.all_or_none():              # ends for all as soon as it fails for one
    for rank in team.share_of(range(8)): ...
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_diffgemma.parallel import agreement, launcher

_PATIENCE = timedelta(hours=12)  # one process traces while the others wait


def own_device() -> int:
    """CUDA device of this process: LOCAL_RANK, or 0 where fewer GPUs are visible (each task was given its own)."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    return local if local < torch.cuda.device_count() else 0


def tensors_of_rank_zero(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rank 0's tensors, in one exchange: float64 holds float32 numbers, flags and token ids exactly."""
    packed = torch.cat([tensor.flatten().double() for tensor in tensors.values()])
    dist.broadcast(packed, 0)
    parts = packed.split([tensor.numel() for tensor in tensors.values()])
    return {name: p.view(t.shape).to(t.dtype) for (name, t), p in zip(tensors.items(), parts, strict=True)}


class Team:
    """This process among `size` processes."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self.is_rank_zero = rank == 0

    @classmethod
    def of_processes(cls) -> Team:
        """From torchrun's variables, where they are."""
        size = int(os.environ.get("WORLD_SIZE", 1))
        if size == 1:
            return cls()
        if not dist.is_initialized():
            if torch.cuda.is_available():
                torch.cuda.set_device(own_device())  # before NCCL takes device 0 for all
            # a sharded checkpoint is converted on GPUs where there are any
            launcher.join("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", _PATIENCE)
        return cls(dist.get_rank(), size)

    def share_of(self, ranks: Sequence[int]) -> Sequence[int]:
        """The ranks of a layout that this process builds."""
        return ranks[self.rank :: self.size]

    def gather[T](self, value: T) -> list[T]:
        """The value of each process."""
        return agreement.gather(value) if self.size > 1 else [value]

    def from_rank_zero[T](self, value: T) -> T:
        """The value that rank 0 gives."""
        return agreement.from_rank_zero(value) if self.size > 1 else value

    def all_or_none(self) -> AbstractContextManager[None]:
        """Collective block: if it fails in one process, it raises in all."""
        return agreement.all_or_none() if self.size > 1 else nullcontext()


ALONE = Team()
