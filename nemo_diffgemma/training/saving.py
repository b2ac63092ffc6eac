"""When a run saves, how it goes on meanwhile, and which checkpoints it keeps.

    trainer.checkpoint_every    besides the last step
    trainer.keep_last, keep_best, keep_every, keep_by     all are kept unless one of the first three is given

A save copies what the next step changes and leaves the rest to a thread: at most one is in flight. What befalls it ends
the run on every rank: at the next step (monitoring.Preemption), the next save or the end, which wait for it.
"""

from __future__ import annotations

import json
import math
import shutil
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback
from nemo.utils import logging as nemo_logging

from nemo_diffgemma.checkpoint import sharded
from nemo_diffgemma.checkpoint.sharded_writer import SaveInProgress
from nemo_diffgemma.errors import ConfigurationError
from nemo_diffgemma.parallel.agreement import all_or_none, is_rank_zero
from nemo_diffgemma.schema import TrainerGroup
from nemo_diffgemma.training.callbacks import MEASURED, VALIDATION
from nemo_diffgemma.training.run_directory import checkpoint_of, complete_checkpoints, step_of

_BEST_WHEN_SMALL = ("loss", "nelbo", "bits", "perplexity", "error")
_PATIENCE = timedelta(days=1)  # of a rank whose disk is faster


class Saver:
    """Writes one checkpoint at a time in a thread. `last` is the last that is complete; rank 0 then calls `then`."""

    def __init__(self, then: Callable[[], None]) -> None:
        self.last: Path | None = None
        self.group = dist.new_group(backend="gloo", timeout=_PATIENCE)  # of the threads: steps have others
        self._then = then
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, save: SaveInProgress) -> None:
        """Write `save` while the caller goes on. Only after `wait`."""
        assert self._thread is None
        self._thread = threading.Thread(target=self._write, args=(save,), name="checkpoint", daemon=True)
        self._thread.start()

    def _write(self, save: SaveInProgress) -> None:
        try:
            save.write()
            self.last = save.directory
            with all_or_none(self.group):
                if is_rank_zero():
                    self._then()
        except BaseException as error:
            self._error = error

    @property
    def failed(self) -> bool:
        """Whether a save has failed, and `wait` will say how; the ranks learn of it at about the same time."""
        return self._error is not None

    def wait(self) -> None:
        """Until nothing is in flight. Raises what the last save has raised: on every rank, as it did there."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Wait for what is in flight, whatever becomes of it, and give back the group. Collective."""
        if self._thread is not None:
            self._thread.join()
        dist.destroy_process_group(self.group)


class Checkpoints(Callback):
    """Saves every so many steps."""

    def __init__(self, run_dir: Path, every: int) -> None:
        self.run_dir, self.every = run_dir, every

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if self.every and trainer.global_step % self.every == 0:
            trainer.save_checkpoint(f"{checkpoint_of(self.run_dir, trainer.global_step)}.ckpt")


# -- which are kept ----------------------------------------------------------------------------------------------------


def check(config: TrainerGroup, measured: Sequence[str] = ()) -> None:
    """Raise `ConfigurationError` for settings with which checkpoints cannot be chosen.

    `measured` is what the task measures at each validation.
    """
    known = (*MEASURED, *measured)
    if config.keep_best and config.keep_by not in known:
        raise ConfigurationError(
            f"trainer.keep_by={config.keep_by!r} is no measure of validation.jsonl with this data; use one of "
            f"{', '.join(known)}"
        )
    for key in ("checkpoint_every", "keep_last", "keep_best", "keep_every"):
        if getattr(config, key) < 0:
            raise ConfigurationError(f"trainer.{key}={getattr(config, key)}; expected 0 or more")
    if config.keep_best and not (config.validate_every and config.checkpoint_every % config.validate_every == 0):
        raise ConfigurationError(
            f"trainer.keep_best={config.keep_best} chooses checkpoints by their validation, but with "
            f"trainer.validate_every={config.validate_every} not every one has any "
            f"(trainer.checkpoint_every={config.checkpoint_every}); validate every so many steps that they divide "
            "those of checkpoint_every"
        )


def is_best_when_small(measure: str) -> bool:
    """Losses, bits and errors; what else is measured is best when large."""
    return any(word in measure for word in _BEST_WHEN_SMALL)


def remove_others(run_dir: Path, config: TrainerGroup) -> None:
    """Remove the checkpoints that `config` does not keep and nobody reads. Rank 0 only.

    What cannot be removed is told and stays; so are those among which the best cannot be chosen.
    """
    if not (config.keep_last or config.keep_best or config.keep_every):
        return
    there = complete_checkpoints(run_dir)
    keep = set(there[: max(1, config.keep_last)])
    if config.keep_every:
        keep |= {checkpoint for checkpoint in there if step_of(checkpoint) % config.keep_every == 0}
    if config.keep_best:
        values = measures(run_dir / VALIDATION, config.keep_by)
        measured = [checkpoint for checkpoint in there if step_of(checkpoint) in values]
        if not measured:
            nemo_logging.warning(
                f"trainer.keep_by={config.keep_by} is measured at no checkpoint ({run_dir / VALIDATION}), so all are "
                "kept; give one of its measures"
            )
            return
        sign = 1 if is_best_when_small(config.keep_by) else -1
        keep |= set(sorted(measured, key=lambda one: sign * values[step_of(one)])[: config.keep_best])
    for checkpoint in there:
        if checkpoint not in keep:
            _remove(checkpoint)


def _remove(checkpoint: Path) -> None:
    """Under another name first: half removed, it would look like a damaged one. What somebody reads stays for now."""
    leaving = checkpoint.with_name(f".{checkpoint.name}.removed.partial")
    try:
        with sharded.unused(checkpoint) as is_unused:
            if is_unused:
                checkpoint.rename(leaving)
                shutil.rmtree(leaving)
    except OSError as error:
        nemo_logging.warning(f"{checkpoint} is to be removed (trainer.keep_last and others), but cannot be: {error}")


def measures(file: Path, name: str) -> dict[int, float]:
    """Step and value of a measure in each line of a validation file that has it; the mean where it has several.

    Values that are no numbers are left out, and a line that is being written.
    """
    values = {}
    for line in file.read_text().splitlines() if file.is_file() else []:
        try:
            found = json.loads(line)
        except ValueError:
            continue
        value = found.get(name)
        if isinstance(value, dict) and value:
            value = sum(value.values()) / len(value)
        if isinstance(value, int | float) and math.isfinite(value):
            values[found["step"]] = float(value)
    return values
