"""All ranks or none: every rank learns of another's error, so that none waits in a collective for one that left.

    with all_or_none():          # a collective block: if it fails in one process, it raises in all
        ...
    path = on_rank_zero(find)    # rank 0 calls `find`; every rank gets its result, or an error of the same kind
    all_ranks(done); any_rank(asked)
    flags = agreed(flags)        # on the device, for which no host waits

Every function here is collective over the default process group, and local where there is none. An error keeps its
kind: what is the user's on one rank is a `UserError` on all, anything else is one on none, since exit code 2 means
"do not start this job again" (slurm/job.sbatch).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_diffgemma.errors import UserError


class OtherRankError(UserError):
    """Another rank refused what the user asked for; the message is its own."""


class OtherRankFailure(RuntimeError):
    """Another rank failed, and no user's mistake is to blame; the message is its own."""


def world_size() -> int:
    """Number of processes; 1 before process groups exist."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_rank_zero() -> bool:
    """Whether this is the process that writes files and standard output."""
    return not dist.is_initialized() or dist.get_rank() == 0


def _agree(error: Exception | None) -> None:
    """Raise on every rank as soon as any rank has an error: its own there, one of the same kind elsewhere."""
    if world_size() == 1:
        if error is not None:
            raise error
        return
    failure = None if error is None else (isinstance(error, UserError), _describe(error))
    failures = gather(failure)
    if error is not None:
        raise known_to_all(error)
    for rank, other in enumerate(failures):
        if other is not None:
            is_user_error, text = other
            raise known_to_all((OtherRankError if is_user_error else OtherRankFailure)(f"rank {rank} stopped: {text}"))


def known_to_all[E: Exception](error: E) -> E:
    """Note on `error` that every rank raises it, or one that quotes it: then rank 0 tells it for all."""
    error._known_to_all = True  # type: ignore[attr-defined]
    return error


def is_known_to_all(error: BaseException) -> bool:
    """Whether every rank raises this error, or one that quotes it."""
    return getattr(error, "_known_to_all", False)


def _describe(error: Exception) -> str:
    """A user's error explains itself; of others the class is half of the message."""
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


@contextmanager
def all_or_none() -> Iterator[None]:
    """A collective block: if it fails in one process, it raises in all."""
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    _agree(error)


def on_rank_zero[T](function: Callable[[], T]) -> T:
    """`function()` of rank 0, on every rank; an error there raises everywhere."""
    result: Any = None
    with all_or_none():
        if is_rank_zero():
            result = function()
    return from_rank_zero(result)


def from_rank_zero[T](value: T) -> T:
    """Rank 0's value, pickled."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather[T](value: T) -> list[T]:
    """The value of every rank, pickled, in the order of ranks."""
    values = [value] * world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def all_ranks(flag: bool, device: torch.device) -> bool:
    """Whether `flag` holds on every rank. `device` is where the backend computes."""
    return _vote(flag, device, dist.ReduceOp.MIN)


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether `flag` holds on some rank."""
    return _vote(flag, device, dist.ReduceOp.MAX)


def agreed(flags: Tensor) -> Tensor:
    """Which of some flags of the device hold on every rank, on that device: no host waits for them."""
    return _reduced(flags, dist.ReduceOp.MIN)


def reported(flags: Tensor) -> Tensor:
    """Which of some flags of the device hold on some rank, on that device: no host waits for them."""
    return _reduced(flags, dist.ReduceOp.MAX)


def _vote(flag: bool, device: torch.device, operation: Any) -> bool:
    return flag if world_size() == 1 else bool(_reduced(torch.tensor(flag, device=device), operation))


def _reduced(flags: Tensor, operation: Any) -> Tensor:
    if world_size() == 1:
        return flags
    votes = flags.int()
    dist.all_reduce(votes, op=operation)
    return votes.bool()
