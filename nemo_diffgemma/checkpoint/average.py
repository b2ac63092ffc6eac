"""The average of weights that a run has kept beside its optimizer's state (`optim.ema`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from nemo_diffgemma.checkpoint import sharded
from nemo_diffgemma.checkpoint.tensor_files import CheckpointError
from nemo_diffgemma.parallel.agreement import all_or_none
from nemo_diffgemma.parallel.sharding import shard_of

PREFIX = "optimizer.ema."
WEIGHTS = ("trained", "ema")  # what a command takes from a checkpoint


def no_average(directory: Path) -> CheckpointError:
    """The error for a checkpoint without one."""
    return CheckpointError(
        f"{directory} has no average of weights: it is no checkpoint of a run with optim.ema above 0; leave "
        "weights=ema out"
    )


def fill(network: Any, directory: Path) -> None:
    """Put the average in place of the trained weights. Collective; raises `CheckpointError` on every rank."""
    with all_or_none():
        keys = set(sharded.keys(directory)) if sharded.is_sharded(directory) else set()
        averaged = {name: p for name, p in network.named_parameters() if PREFIX + name in keys}
        if not averaged:
            raise no_average(directory)
    sharded.verify(directory, kinds=[sharded.TRAINING])
    state = {}
    for name, parameter in averaged.items():
        empty = torch.empty(parameter.shape, dtype=torch.float32)
        empty.shard = shard_of(parameter)  # type: ignore[attr-defined]
        state[PREFIX + name] = sharded.sharded_tensor(PREFIX + name, empty, parameter)
    sharded.restore(state, directory)
    with torch.no_grad():
        for name, parameter in averaged.items():
            parameter.copy_(state[PREFIX + name].data)
