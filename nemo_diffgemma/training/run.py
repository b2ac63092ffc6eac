"""A training run from start to last checkpoint, in one of the processes of its layout.

    train(config, run_dir)      # in every process that torchrun or srun started, or in a single one

What lies in the run directory: run_directory.py. Started again, the run continues from its last complete checkpoint.
Asked to stop by SIGUSR1 or SIGTERM, it saves one and says so in its result.
"""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment
from nemo.lightning.callback_group import CallbackGroup
from nemo.lightning.one_logger_callback import OneLoggerNeMoCallback
from nemo.utils import logging as nemo_logging
from nemo.utils.exp_manager import exp_manager

from nemo_diffgemma.checkpoint import sharded
from nemo_diffgemma.checkpoint.open import assets_of
from nemo_diffgemma.data import Batches
from nemo_diffgemma.data.bad_rows import BAD_ROWS
from nemo_diffgemma.data.packing import too_small
from nemo_diffgemma.data.tasks import Task, task_of
from nemo_diffgemma.errors import UserError
from nemo_diffgemma.parallel.agreement import all_or_none, on_rank_zero
from nemo_diffgemma.parallel.groups import initialize, process_groups
from nemo_diffgemma.parallel.threads import threads_of_process
from nemo_diffgemma.schema import ConfigurationError, ExpManagerGroup, TrainConfig
from nemo_diffgemma.training import callbacks, optimizer, run_directory, saving
from nemo_diffgemma.training.monitoring import PREEMPTED, Heartbeat, Preemption, Watchdog
from nemo_diffgemma.training.nemo_model import (
    DiffusionGemmaModel,
    ModelSettings,
    TrainingError,
    model_config,
    resumed_network,
)
from nemo_diffgemma.training.run_directory import LOGS, lock_of
from nemo_diffgemma.training.run_lock import RunLock
from nemo_diffgemma.training.saving import Saver
from nemo_diffgemma.training.signals import REQUEST
from nemo_diffgemma.training.strategy import MegatronStrategy


@dataclass(frozen=True)
class TrainResult:
    """Run directory, last checkpoint, loss of the last step, and whether a signal ended the run early."""

    run_dir: Path
    checkpoint: Path
    step: int
    loss: float
    preempted: bool

    @property
    def exit_code(self) -> int:
        """The process's exit code; `PREEMPTED` asks its starter to start it again."""
        return PREEMPTED if self.preempted else 0

    def json(self) -> dict[str, Any]:
        """What the entry points that train print."""
        return {"run_dir": str(self.run_dir), "checkpoint": str(self.checkpoint), "step": self.step, "loss": self.loss}


def train(config: TrainConfig, run_dir: str | Path) -> TrainResult:
    """Train until `trainer.max_steps` or a signal. Every process calls it with equal arguments.

    Raises one-paragraph errors (`ConfigurationError`, `LayoutError`, `CheckpointError`, ...) on every rank before the
    first step, and `TrainingError` where loss or gradients are no numbers or a checkpoint cannot be written. Where no
    step is made for `trainer.hang_minutes`, the process writes its stacks and ends with exit code 86.
    """
    run_dir = Path(run_dir).absolute()
    lock = lock_of(run_dir)
    heartbeat = Heartbeat(run_dir, config.trainer.max_steps)
    watchdog = Watchdog(config.trainer.hang_minutes, on_hang=lambda: heartbeat.write("hung"))
    try:
        with REQUEST.listening() as request, watchdog.watching():
            try:
                result = _train(config, run_dir, lock, heartbeat, watchdog, Preemption(request))
            except Exception:
                heartbeat.write("failed")
                raise
            state = "preempted" if result.preempted else "finished"
            heartbeat.write(state, step=result.step, loss=result.loss, checkpoint=str(result.checkpoint))
    finally:
        lock.release()
    return result


def _train(
    config: TrainConfig,
    run_dir: Path,
    lock: RunLock,
    heartbeat: Heartbeat,
    watchdog: Watchdog,
    preemption: Preemption,
) -> TrainResult:
    _quiet()
    torch.set_num_threads(config.trainer.threads or threads_of_process())
    initialize(config.parallel.layout())
    _check(config)
    resumed = run_directory.enter(config, run_dir, lock)
    heartbeat.start(resumed, 0 if resumed is None else run_directory.step_of(resumed))
    model = DiffusionGemmaModel(ModelSettings.of(config))
    _prepare_data(config, model.task, run_dir, resumed)
    if resumed is None:
        model.configure_model()
    else:  # Lightning fills it, and the optimizer, from the checkpoint
        model.network = resumed_network(config.model, config.seed, resumed)
    assert model.network is not None
    run_directory.write_assets(model.network, model.task, run_dir)
    saver = Saver(then=lambda: saving.remove_others(run_dir, config.trainer))
    wanted = [*_callbacks(config, run_dir), preemption, heartbeat, watchdog]
    try:
        # saves last: what it keeps is chosen by what the others have written about the step
        wanted.append(saving.Checkpoints(run_dir, config.trainer.checkpoint_every))
        trainer = _trainer(config.trainer.max_steps, wanted, MegatronStrategy(saver))
        exp_manager(trainer, _exp_manager(config, run_dir, resumed))
        model.set_trainer(trainer)
        last = _fit(trainer, model, saver, run_dir)
    finally:
        saver.close()
    if (report := model.task.report()) is not None and report.bad_rows:
        nemo_logging.warning(f"data: {report} ({run_dir / BAD_ROWS})")
    return TrainResult(run_dir, last, trainer.global_step, _last_loss(model, run_dir), preemption.preempted)


def _prepare_data(config: TrainConfig, task: Task, run_dir: Path, resumed: Path | None) -> None:
    """Read the data before a network takes its time. Collective; raises `ConfigurationError` on every rank."""
    assets = None if resumed is None else resumed / sharded.ASSETS
    if resumed is None and config.model.checkpoint is not None:
        assets = assets_of(config.model.checkpoint)
    task.open(assets)
    if assets is None:
        config.model.architecture |= task.architecture()
    with all_or_none():
        model = model_config(config.model, assets)
    task.prepare(model)
    largest = task.largest(config.model.objective.canvases_per_example)
    if largest is not None and 0 < config.data.tokens_per_micro_batch < largest:
        raise ConfigurationError(too_small(config.data.tokens_per_micro_batch, largest))
    if config.trainer.validate_every:
        task.held_out_examples(1)
    run_directory.keep_data_report(task.report(), run_dir, resumed)


def _fit(trainer: Trainer, model: DiffusionGemmaModel, saver: Saver, run_dir: Path) -> Path:
    """Train -> the last checkpoint."""
    try:
        trainer.fit(model)  # from the checkpoint that exp_manager has set
        saver.wait()
        last = run_directory.checkpoint_of(run_dir, trainer.global_step)
        if not trainer.strategy.broadcast(sharded.is_sharded(last)):  # rank 0's files decide: saving is collective
            trainer.save_checkpoint(f"{last}.ckpt")
            saver.wait()
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
    telemetry = CallbackGroup.get_instance()._callbacks
    telemetry[:] = [callback for callback in telemetry if not isinstance(callback, OneLoggerNeMoCallback)]


def _check(config: TrainConfig) -> None:
    """Refuse what would fail after the network is built."""
    if config.trainer.max_steps < 1:
        raise ConfigurationError(f"trainer.max_steps={config.trainer.max_steps}; expected at least 1")
    optimizer.check(config.optim)
    saving.check(config.trainer, task_of(config.data).validated)
    replicas = process_groups().dp_cp.size()
    Batches(config.data.global_batch_size, 0, replicas)  # raises where the batch cannot be shared
    share, micro = config.data.global_batch_size // replicas, config.data.micro_batch_size
    if micro < 0 or (micro and share % micro):
        raise ConfigurationError(
            f"data.micro_batch_size={micro} does not divide the {share} examples that each of {replicas} replicas has "
            f"of data.global_batch_size={config.data.global_batch_size}; use a divisor, or 0 for all at once"
        )
    if config.data.tokens_per_micro_batch < 0 or (micro and config.data.tokens_per_micro_batch):
        raise ConfigurationError(
            f"data.tokens_per_micro_batch={config.data.tokens_per_micro_batch} with data.micro_batch_size={micro}; use "
            "one of them, and 0 for the other"
        )


def _trainer(max_steps: int, wanted: list[Any], strategy: MegatronStrategy) -> Trainer:
    """A Lightning trainer that leaves loggers and checkpoints to NeMo's exp_manager and the rest to Megatron."""
    trainer = Trainer(
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        devices=1,
        strategy=strategy,
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


# -- pieces ------------------------------------------------------------------------------------------------------------


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
        "create_checkpoint_callback": False,  # saving.py
    }


def _last_loss(model: DiffusionGemmaModel, run_dir: Path) -> float:
    """The loss of the last step; a run that had ended before reads it from its metrics."""
    if model.result is not None:
        return model.result.loss

    def of_metrics() -> float:
        lines = (run_dir / callbacks.METRICS).read_text().splitlines()
        return float(json.loads(lines[-1])["loss"]) if lines else math.nan

    return on_rank_zero(of_metrics)
