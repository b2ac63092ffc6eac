"""Processes that build, check or run one bundle together, as srun or torchrun started them; or one process alone.

team = Team.of_processes()
with team.together():                 # ends for all as soon as it fails for one
    for rank in team.share_of(range(8)): ...
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_diffgemma.errors import UserError

_PATIENCE = timedelta(hours=12)  # one process traces while the others wait


class TeamError(UserError):
    """Another process of the team refused what it was asked for; the message is its own."""


class TeamCrash(RuntimeError):
    """Another process of the team failed, and no user's mistake is to blame; the message is its own."""


def own_device() -> int:
    """CUDA device of this process: LOCAL_RANK, or 0 where fewer GPUs are visible (each task was given its own)."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    return local if local < torch.cuda.device_count() else 0


def agree(flag: bool, device: torch.device) -> bool:
    """Whether `flag` holds in every process; all of them call this."""
    vote = torch.tensor(int(flag), device=device)
    dist.all_reduce(vote, op=dist.ReduceOp.MIN)
    return bool(vote)


def of_first(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The first process's tensors, in one exchange: float64 holds float32 numbers, flags and token ids exactly."""
    packed = torch.cat([tensor.flatten().double() for tensor in tensors.values()])
    dist.broadcast(packed, 0)
    parts = packed.split([tensor.numel() for tensor in tensors.values()])
    return {name: p.view(t.shape).to(t.dtype) for (name, t), p in zip(tensors.items(), parts, strict=True)}


class Team:
    """This process among `size` processes."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self.first = rank == 0

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
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=_PATIENCE)
        return cls(dist.get_rank(), size)

    def share_of(self, ranks: Sequence[int]) -> Sequence[int]:
        """The ranks of a layout that this process builds."""
        return ranks[self.rank :: self.size]

    def gather(self, value: Any) -> list[Any]:
        """What each process gives."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def of_first(self, value: Any) -> Any:
        """What the first process gives."""
        return self.gather(value)[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """A part of the work that all do; an error of one is raised by all."""
        error: Exception | None = None
        try:
            yield
        except Exception as found:
            error = found
        told = self.gather(error and (isinstance(error, ValueError), f"{type(error).__name__}: {error}"))
        if error is not None:
            raise error
        for rank, failure in enumerate(told):
            if failure is not None:
                is_users, text = failure
                raise (TeamError if is_users else TeamCrash)(f"process {rank} stopped: {text}")


ALONE = Team()
