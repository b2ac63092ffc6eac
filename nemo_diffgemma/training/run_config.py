"""The configuration of a run, kept beside its results: a resumed run is the same run.

    config.yaml      everything as composed at the start, written once
    changes.jsonl    what a later start changed, with the first step that it counts for

What makes it another run (architecture, checkpoint, seed, data, batch size) cannot change; anything else can, and is
reported. Where and how a run is started (`exp_manager`, `cluster`) is no part of it.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import yaml

from nemo_diffgemma.errors import ConfigurationError
from nemo_diffgemma.repository import user_path
from nemo_diffgemma.schema import TrainConfig
from nemo_diffgemma.training.callbacks import append_line, truncate_after

CONFIG, CHANGES = "config.yaml", "changes.jsonl"
_FIXED = ("model.checkpoint", "model.architecture", "model.lora", "model.freeze", "seed", "data")
_FREE_OF_FIXED = ("data.micro_batch_size", "data.tokens_per_micro_batch")
_NO_PART = ("exp_manager", "cluster", "dry_run", "trainer.progress", "trainer.threads", "parallel.replicas")


def keep(config: TrainConfig, run_dir: Path, resumed_step: int | None) -> list[str]:
    """Keep `config` in `run_dir` -> what has changed since the start, one sentence a key. Rank 0 only.

    Raises `ConfigurationError` where a run that is resumed after `resumed_step` (None: begins anew) would be another.
    """
    now = flat(config)
    file, changes = run_dir / CONFIG, run_dir / CHANGES
    if resumed_step is None or not file.is_file():  # an older version kept none
        changes.unlink(missing_ok=True)
        _write(file, config)
        return []
    # the step of a change is the first that it counts for: what was changed later than this has not happened
    truncate_after(changes, resumed_step + 1)
    before = _read(file, changes)
    changed = {
        key: [before.get(key), now.get(key)]
        for key in _compared(before, now)
        if before.get(key) != now.get(key) and not _is_in(key, _NO_PART)
    }
    _refuse_another_run(changed, run_dir)
    if changed:
        moment = time.strftime("%Y-%m-%d %H:%M:%S")
        append_line(changes, {"step": resumed_step + 1, "time": moment, "changed": changed})
    return [
        f"{key} was {_shown(old)} and is {_shown(new)} from step {resumed_step + 1} on"
        for key, (old, new) in changed.items()
    ]


def _compared(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Keys of both: others came or went with a version. Fields of the architecture may be given or not."""
    keys = dict.fromkeys([*before, *now])
    return [key for key in keys if (key in before and key in now) or _is_in(key, ("model.architecture",))]


def _refuse_another_run(changed: dict[str, list[Any]], run_dir: Path) -> None:
    fixed = [key for key in changed if _is_in(key, _FIXED) and key not in _FREE_OF_FIXED]
    if fixed:
        given = ", ".join(f"{key}={_shown(changed[key][0])} (now {_shown(changed[key][1])})" for key in fixed)
        raise ConfigurationError(
            f"the run in {run_dir} was started with {given}; resumed with anything else it would be another run: give "
            "the same again, or begin a new one with another exp_manager.version"
        )


def flat(config: TrainConfig) -> dict[str, Any]:
    """Every value by its key with dots, as JSON knows it. Paths are absolute."""
    return _flatten(_plain(config), "")


def _plain(config: TrainConfig) -> dict[str, Any]:
    values = json.loads(json.dumps(dataclasses.asdict(config)))  # no tuples
    if config.model.checkpoint is not None:
        values["model"]["checkpoint"] = str(user_path(config.model.checkpoint).resolve())
    for name in ("train", "validation", "tokenizer"):  # of data from files
        given = values["data"].get(name)
        if isinstance(given, list):
            values["data"][name] = [str(user_path(entry).absolute()) for entry in given]
        elif given is not None:
            values["data"][name] = str(user_path(given).absolute())
    return values


def _flatten(values: dict[str, Any], prefix: str) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            result |= _flatten(value, f"{prefix}{name}.")
        else:
            result[prefix + name] = value
    return result


def _write(file: Path, config: TrainConfig) -> None:
    """Whole or not at all."""
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(yaml.safe_dump(_plain(config), sort_keys=False))
    partial.replace(file)


def _read(file: Path, changes: Path) -> dict[str, Any]:
    """The values that count now. Raises `ConfigurationError` for a damaged file."""
    try:
        values = _flatten(yaml.safe_load(file.read_text()), "")
        lines = changes.read_text().splitlines() if changes.is_file() else []
        for line in lines:
            values |= {key: new for key, (_, new) in json.loads(line)["changed"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise ConfigurationError(
            f"{file} or {changes.name} beside it is damaged ({error}); remove both to resume the run with what is "
            "given now"
        ) from None
    return values


def _is_in(key: str, groups: tuple[str, ...]) -> bool:
    return any(key == group or key.startswith(f"{group}.") for group in groups)


def _shown(value: Any) -> str:
    return json.dumps(value) if not isinstance(value, str) else value
