"""Which part of a full tensor a rank holds. One description serves loading, saving, initialisation and checkpoints.

A dense parameter is whole on every rank or cut along one axis over tensor parallelism; an expert parameter is cut along
its expert axis and perhaps along its width. `shard_of(parameter)` is what the modules of `model/` declared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor


class Cut(NamedTuple):
    """Axis `axis` of the full tensor is cut into `parts` equal parts, and this rank holds part `part`."""

    axis: int
    part: int
    parts: int


@dataclass(frozen=True)
class Shard:
    """The cuts of one tensor. `expert`: its replicas are those of the expert groups, not of the dense ones."""

    cuts: tuple[Cut, ...] = ()
    expert: bool = False

    def full_shape(self, local: tuple[int, ...]) -> tuple[int, ...]:
        shape = list(local)
        for cut in self.cuts:
            shape[cut.axis] *= cut.parts
        return tuple(shape)

    def slices(self, local: tuple[int, ...]) -> tuple[slice, ...]:
        """Where the local tensor lies in the full one."""
        spans = [slice(0, size) for size in local]
        for axis, part, _ in self.cuts:
            spans[axis] = slice(part * local[axis], (part + 1) * local[axis])
        return tuple(spans)


def declare(tensor: Tensor, shard: Shard) -> None:
    """Say how `tensor` is cut."""
    tensor.shard = shard  # type: ignore[attr-defined]


def shard_of(tensor: Tensor) -> Shard:
    """How `tensor` is cut; whole unless declared otherwise."""
    return getattr(tensor, "shard", Shard())


def over_tensor(groups: ProcessGroupCollection, axis: int) -> Shard:
    """Cut along `axis` over tensor parallelism."""
    return Shard((Cut(axis, groups.tp.rank(), groups.tp.size()),))


def over_experts(groups: ProcessGroupCollection, width_axis: int) -> Shard:
    """Cut along axis 0 over expert parallelism and along `width_axis` over expert-tensor parallelism."""
    return Shard(
        (
            Cut(0, groups.ep.rank(), groups.ep.size()),
            Cut(width_axis, groups.expt_tp.rank(), groups.expt_tp.size()),
        ),
        expert=True,
    )
