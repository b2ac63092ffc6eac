"""Process groups of a layout, over Megatron's parallel state; gloo without CUDA, else nccl.

`initialize` may be called again with another layout in the same processes: the groups are rebuilt, the world stays.
"""

from __future__ import annotations

import gc
import math
import os
import socket
import weakref
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from nemo_diffgemma.parallel import launcher, megatron_cpu
from nemo_diffgemma.parallel.layout import LayoutError, ParallelLayout

_layout: ParallelLayout | None = None
_groups: list[dist.ProcessGroup] = []  # made for _layout; Megatron forgets its groups without destroying them


class Recordings(Protocol):
    """CUDA graphs that communicate in the current groups."""

    def clear(self) -> None:
        """Destroy them."""


_recordings: weakref.WeakSet[Recordings] = weakref.WeakSet()


def initialize(layout: ParallelLayout = ParallelLayout(), *, timeout: timedelta = timedelta(minutes=30)) -> None:  # noqa: B008
    """Make the process groups of `layout`. Without torchrun's variables the world is this one process.

    A rank that waits longer than `timeout` for the others raises an error. Raises `LayoutError` on every rank when
    the world is not a whole number of replicas.
    """
    global _layout, _groups
    megatron_cpu.enable()
    if not dist.is_initialized():
        _start_world(timeout)
    layout.check_world(dist.get_world_size())
    if _layout == layout and parallel_state.model_parallel_is_initialized():
        return
    if _layout is not None:
        _destroy_groups()
        gc.collect()  # models that nobody uses any more hold groups of theirs, in cycles
    before = set(dist.distributed_c10d._world.pg_map)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        create_gloo_process_groups=False,  # nobody uses them: checkpoints of the optimizer are ours
        distributed_timeout_minutes=math.ceil(timeout.total_seconds() / 60),
    )
    _groups = [group for group in dist.distributed_c10d._world.pg_map if group not in before]
    _layout = layout


def end_with_groups(recordings: Recordings) -> None:
    """Have these cleared before groups end: a communicator waits, for ever, for the graphs that were recorded with it.

    (commDestroySync in NCCL's init.cc.)
    """
    _recordings.add(recordings)


def _destroy_groups() -> None:
    """Give back the threads and sockets of the last layout's groups; every rank of the world calls it."""
    for recordings in list(_recordings):
        recordings.clear()
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    for group in _groups:
        if group in dist.distributed_c10d._world.pg_map:  # a few it does destroy
            dist.destroy_process_group(group)
    _groups.clear()


def _start_world(timeout: timedelta) -> None:
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        launcher.join(_backend(), timeout)
        return
    with socket.socket() as probe:  # a free port; the store of a world of one is nobody else's business
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    dist.init_process_group(_backend(), init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1, timeout=timeout)


def _backend() -> str:
    return "nccl" if torch.cuda.is_available() else "gloo"


def shutdown() -> None:
    """Tear down groups and world; safe to call when nothing was started."""
    global _layout
    _destroy_groups()
    if dist.is_initialized():
        dist.destroy_process_group()
    _layout = None


def current_layout() -> ParallelLayout:
    """The layout that `initialize` made; raises `LayoutError` before it."""
    if _layout is None or not parallel_state.model_parallel_is_initialized():
        raise LayoutError("no process groups yet; call nemo_diffgemma.parallel.initialize(ParallelLayout(...)) first")
    return _layout


def process_groups() -> ProcessGroupCollection:
    """Megatron's collection of the current groups (tp, ep, expt_tp, dp, dp_cp, ...)."""
    current_layout()
    return ProcessGroupCollection.use_mpu_process_groups()


def device() -> torch.device:
    """Where this rank computes."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
