"""Lightning over Megatron: processes and groups exist already, gradients are Megatron's, checkpoints are sharded.

`parallel.initialize(layout)` made the world; this strategy neither starts processes nor wraps the model. A checkpoint
is a directory that all ranks write, named as the path without ".ckpt" (NeMo's convention), with the optimizer's state
beside the weights. It is written while steps go on: saving.py. It can be resumed in another layout; in the same one the
run continues bit for bit on a CPU.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.strategies import Strategy
from nemo.utils.app_state import AppState
from torch import Tensor

from nemo_diffgemma.checkpoint import sharded
from nemo_diffgemma.checkpoint.sharded_writer import SaveInProgress, copies
from nemo_diffgemma.lora.opening import resume
from nemo_diffgemma.parallel.agreement import all_ranks, any_rank, from_rank_zero
from nemo_diffgemma.parallel.groups import current_layout, device, process_groups
from nemo_diffgemma.training import optimizer_state
from nemo_diffgemma.training.saving import Saver

# of Lightning's own state; `model` is what DiffusionGemmaModel.on_save_checkpoint puts there
_KEPT = ("epoch", "global_step", "loops", "pytorch-lightning_version", "model")
_COMMON = "lightning"


class MegatronStrategy(Strategy):
    """One process of a world that `parallel.initialize` made."""

    def __init__(self, saver: Saver) -> None:
        super().__init__()
        self.saver = saver
        layout, groups = current_layout(), process_groups()  # raises where there are none
        self.global_rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        rank_zero_only.rank = self.global_rank  # type: ignore[attr-defined]
        state = AppState()  # what NeMo's checkpoint callback and archives ask
        state.world_size, state.global_rank, state.local_rank = self.world_size, self.global_rank, self.local_rank
        state.model_parallel_size = layout.world_size
        state.tensor_model_parallel_size, state.tensor_model_parallel_rank = layout.tensor, groups.tp.rank()
        state.pipeline_model_parallel_size, state.pipeline_model_parallel_rank = layout.pipeline, groups.pp.rank()
        state.expert_model_parallel_size, state.expert_model_parallel_rank = layout.expert, groups.ep.rank()
        state.data_parallel_size, state.data_parallel_rank = groups.dp.size(), groups.dp.rank()

    # -- processes -----------------------------------------------------------------------------------------------

    @property
    def root_device(self) -> torch.device:
        return device()

    @property
    def is_global_zero(self) -> bool:
        return self.global_rank == 0

    def model_to_device(self) -> None:
        """The network is built where it computes."""

    def barrier(self, name: str | None = None) -> None:
        dist.barrier()

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        assert src == 0
        return from_rank_zero(obj)

    def all_gather(self, tensor: Tensor, group: Any | None = None, sync_grads: bool = False) -> Tensor:
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, tensor.contiguous(), group=group)
        return torch.stack(parts)

    def reduce(self, tensor: Any, group: Any | None = None, reduce_op: Any = "mean") -> Any:
        """Mean or sum over data-parallel replicas, which are the ranks that hold different rows."""
        if not isinstance(tensor, Tensor):
            return tensor
        group = group or process_groups().dp_cp
        total = tensor.clone()
        dist.all_reduce(total, group=group)
        return total / group.size() if str(reduce_op).lower() in ("mean", "avg") else total

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        return (all_ranks if all else any_rank)(decision, device())

    # -- checkpoints ---------------------------------------------------------------------------------------------

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return True  # network and optimizer are filled in place

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {}  # weights are saved sharded

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return {}  # so is the optimizer's state

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """All ranks write `filepath` without its suffix, from copies; it appears when complete.

        Waits for the save before, and raises its error, on every rank.
        """
        model: Any = self.lightning_module
        optimizer = model.megatron_optimizer
        model.finish_gather()
        common = {name: checkpoint[name] for name in _KEPT if name in checkpoint}
        common["optimizer_steps"] = optimizer_state.steps_taken(optimizer)
        self.saver.wait()
        tensors = copies(model.saved_tensors()) | optimizer_state.state_tensors(model.network, optimizer)
        self.saver.start(
            SaveInProgress(model.network, _directory(filepath), tensors, {_COMMON: common}, self.saver.group)
        )

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Lightning's part of a checkpoint; weights and optimizer state are read straight into their places."""
        directory = _directory(checkpoint_path)
        common = sharded.read_common(directory).get(_COMMON)
        if common is None:
            raise sharded.CheckpointError(
                f"{directory} holds weights only, so no run can be resumed from it; start a new one with "
                f"model.checkpoint={directory}"
            )
        ours: dict[str, Any] = {"state_dict": {}, "optimizer_states": [{}], "lr_schedulers": [], "callbacks": {}}
        return {**common, **ours, "directory": directory}

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        model: Any = self.lightning_module
        directory = checkpoint["directory"]  # the run has verified it: run_directory.enter
        if model.network.lora is not None:
            resume(model.network, directory)
        sharded.restore(model.saved_tensors(), directory)
        model.network.file_dtypes = sharded.file_dtypes(directory)

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        model: Any = self.lightning_module
        steps = checkpoint["optimizer_steps"]
        optimizer_state.load_state(model.network, model.megatron_optimizer, checkpoint["directory"], steps)

    def remove_checkpoint(self, filepath: Any) -> None:
        """Which are kept is chosen in saving.py."""

    def teardown(self) -> None:
        """Nothing to move or stop: the process groups outlive the trainer."""


def _directory(path: Any) -> Path:
    return Path(os.fspath(path).removesuffix(".ckpt"))
