"""The run directory: its files, and how a run enters it.

lock                     held while a run works here: run_lock.py
config.yaml              the configuration of the start, and changes.jsonl of later ones: run_config.py
checkpoints/step-N       complete ones only; those of older versions have no `-unfinished` marker beside them
assets/                  what every checkpoint has beside its weights: configuration, tokenizer, sampler defaults
data.json                what the run learns from, and bad_rows.jsonl of the rows that are left out
metrics.jsonl, validation.jsonl, status.json, logs/
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path

from nemo.utils import logging as nemo_logging

from nemo_diffgemma.checkpoint import sharded
from nemo_diffgemma.checkpoint.assets import GENERATION
from nemo_diffgemma.data import bad_rows
from nemo_diffgemma.data.tasks import DataReport, Task
from nemo_diffgemma.diffusion.sampler_config import SamplerConfig
from nemo_diffgemma.diffusion_gemma import DiffusionGemma
from nemo_diffgemma.errors import ConfigurationError, UserError
from nemo_diffgemma.parallel.agreement import on_rank_zero
from nemo_diffgemma.schema import TrainConfig
from nemo_diffgemma.training import run_config
from nemo_diffgemma.training.run_lock import LOCK, RunLock

CHECKPOINTS, ASSETS, LOGS, DATA = "checkpoints", "assets", "logs", "data.json"
_UNFINISHED = "-unfinished"  # NeMo's marker


def enter(config: TrainConfig, run_dir: Path, lock: RunLock) -> Path | None:
    """Take the run directory -> the checkpoint from which this run goes on. Collective; rank 0 decides and writes.

    Makes the folder, takes the lock, verifies the checkpoint, keeps the configuration, and removes what killed saves
    left. Raises `ConfigurationError` on every rank where it cannot be written, another run works in it, or a run that
    is there must not be continued like this; OSError where the disk fails.
    """

    def take() -> None:
        with _writable(run_dir):
            (run_dir / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=run_dir).close()  # a directory that was there may not be ours to write
            lock.acquire()
            last = last_checkpoint(run_dir)
        if last is not None and not config.exp_manager.resume:
            raise ConfigurationError(
                f"{run_dir} has a checkpoint of an earlier run ({last.name}) and exp_manager.resume=false; continue "
                "it with exp_manager.resume=true, or name another exp_manager.version"
            )

    def begin() -> None:
        for change in run_config.keep(config, run_dir, None if resumed is None else step_of(resumed)):
            nemo_logging.warning(f"resumed with another configuration: {change}")
        if resumed is None:  # those of a start before, which may have been from another checkpoint
            shutil.rmtree(run_dir / ASSETS, ignore_errors=True)
        for unfinished in (run_dir / CHECKPOINTS).glob(".step-*.partial"):
            shutil.rmtree(unfinished, ignore_errors=True)

    on_rank_zero(take)
    resumed = _last_intact(run_dir)
    on_rank_zero(begin)
    return resumed


@contextmanager
def _writable(run_dir: Path) -> Iterator[None]:
    try:
        yield
    except (PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError) as error:
        raise ConfigurationError(
            f"the run directory {run_dir} cannot be written ({error}); name another exp_manager.exp_dir"
        ) from None


def lock_of(run_dir: Path) -> RunLock:
    """The lock of a run directory, not acquired."""
    return RunLock(run_dir / LOCK)


# -- checkpoints -------------------------------------------------------------------------------------------------------


def checkpoint_of(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or would be."""
    return run_dir / CHECKPOINTS / f"step-{step}"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def last_checkpoint(run_dir: Path) -> Path | None:
    """The complete checkpoint with the highest step."""
    return next(iter(complete_checkpoints(run_dir)), None)


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """The last first."""
    complete = []
    for directory in (run_dir / CHECKPOINTS).glob("step-*"):
        named = re.fullmatch(r"step-(\d+)", directory.name)
        unfinished = directory.with_name(directory.name + _UNFINISHED)
        if named and sharded.is_sharded(directory) and not unfinished.exists():
            complete.append(directory)
    return sorted(complete, key=step_of, reverse=True)


def _last_intact(run_dir: Path) -> Path | None:
    """The last checkpoint, with those put aside that are damaged: by a node that lost power, say. Collective."""
    while True:
        checkpoint = on_rank_zero(lambda: last_checkpoint(run_dir))
        if checkpoint is None:
            return None
        try:
            sharded.verify(checkpoint)
            return checkpoint
        except UserError as error:
            on_rank_zero(partial(_put_aside, checkpoint, str(error)))


def _put_aside(checkpoint: Path, why: str) -> None:
    aside = checkpoint.with_name(f"{checkpoint.name}.damaged")
    for number in count(2):
        if not aside.exists():
            break
        aside = checkpoint.with_name(f"{checkpoint.name}.damaged-{number}")
    nemo_logging.warning(f"{checkpoint} is damaged ({why}): put aside as {aside.name}, the one before is resumed")
    checkpoint.rename(aside)


# -- data --------------------------------------------------------------------------------------------------------------


def keep_data_report(report: DataReport | None, run_dir: Path, resumed: Path | None) -> None:
    """Keep what was found in files. Collective; rank 0 writes.

    Raises `ConfigurationError` on every rank where a resumed run would go on with other data.
    """

    def keep() -> None:
        if report is None:
            return
        file = run_dir / DATA
        before = json.loads(file.read_text())["fingerprint"] if resumed is not None and file.is_file() else None
        if before not in (None, report.fingerprint):
            raise ConfigurationError(
                f"the files of data.train hold other examples than those that the run in {run_dir} has begun with; "
                "restore them, or begin a new run with another exp_manager.version"
            )
        bad_rows.write(report.bad_rows, run_dir / bad_rows.BAD_ROWS)
        counts = Counter(row.reason for row in report.bad_rows)
        values = {"examples": report.examples, "bad_rows": counts, "notes": report.notes}
        file.write_text(json.dumps({**values, "fingerprint": report.fingerprint}, indent=2) + "\n")
        place = f" ({run_dir / bad_rows.BAD_ROWS})" if report.bad_rows else ""
        nemo_logging.warning(f"data: {report}{place}")

    on_rank_zero(keep)


# -- assets ------------------------------------------------------------------------------------------------------------


def write_assets(network: DiffusionGemma, task: Task, run_dir: Path) -> None:
    """Keep in the run what every checkpoint has beside the weights, whatever becomes of where it came from. Collective.

    A network trained from scratch gets tokenizer and sampler defaults of its task, so that it takes text prompts.
    """
    assets = run_dir / ASSETS

    def write() -> None:
        if not (assets / "config.json").is_file():
            write_all()
        if task.chat_template is not None:
            (assets / "chat_template.jinja").write_text(task.chat_template, encoding="utf-8")

    def write_all() -> None:
        assets.mkdir(parents=True, exist_ok=True)
        if network.assets is None:
            tokenizer = task.tokenizer()
            if tokenizer is not None:
                tokenizer.save_pretrained(assets)
            ends = task.eos_token_id if isinstance(task.eos_token_id, int) else tuple(task.eos_token_id)
            sampler = SamplerConfig(eos_token_id=ends, pad_token_id=task.pad_token_id)
            (assets / GENERATION).write_text(json.dumps(sampler.to_huggingface(), indent=2) + "\n")
        sharded.write_assets(network, assets)  # config.json last: it says that the others are there

    on_rank_zero(write)
    network.assets = assets
