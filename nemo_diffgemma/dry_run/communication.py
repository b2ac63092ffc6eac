"""Collectives: bytes by axis, and what a rank sends under ring algorithms.

A ring all-reduce of n ranks sends 2 (n - 1) / n times its bytes, every other collective (n - 1) / n times those of its
larger side (all that is gathered, all that is scattered).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_iter

from nemo_diffgemma.dry_run import shadows
from nemo_diffgemma.dry_run.ledger import Ledger

c10d = torch.ops.c10d

AXES = {  # Megatron's description of a group -> name of the axis
    "TENSOR_MODEL_PARALLEL": "tp",
    "EXPERT_MODEL_PARALLEL": "ep",
    "EXPERT_TENSOR_PARALLEL": "etp",
    "EXPERT_TENSOR_AND_MODEL_PARALLEL": "tp_ep",
    "DATA_PARALLEL": "dp",
    "DATA_PARALLEL_GROUP_WITH_CP": "dp",
    "EXPERT_DATA_PARALLEL": "edp",
    "MODEL_PARALLEL": "mp",
    "INTRA_DISTRIBUTED_OPTIMIZER_INSTANCE": "world",
}


def axis_of(group: dist.ProcessGroup) -> str:
    """A short name of the axis that a group spans."""
    description = group.group_desc.removesuffix("_GROUP")
    return AXES.get(description, "world" if description in ("", "default_pg", "undefined") else description.lower())


def group_of(args: Any) -> dist.ProcessGroup:
    """The process group among the arguments of a collective."""
    boxed = next(x for x in args if isinstance(x, torch.ScriptObject) and "ProcessGroup" in str(x._type()))
    return dist.ProcessGroup.unbox(boxed)


def record(ledger: Ledger, func: Any, args: Any) -> None:
    """Count a collective."""
    name, group = func.name().split("::")[1].strip("_"), group_of(args)
    ranks = group.size()
    sides = [sum(x.nbytes for x in tree_iter(arg) if isinstance(x, FakeTensor)) for arg in args]
    size = args[1].nbytes if name.startswith("alltoall_base") else max(sides)
    share = (ranks - 1) / ranks
    wire = size * (2 * share if name.startswith("allreduce") else share)
    axis = axis_of(group)
    ledger.add("calls", name, axis)
    ledger.add("gb", name, axis, number=size / 1e9)
    ledger.add("wire_gb", name, axis, number=wire / 1e9)
    ledger.add("launches", number=0 if ranks == 1 else 1)


def follow(func: Any, args: Any, ranks: int) -> None:
    """Shadows of what is gathered: every rank has what this one has."""
    name = func.name().split("::")[1].strip("_")
    if name.startswith("allgather_base") and (own := shadows.of(args[1])) is not None:
        shadows.give(args[0], torch.cat([own.reshape(-1)] * ranks).view(args[0].shape))
    elif name == "allgather" and (own := shadows.of(args[1][0])) is not None:
        for part in args[0][0]:
            shadows.give(part, own.clone())


def borrowed(args: Any) -> tuple[Any, ...]:
    """Arguments of an all-gather that returns a Work: coalesced collectives have no kernel that runs on shapes."""
    some = next(x for x in tree_iter(args) if isinstance(x, FakeTensor))
    box = next(x for x in args if isinstance(x, torch.ScriptObject) and "ProcessGroup" in str(x._type()))
    return (some, some, box, True, -1)
