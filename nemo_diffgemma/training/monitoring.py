"""Keep a long run alive and visible on a cluster: stop on a signal, write a heartbeat, watch for hangs.

    SIGUSR1, SIGTERM    every rank finishes its step, one checkpoint is saved, the processes leave with PREEMPTED
    status.json         what rank 0 last knew, written every few seconds
    no step in time     every rank writes its stacks to standard error and leaves with HUNG

Slurm sends SIGUSR1 before the time limit and SIGTERM at pre-emption; see slurm/README.md for what follows.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

from nemo_diffgemma.parallel.agreement import any_rank, is_rank_zero, reported
from nemo_diffgemma.parallel.groups import device
from nemo_diffgemma.training.signals import StopRequest
from nemo_diffgemma.transfer import LateFlag, to_device

PREEMPTED, HUNG = 85, 86  # exit codes; slurm/job.sbatch knows them
STATUS = "status.json"
HEARTBEAT_SECONDS = 2.0
_DUMP_SECONDS = 10.0  # for the other ranks to notice and to write their stacks too


class Preemption(Callback):
    """Ends the run after the step in which any rank was asked to stop; `run.train` then saves the checkpoint.

    Ranks vote ahead of the update, so that at the end of the step the result is there: who is asked to stop later than
    that stops a step later. A save that has failed on some rank asks as well, and its error ends the run.
    """

    def __init__(self, request: StopRequest) -> None:
        self.request, self.preempted = request, False
        self._asked: LateFlag | None = None

    def on_before_optimizer_step(self, trainer: Any, *_: Any) -> None:
        asked = self.request.received is not None or trainer.strategy.saver.failed
        self._asked = LateFlag(reported(to_device(torch.tensor(asked), device())))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if self._asked and trainer.global_step < trainer.max_steps:
            if any_rank(trainer.strategy.saver.failed, device()):
                trainer.strategy.saver.wait()  # raises on all
            self.preempted = trainer.should_stop = True


class Heartbeat(Callback):
    """`status.json` of a run: state, step, loss, speed, last checkpoint, restarts. Written by rank 0, whole or not.

    Nothing is written before `start`: the directory may be another run's.
    """

    def __init__(self, run_dir: Path, max_steps: int) -> None:
        self.run_dir = run_dir
        self.status: dict[str, Any] = {
            "state": "starting",
            "step": 0,
            "max_steps": max_steps,
            "loss": None,
            "tokens_per_second": None,
            "checkpoint": None,
            "restarts": int(os.environ.get("SLURM_RESTART_COUNT", 0)),
            "job": _job(),
        }
        self._writes = False
        self._written = 0.0

    def start(self, checkpoint: Path | None, step: int) -> None:
        """The run directory is this run's, which goes on from `checkpoint`."""
        self._writes = is_rank_zero()
        self.write("starting", step=step, checkpoint=checkpoint and str(checkpoint))

    def write(self, state: str, **known: Any) -> None:
        """Now. Other ranks than 0 write nothing."""
        if not self._writes:
            return
        self.status |= {"state": state, "time": time.time(), **known}
        partial = self.run_dir / f".{STATUS}.partial"
        partial.write_text(json.dumps(self.status) + "\n")
        partial.replace(self.run_dir / STATUS)
        self._written = time.monotonic()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.write("running", step=trainer.global_step)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if time.monotonic() - self._written >= HEARTBEAT_SECONDS:
            self.write("running", **_known(pl_module.result), **_last_saved(trainer.strategy))


def _job() -> str | None:
    """Slurm's number of this job; of an element of an array with its own, since the bare number means all of it."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return os.environ.get("SLURM_JOB_ID") if array is None else f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"


def _known(result: Any) -> dict[str, Any]:
    if result is None:
        return {}
    return {"step": result.step, "loss": result.loss, "tokens_per_second": result.tokens_per_second}


def _last_saved(strategy: Any) -> dict[str, str]:
    """The checkpoint that was complete last; looking for it would read the directory of all of them."""
    last = strategy.saver.last
    return {} if last is None else {"checkpoint": str(last)}


class Watchdog(Callback):
    """Ends this process with HUNG when nothing is heard of a step for `minutes`, after writing where it hangs.

    The stacks are written by a thread of C that needs no interpreter lock; `minutes` also cover the start, validation
    and saving.
    """

    def __init__(self, minutes: float, on_hang: Callable[[], None]) -> None:
        self.seconds, self.on_hang = minutes * 60, on_hang
        self._stopped = threading.Event()

    @contextmanager
    def watching(self) -> Iterator[Watchdog]:
        """Watch until the end of the block."""
        if self.seconds <= 0:
            yield self
            return
        self.alive()
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            faulthandler.cancel_dump_traceback_later()
            self._stopped.set()
            thread.join()

    def alive(self) -> None:
        """A step is done: count anew."""
        if self.seconds > 0:
            faulthandler.dump_traceback_later(self.seconds, file=2)
            self._last = time.monotonic()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.alive()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.alive()

    def _watch(self) -> None:
        while not self._stopped.wait(1.0):
            if time.monotonic() - self._last > self.seconds + _DUMP_SECONDS:
                print(
                    f"no step within {self.seconds / 60:g} minutes (trainer.hang_minutes): stacks are above; rank "
                    f"{os.environ.get('RANK', '0')} ends with code {HUNG}",  # groups may not exist yet
                    file=sys.__stderr__,
                    flush=True,
                )
                threading.Thread(target=self.on_hang, daemon=True).start()  # it may hang as well
                time.sleep(1.0)
                os._exit(HUNG)
