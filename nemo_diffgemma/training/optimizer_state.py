"""Optimizer state as tensors shaped like the parameters, so that it saves and loads like weights, in any layout.

Megatron's own sharded optimizer state keeps one chain of optimizers for dense and one for expert parameters in a file,
which an EP1 layout cannot read back; its default format is refused by its own writer (0.19.2), and it restores torch's
AdamW with one step counter for all parameters. AdamW's state has the shape of its parameter: kinds `exp_avg`,
`exp_avg_sq` and, for bfloat16 weights, `main` (the float32 weights), each under `optimizer.<kind>.<parameter>`.

The distributed optimizer holds a flat range of each parameter on each replica. Saving joins the ranges of one parameter
after the other on one of its replicas, a different one each time, so each writes and holds its share.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor, nn

from nemo_diffgemma.checkpoint import sharded
from nemo_diffgemma.checkpoint.sharded_writer import copy_to_host
from nemo_diffgemma.checkpoint.tensor_files import CheckpointError
from nemo_diffgemma.parallel.agreement import all_or_none
from nemo_diffgemma.parallel.groups import process_groups
from nemo_diffgemma.parallel.sharding import shard_of
from nemo_diffgemma.training import average
from nemo_diffgemma.training.average import EMA
from nemo_diffgemma.training.update import is_torchs, parts_of

PREFIX = "optimizer."
MOMENTS = ("exp_avg", "exp_avg_sq")


class _Held(NamedTuple):
    """What this rank's optimizer keeps of a parameter: float32 main weights and state of the flat range `span`."""

    main: Tensor
    state: dict[str, Any]
    span: slice


def _held(optimizer: MegatronOptimizer) -> dict[Tensor, _Held]:
    held = {}
    for part in parts_of(optimizer):
        state = part.optimizer.state
        if isinstance(part, DistributedOptimizer):
            for parameter, (group, order) in part.model_param_group_index_map.items():
                main = part.optimizer.param_groups[group]["params"][order]
                span = part._get_model_param_range_map(parameter)["param"]
                held[parameter] = _Held(main, state[main], slice(span.start, span.end))
        else:
            low = [parameter for group in getattr(part, "float16_groups", []) for parameter in group]
            of_main = {id(parameter.main_param): parameter for parameter in low}
            for main in (main for group in part.optimizer.param_groups for main in group["params"]):
                held[of_main.get(id(main), main)] = _Held(main, state[main], slice(0, main.numel()))
    return held


def _kept(network: nn.Module, optimizer: MegatronOptimizer) -> Iterator[tuple[str, list[tuple[str, nn.Parameter]]]]:
    """Each kind of state, and the parameters that have it: those that are trained; float32 ones are their own main."""
    trained = [(name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad]
    for kind in (*MOMENTS, EMA) if keeps_average(optimizer) else MOMENTS:
        yield kind, trained
    low = [(name, parameter) for name, parameter in trained if parameter.dtype != torch.float32]
    if low:
        yield "main", low


def keep_average(optimizer: MegatronOptimizer, wanted: bool) -> None:
    """Whether an average of the weights is part of the state (average.py); on every rank, whatever it holds."""
    optimizer.keeps_average = wanted


def keeps_average(optimizer: MegatronOptimizer) -> bool:
    return getattr(optimizer, "keeps_average", False)


# -- saving ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def state_tensors(network: nn.Module, optimizer: MegatronOptimizer) -> dict[str, ShardedTensor]:
    """Copies of this rank's share of the optimizer's state, to be saved beside the weights. Collective."""
    prime(optimizer)
    held, tensors = _held(optimizer), {}
    distributed = any(isinstance(part, DistributedOptimizer) for part in parts_of(optimizer))
    for kind, parameters in _kept(network, optimizer):
        for index, (name, parameter) in enumerate(parameters):
            key = f"{PREFIX}{kind}.{name}"
            mine = held.get(parameter)
            part = None if mine is None else (mine.main if kind == "main" else mine.state[kind])
            if not distributed:
                assert part is not None
                tensors[key] = sharded.sharded_tensor(key, copy_to_host(part), parameter)
                continue
            joined = _join(parameter, part, mine, index)
            if joined is not None:
                tensors[key] = sharded.sharded_tensor(key, joined, parameter, replica=0)
    return tensors


def _join(parameter: Tensor, part: Tensor | None, mine: _Held | None, index: int) -> Tensor | None:
    """The ranges of all replicas as one tensor, on replica `index` (modulo their number); None on the others."""
    group = _replicas(parameter)
    flat = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
    if part is not None and mine is not None:
        flat[mine.span] = part.float().flatten()
    keeper = index % group.size()
    if group.size() > 1:  # ranges do not overlap: adding zeros joins them exactly
        dist.reduce(flat, dst=dist.get_global_rank(group, keeper), group=group)
    return copy_to_host(flat.view(parameter.shape)) if group.rank() == keeper else None


def _replicas(parameter: Tensor) -> dist.ProcessGroup:
    """The ranks over which the distributed optimizer cuts this parameter: Megatron reads `allreduce`."""
    groups = process_groups()
    return groups.dp_cp if getattr(parameter, "allreduce", True) else groups.expt_dp


def steps_taken(optimizer: MegatronOptimizer) -> int:
    """Updates that AdamW has counted: in each parameter's state (torch) or in the group (fused)."""
    for part in parts_of(optimizer):
        for group in part.optimizer.param_groups:
            for main in group["params"]:
                return int(part.optimizer.state[main].get("step", group.get("step", 0)))
    return 0


# -- loading ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def load_state(network: nn.Module, optimizer: MegatronOptimizer, directory: Path, steps: int) -> None:
    """Fill the optimizer from a checkpoint of any layout. Collective; raises `CheckpointError` on every rank."""
    with all_or_none():
        _check_keys(network, optimizer, directory)
    prime(optimizer)
    held = _held(optimizer)
    for kind, parameters in _kept(network, optimizer):  # one kind at a time: whole parameters are held while it is read
        wanted = dict(_buffers(parameters, kind))
        sharded.read_tensors(wanted, directory)
        for name, parameter in parameters:
            mine = held.get(parameter)
            if mine is not None:
                target = mine.main if kind == "main" else mine.state[kind]
                whole = wanted[f"{PREFIX}{kind}.{name}"].data
                target.copy_(whole.flatten()[mine.span].view(target.shape))
    _set_steps(optimizer, steps)


def _check_keys(network: nn.Module, optimizer: MegatronOptimizer, directory: Path) -> None:
    keys = sharded.keys(directory)
    for kind, parameters in _kept(network, optimizer):
        missing = [name for name, _ in parameters if f"{PREFIX}{kind}.{name}" not in keys]
        if missing:
            raise CheckpointError(
                f"{directory} has no optimizer state `{kind}` for {len(missing)} parameters, first {missing[0]}: it "
                "was saved without, with another model.dtype, or when others were trained; start a new run from its "
                f"weights with model.checkpoint={directory}"
            )


def _buffers(parameters: list[tuple[str, nn.Parameter]], kind: str) -> Iterator[tuple[str, ShardedTensor]]:
    for name, parameter in parameters:
        key = f"{PREFIX}{kind}.{name}"
        empty = torch.empty(parameter.shape, dtype=torch.float32)
        empty.shard = shard_of(parameter)  # type: ignore[attr-defined]
        yield key, sharded.sharded_tensor(key, empty, parameter)


def prime(optimizer: MegatronOptimizer) -> None:
    """AdamW makes its state at its first update; make it now where there was none."""
    for part in parts_of(optimizer):
        for group in part.optimizer.param_groups:
            for main in group["params"]:
                state = part.optimizer.state[main]
                for kind in MOMENTS:
                    if kind not in state:
                        state[kind] = torch.zeros_like(main)
                if is_torchs(part) and "step" not in state:
                    state["step"] = torch.zeros((), device=main.device)  # where the fused kernel wants it
    if keeps_average(optimizer):
        average.start(optimizer)


def _set_steps(optimizer: MegatronOptimizer, steps: int) -> None:
    for part in parts_of(optimizer):
        for group in part.optimizer.param_groups:
            if not is_torchs(part):
                group["step"] = steps
            for main in group["params"]:
                if "step" in part.optimizer.state[main]:  # a tensor of its own: AdamW increments it in place
                    part.optimizer.state[main]["step"] = torch.tensor(float(steps), device=main.device)
