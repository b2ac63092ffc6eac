"""Callbacks of a run: metrics file, validation, progress. Rank 0 writes the files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from tqdm import tqdm

from nemo_diffgemma.evaluation.likelihood import bits_per_token
from nemo_diffgemma.evaluation.measures import LEVELS, canvas_losses, held_out_rows
from nemo_diffgemma.training.step_result import scalars

METRICS, VALIDATION = "metrics.jsonl", "validation.jsonl"
MEASURED = ("canvas_loss", "bits_per_token")  # by every validation, whatever the data


def truncate_after(file: Path, last_step: int) -> None:
    """Drop the lines of steps after `last_step`, and what an interrupted write left of one."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= last_step:
                kept.append(line)
        except (json.JSONDecodeError, KeyError):
            continue
    partial = file.with_suffix(".partial")
    partial.write_text("".join(f"{line}\n" for line in kept))
    partial.replace(file)


def append_line(file: Path, values: dict[str, Any]) -> None:
    """Add one JSON object to a file of lines."""
    with file.open("a") as stream:
        stream.write(json.dumps(values) + "\n")


class MetricsFile(Callback):
    """Exactly one line an optimizer step, from step 1, also over interruptions; the same to the trainer's loggers."""

    def __init__(self, run_dir: Path) -> None:
        self.file = run_dir / METRICS

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.is_global_zero:
            truncate_after(self.file, trainer.global_step)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.is_global_zero:
            append_line(self.file, pl_module.result.line())
            _log(trainer, pl_module.result.scalars())


def _log(trainer: Any, values: dict[str, float]) -> None:
    """To TensorBoard and others. Lightning's own `log` would send each number to the GPU, and wait for it."""
    for logger in trainer.loggers:
        logger.log_metrics(values, step=trainer.global_step)


class Validation(Callback):
    """Every `every` steps: held-out canvas loss at fixed noise levels, bits a token, and what the task measures."""

    def __init__(self, run_dir: Path, every: int, examples: int) -> None:
        self.file, self.every, self.examples = run_dir / VALIDATION, every, examples

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.is_global_zero:
            truncate_after(self.file, trainer.global_step)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step % self.every:
            return
        measures = self.evaluate(pl_module)
        if trainer.is_global_zero:
            append_line(self.file, {"step": trainer.global_step, **measures})
            _log(trainer, dict(scalars(measures, "validation/")))

    @torch.no_grad()
    def evaluate(self, module: Any) -> dict[str, Any]:
        network, task, seed = module.network, module.task, module.settings.seed
        module.finish_gather()
        network.eval()
        try:
            rows = held_out_rows(task, network.model_config, self.examples)
            prediction = module.settings.network.objective.prediction
            losses = canvas_losses(network, rows, LEVELS, seed, prediction)
            bits = bits_per_token(network, rows, seed, prediction)
            return {"canvas_loss": losses, "bits_per_token": bits, **task.validate(network, self.examples, seed)}
        finally:
            network.train()


class Progress(Callback):
    """A bar on standard error with loss, speed and time left."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.is_global_zero:
            total, done = trainer.max_steps, trainer.global_step
            self.bar = tqdm(total=total, initial=done, file=sys.stderr, unit="step", dynamic_ncols=True)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if self.bar is not None:
            result = pl_module.result
            self.bar.set_postfix_str(f"loss {result.loss:.4f}, {result.tokens_per_second:,.0f} tokens/s", refresh=False)
            self.bar.update(1)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
