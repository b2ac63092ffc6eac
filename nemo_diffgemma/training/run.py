"""A training run from start to last checkpoint, in one of the processes of its layout.

    train(config, run_dir)      # in every process that torchrun or srun started, or in a single one

The run directory: `metrics.jsonl`, `validation.jsonl`, `checkpoints/step-N`, `assets/` (tokenizer, sampler defaults),
TensorBoard events. Started again, the run continues from its last complete checkpoint.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from nemo.utils.callbacks import NeMoModelCheckpoint
from nemo.utils.exp_manager import exp_manager

from nemo_diffgemma.checkpoint import sharded
from nemo_diffgemma.data import EOS_ID, PAD_ID, Batches, build_tokenizer
from nemo_diffgemma.diffusion_gemma import DiffusionGemma
from nemo_diffgemma.parallel.groups import agree_error, initialize, process_groups
from nemo_diffgemma.parallel.layout import ParallelLayout
from nemo_diffgemma.training import callbacks, optimizer, tasks
from nemo_diffgemma.training.model import DiffusionGemmaModel, ModelSettings
from nemo_diffgemma.training.schema import ConfigurationError, ExpManagerGroup, TrainConfig
from nemo_diffgemma.training.strategy import trainer as make_trainer

CHECKPOINTS, ASSETS = "checkpoints", "assets"


@dataclass(frozen=True)
class TrainResult:
    """Where the run is, its last checkpoint, and the loss of its last step."""

    run_dir: Path
    checkpoint: Path
    step: int
    loss: float


def train(config: TrainConfig, run_dir: str | Path) -> TrainResult:
    """Train until `trainer.max_steps`. Every process calls it with equal arguments.

    Raises one-paragraph errors (`ConfigurationError`, `LayoutError`, `CheckpointError`, ...) on every rank before the
    first step, and `TrainingError` where the loss is no number.
    """
    run_dir = Path(run_dir).absolute()
    _set_threads(config.trainer.threads)
    initialize(layout_of(config))
    _check(config)
    resumed = _checkpoint_to_resume(config, run_dir)
    model = DiffusionGemmaModel(ModelSettings.of(config))
    if resumed is not None:  # its weights come from the checkpoint, whatever the run began with
        model.settings.network.checkpoint = str(resumed)
    model.configure_model()
    assert model.network is not None
    tasks.check(config.data, model.network.model)
    _write_assets(model.network, run_dir)
    trainer = make_trainer(config.trainer.max_steps, _callbacks(config, run_dir))
    exp_manager(trainer, _exp_manager(config, run_dir, resumed))
    model.set_trainer(trainer)
    trainer.fit(model, ckpt_path=None if resumed is None else str(resumed))
    last = run_dir / CHECKPOINTS / f"step-{trainer.global_step}"
    if not sharded.is_sharded(last):
        trainer.save_checkpoint(f"{last}.ckpt")
    return TrainResult(run_dir, last, trainer.global_step, _last_loss(model, run_dir))


def layout_of(config: TrainConfig) -> ParallelLayout:
    """The layout that `parallel` names."""
    sizes = config.parallel
    return ParallelLayout(sizes.tensor, sizes.expert, sizes.expert_tensor, sizes.pipeline, sizes.context)


def _set_threads(wanted: int) -> None:
    here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", 1)))
    torch.set_num_threads(wanted or max(1, (os.cpu_count() or 1) // here))


def _check(config: TrainConfig) -> None:
    """Refuse what would fail after the network is built."""
    if config.trainer.max_steps < 1:
        raise ConfigurationError(f"trainer.max_steps={config.trainer.max_steps}; expected at least 1")
    optimizer.check(config.optim, config.trainer.max_steps)
    replicas = process_groups().dp_cp.size()
    Batches(config.data.global_batch_size, 0, replicas)  # raises where the batch cannot be shared
    share, micro = config.data.global_batch_size // replicas, config.data.micro_batch_size
    if micro < 0 or (micro and share % micro):
        raise ConfigurationError(
            f"data.micro_batch_size={micro} does not divide the {share} examples that each of {replicas} replicas has "
            f"of data.global_batch_size={config.data.global_batch_size}; use a divisor, or 0 for all at once"
        )
    tasks.sudoku_task(config.data)


# -- files of the run ------------------------------------------------------------------------------------------------


def last_checkpoint(run_dir: Path) -> Path | None:
    """The complete checkpoint with the highest step."""
    found: dict[int, Path] = {}
    for directory in (run_dir / CHECKPOINTS).glob("step-*"):
        named = re.fullmatch(r"step-(\d+)", directory.name)
        unfinished = directory.with_name(directory.name + NeMoModelCheckpoint.UNFINISHED_CHECKPOINT_SUFFIX)
        if named and sharded.is_sharded(directory) and not unfinished.exists():
            found[int(named[1])] = directory
    return found[max(found)] if found else None


def _checkpoint_to_resume(config: TrainConfig, run_dir: Path) -> Path | None:
    """Decided by rank 0: another rank may look later, when there are more."""
    box: list[Any] = [None]
    error: ConfigurationError | None = None
    if dist.get_rank() == 0:
        (run_dir / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        box = [last_checkpoint(run_dir)]
        if box[0] is not None and not config.exp_manager.resume:
            error = ConfigurationError(
                f"{run_dir} has a checkpoint of an earlier run ({box[0].name}) and exp_manager.resume=false; continue "
                "it with exp_manager.resume=true, or name another exp_manager.version"
            )
    agree_error(error)
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _write_assets(network: DiffusionGemma, run_dir: Path) -> None:
    """Tokenizer and sampler defaults of a network trained from scratch, so that its checkpoints take text prompts."""
    if network.assets is not None and (network.assets / "tokenizer.json").is_file():
        return
    assets = run_dir / ASSETS
    error: OSError | None = None
    if dist.get_rank() == 0:
        try:
            assets.mkdir(parents=True, exist_ok=True)
            build_tokenizer().save_pretrained(assets)
            sampler = {"eos_token_id": EOS_ID, "pad_token_id": PAD_ID}
            (assets / "generation_config.json").write_text(json.dumps(sampler, indent=2) + "\n")
        except OSError as found:
            error = found
    agree_error(error)
    network.assets = assets


def _callbacks(config: TrainConfig, run_dir: Path) -> list[Any]:
    settings = config.trainer
    wanted: list[Any] = [callbacks.MetricsFile(run_dir)]
    if settings.validate_every:
        wanted.append(callbacks.Validation(run_dir, settings.validate_every, settings.validation_examples))
    return [*wanted, callbacks.Progress()] if settings.progress else wanted


def _exp_manager(config: TrainConfig, run_dir: Path, resumed: Path | None) -> dict[str, Any]:
    """NeMo's settings. Which checkpoint to resume is ours to say: NeMo looks for names that end in `last` only."""
    group: ExpManagerGroup = config.exp_manager
    return {
        "explicit_log_dir": str(run_dir),
        "resume_from_checkpoint": None if resumed is None else str(resumed),
        "use_datetime_version": False,
        "seconds_to_sleep": 0,
        "create_tensorboard_logger": group.tensorboard,
        "create_wandb_logger": group.wandb_project is not None,
        "wandb_logger_kwargs": {"project": group.wandb_project, "name": group.name, "save_dir": str(run_dir)},
        "create_preemption_callback": False,
        "disable_validation_on_resume": False,
        "log_step_timing": False,
        "log_tflops_per_sec_per_gpu": False,
        "checkpoint_callback_params": {
            "dirpath": str(run_dir / CHECKPOINTS),
            "filename": "step-{step}",
            "auto_insert_metric_name": False,
            "monitor": "loss",
            "save_top_k": -1,
            "save_last": False,
            "save_nemo_on_train_end": False,
            "every_n_epochs": None,
            "every_n_train_steps": config.trainer.checkpoint_every or config.trainer.max_steps,
            "verbose": False,
        },
    }


def _last_loss(model: DiffusionGemmaModel, run_dir: Path) -> float:
    """Of the last step; a run that had reached its end before reads it from its metrics."""
    if model.result is not None:
        return model.result.loss
    lines = (run_dir / callbacks.METRICS).read_text().splitlines()
    return float(json.loads(lines[-1])["loss"])
