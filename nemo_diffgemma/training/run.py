"""A training run from start to last checkpoint, in one of the processes of its layout.

    train(config, run_dir)      # in every process that torchrun or srun started, or in a single one

The run directory: `metrics.jsonl`, `validation.jsonl`, `checkpoints/step-N`, `assets/` (tokenizer, sampler defaults),
`logs/` (NeMo's, TensorBoard events), `status.json` (the heartbeat). Started again, the run continues from its last
complete checkpoint. Asked to stop by SIGUSR1 or SIGTERM, it saves one and says so in its result.
"""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment
from nemo.lightning.callback_group import CallbackGroup
from nemo.lightning.one_logger_callback import OneLoggerNeMoCallback
from nemo.utils import logging as nemo_logging
from nemo.utils.callbacks import NeMoModelCheckpoint
from nemo.utils.exp_manager import exp_manager

from nemo_diffgemma.checkpoint import sharded
from nemo_diffgemma.data import EOS_ID, PAD_ID, Batches, build_tokenizer, tasks
from nemo_diffgemma.diffusion_gemma import DiffusionGemma
from nemo_diffgemma.errors import UserError
from nemo_diffgemma.parallel.agreement import agree_error
from nemo_diffgemma.parallel.groups import initialize, process_groups
from nemo_diffgemma.parallel.threads import threads_of_process
from nemo_diffgemma.schema import ConfigurationError, ExpManagerGroup, TrainConfig
from nemo_diffgemma.training import callbacks, optimizer
from nemo_diffgemma.training.monitoring import Heartbeat, Preemption, Watchdog
from nemo_diffgemma.training.nemo_model import DiffusionGemmaModel, ModelSettings, TrainingError, empty_network
from nemo_diffgemma.training.signals import REQUEST
from nemo_diffgemma.training.strategy import MegatronStrategy

CHECKPOINTS, ASSETS, LOGS = "checkpoints", "assets", "logs"


@dataclass(frozen=True)
class TrainResult:
    """Where the run is, its last checkpoint, the loss of its last step, and whether a signal ended it early."""

    run_dir: Path
    checkpoint: Path
    step: int
    loss: float
    preempted: bool


def train(config: TrainConfig, run_dir: str | Path) -> TrainResult:
    """Train until `trainer.max_steps` or a signal. Every process calls it with equal arguments.

    Raises one-paragraph errors (`ConfigurationError`, `LayoutError`, `CheckpointError`, ...) on every rank before the
    first step, and `TrainingError` where loss or gradients are no numbers or a checkpoint cannot be written. Where no
    step is made for `trainer.hang_minutes`, the process writes its stacks and ends with exit code 86.
    """
    run_dir = Path(run_dir).absolute()
    heartbeat = Heartbeat(run_dir, config.trainer.max_steps, last_checkpoint)
    watchdog = Watchdog(config.trainer.hang_minutes, on_hang=lambda: heartbeat.write("hung"))
    with REQUEST.listening() as request, watchdog.watching():
        try:
            result = _train(config, run_dir, heartbeat, watchdog, Preemption(request))
        except Exception:
            if dist.is_initialized() and run_dir.is_dir():
                heartbeat.write("failed")
            raise
        heartbeat.write("preempted" if result.preempted else "finished", step=result.step, loss=result.loss)
    return result


def _train(
    config: TrainConfig, run_dir: Path, heartbeat: Heartbeat, watchdog: Watchdog, preemption: Preemption
) -> TrainResult:
    _quiet()
    torch.set_num_threads(config.trainer.threads or threads_of_process())
    initialize(config.parallel.layout())
    _check(config)
    resumed = _checkpoint_to_resume(config, run_dir)
    heartbeat.write("starting", step=0 if resumed is None else _step_of(resumed))
    model = DiffusionGemmaModel(ModelSettings.of(config))
    if resumed is None:
        model.configure_model()
    else:  # Lightning fills it, and the optimizer, from the checkpoint
        model.network = empty_network(config.model, resumed / sharded.ASSETS)
    assert model.network is not None
    tasks.check(config.data, model.network.model)
    _write_assets(model.network, run_dir)
    trainer = _trainer(config.trainer.max_steps, [*_callbacks(config, run_dir), preemption, heartbeat, watchdog])
    exp_manager(trainer, _exp_manager(config, run_dir, resumed))
    model.set_trainer(trainer)
    last = _fit(trainer, model, resumed, run_dir)
    return TrainResult(run_dir, last, trainer.global_step, _last_loss(model, run_dir), preemption.preempted)


def _fit(trainer: Trainer, model: DiffusionGemmaModel, resumed: Path | None, run_dir: Path) -> Path:
    """Train -> the last checkpoint."""
    try:
        trainer.fit(model, ckpt_path=None if resumed is None else str(resumed))
        last = run_dir / CHECKPOINTS / f"step-{trainer.global_step}"
        if not trainer.strategy.broadcast(sharded.is_sharded(last)):  # rank 0's files decide: saving is collective
            trainer.save_checkpoint(f"{last}.ckpt")
    except UserError as error:
        if model.result is None:
            raise
        # after a first step it is nothing that was asked for: a full disk, say, with which a restart may do better
        raise TrainingError(str(error)) from error
    return last


def _quiet() -> None:
    """Without what Megatron and Lightning say at every start, and NeMo's telemetry.

    The telemetry has no receiver here; after an error it keeps its spans open, refuses the next run of the process and
    writes files into the working directory.
    """
    nemo_logging.setLevel(logging.WARNING)
    for talkative in ("megatron.core", "lightning.pytorch"):
        logging.getLogger(talkative).setLevel(logging.WARNING)
    # says at each checkpoint that asynchronous writing, which is not used, has another way now
    logging.getLogger("megatron.core.dist_checkpointing.strategies.torch").setLevel(logging.ERROR)
    telemetry = CallbackGroup.get_instance()._callbacks
    telemetry[:] = [callback for callback in telemetry if not isinstance(callback, OneLoggerNeMoCallback)]


def _check(config: TrainConfig) -> None:
    """Refuse what would fail after the network is built."""
    if config.trainer.max_steps < 1:
        raise ConfigurationError(f"trainer.max_steps={config.trainer.max_steps}; expected at least 1")
    optimizer.check(config.optim)
    replicas = process_groups().dp_cp.size()
    Batches(config.data.global_batch_size, 0, replicas)  # raises where the batch cannot be shared
    share, micro = config.data.global_batch_size // replicas, config.data.micro_batch_size
    if micro < 0 or (micro and share % micro):
        raise ConfigurationError(
            f"data.micro_batch_size={micro} does not divide the {share} examples that each of {replicas} replicas has "
            f"of data.global_batch_size={config.data.global_batch_size}; use a divisor, or 0 for all at once"
        )
    tasks.sudoku_task(config.data)


def _trainer(max_steps: int, wanted: list[Any]) -> Trainer:
    """A Lightning trainer that leaves loggers and checkpoints to NeMo's exp_manager and the rest to Megatron."""
    trainer = Trainer(
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        devices=1,
        strategy=MegatronStrategy(),
        plugins=[LightningEnvironment()],  # the world exists: Slurm's would check its tasks and take its signals
        max_steps=max_steps,
        max_epochs=-1,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        logger=False,
        callbacks=wanted,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    # SIGTERM is ours (signals.py): Lightning would leave after the step, without a checkpoint and with exit code 0
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    return trainer


# -- files of the run ------------------------------------------------------------------------------------------------


def last_checkpoint(run_dir: Path) -> Path | None:
    """The complete checkpoint with the highest step."""
    return next(iter(_checkpoints(run_dir)), None)


def _checkpoints(run_dir: Path) -> list[Path]:
    """Complete ones, the last first."""
    found = []
    for directory in (run_dir / CHECKPOINTS).glob("step-*"):
        named = re.fullmatch(r"step-(\d+)", directory.name)
        unfinished = directory.with_name(directory.name + NeMoModelCheckpoint.UNFINISHED_CHECKPOINT_SUFFIX)
        if named and sharded.is_sharded(directory) and not unfinished.exists():
            found.append(directory)
    return sorted(found, key=_step_of, reverse=True)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _last_intact(run_dir: Path) -> Path | None:
    """The last checkpoint, with those put aside that a node which lost power has cut short."""
    for checkpoint in _checkpoints(run_dir):
        if sharded.is_intact(checkpoint):
            return checkpoint
        nemo_logging.warning(f"{checkpoint} is damaged: put aside, the one before is resumed")
        checkpoint.rename(checkpoint.with_name(f"{checkpoint.name}.damaged"))
    return None


def _checkpoint_to_resume(config: TrainConfig, run_dir: Path) -> Path | None:
    """Decided by rank 0: another rank may look later, when there are more. Makes the folder, and removes from it what
    killed saves left.
    """
    box: list[Any] = [None]
    error: ConfigurationError | None = None
    if dist.get_rank() == 0:
        try:
            (run_dir / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=run_dir).close()  # a directory that was there may not be ours to write
            box = [_last_intact(run_dir)]
        except OSError as found:
            error = ConfigurationError(
                f"the run directory {run_dir} cannot be written ({found}); name another exp_manager.exp_dir"
            )
        if box[0] is not None and not config.exp_manager.resume:
            error = ConfigurationError(
                f"{run_dir} has a checkpoint of an earlier run ({box[0].name}) and exp_manager.resume=false; continue "
                "it with exp_manager.resume=true, or name another exp_manager.version"
            )
        elif error is None:
            for unfinished in (run_dir / CHECKPOINTS).glob(".step-*.partial"):
                shutil.rmtree(unfinished, ignore_errors=True)
    agree_error(error)
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _write_assets(network: DiffusionGemma, run_dir: Path) -> None:
    """Keep in the run what every checkpoint has beside the weights, whatever becomes of where it came from.

    A network trained from scratch gets tokenizer and sampler defaults of its data, so that it takes text prompts.
    """
    assets = run_dir / ASSETS
    error: Exception | None = None
    if dist.get_rank() == 0 and not (assets / "config.json").is_file():
        try:
            assets.mkdir(parents=True, exist_ok=True)
            if network.assets is None:
                build_tokenizer().save_pretrained(assets)
                sampler = {"eos_token_id": EOS_ID, "pad_token_id": PAD_ID}
                (assets / "generation_config.json").write_text(json.dumps(sampler, indent=2) + "\n")
            sharded.write_assets(network, assets)  # config.json last: it says that the others are there
        except (OSError, UserError) as found:
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
    """NeMo's settings. It has a folder of its own, since it moves away every file that it finds at its start; which
    checkpoint to resume is ours to say, since it looks for names that end in `last` only.
    """
    group: ExpManagerGroup = config.exp_manager
    return {
        "explicit_log_dir": str(run_dir / LOGS),
        "resume_from_checkpoint": None if resumed is None else str(resumed),
        "use_datetime_version": False,
        "seconds_to_sleep": 0,
        "create_tensorboard_logger": group.tensorboard,
        "create_wandb_logger": group.wandb_project is not None,
        "wandb_logger_kwargs": {"project": group.wandb_project, "name": group.name, "save_dir": str(run_dir / LOGS)},
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
    box = [math.nan]
    if dist.get_rank() == 0:
        lines = (run_dir / callbacks.METRICS).read_text().splitlines()
        box = [float(json.loads(line)["loss"]) for line in lines[-1:]] or box
    dist.broadcast_object_list(box, src=0)
    return box[0]
