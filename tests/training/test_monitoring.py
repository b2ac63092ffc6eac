"""Runs that are stopped, or hang: in processes of their own, since signals and exit codes are the claim."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from nemo_diffgemma.repository import ROOT
from nemo_diffgemma.training.monitoring import HUNG, PREEMPTED
from tests.commands import Command

TRAIN = "launch/train.py"
STEPS = 12


def arguments(directory: Path, steps: int = STEPS) -> list[str]:
    return [
        "model=tiny", "data.global_batch_size=4", f"trainer.max_steps={steps}", "optim.warmup_steps=1",
        "trainer.progress=false", "exp_manager.tensorboard=false", f"exp_manager.exp_dir={directory}",
        "exp_manager.name=run", "exp_manager.version=one",
    ]  # fmt: skip


def start(directory: Path, *more: str, steps: int = STEPS) -> Command:
    return Command(TRAIN, *arguments(directory, steps), *more)


def end(process: Command | subprocess.Popen[str], code: int = 0) -> tuple[dict[str, Any], str]:
    """JSON line and standard error of a run that ends with `code`."""
    out, errors = process.communicate(timeout=240)
    assert process.returncode == code, errors
    return json.loads(out.splitlines()[-1]) if out else {}, errors


def wait_for_step(run: Path, step: int, process: Command) -> None:
    file, deadline = run / "metrics.jsonl", time.monotonic() + 120
    while not (file.exists() and len(file.read_text().splitlines()) >= step):
        assert process.poll() is None and time.monotonic() < deadline, f"no step {step}"
        time.sleep(0.02)


def lines(run: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in ("step", "loss", "grad_norm", "lr")} for line in found]


def status(run: Path) -> dict[str, Any]:
    return json.loads((run / "status.json").read_text())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("undisturbed")
    found, _ = end(start(directory))
    assert status(directory / "run" / "one") | {"time": 0} == {
        "state": "finished", "step": STEPS, "max_steps": STEPS, "loss": found["loss"], "restarts": 0, "job": None,
        "checkpoint": found["checkpoint"], "time": 0,
        "tokens_per_second": status(directory / "run" / "one")["tokens_per_second"],
    }  # fmt: skip
    return directory / "run" / "one"


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_ends_a_run_with_a_checkpoint_from_which_it_ends_as_if_undisturbed(tmp_path, undisturbed, number):
    run = tmp_path / "run" / "one"
    process = start(tmp_path)
    wait_for_step(run, 3, process)
    process.send_signal(number)
    found, _ = end(process, PREEMPTED)
    assert 3 <= found["step"] < STEPS
    assert Path(found["checkpoint"]).name == f"step-{found['step']}"
    assert {"state": "preempted", "step": found["step"], "checkpoint": found["checkpoint"]}.items() <= status(
        run
    ).items()
    end(start(tmp_path))
    assert lines(run) == lines(undisturbed)
    assert status(run)["state"] == "finished"


def test_a_signal_during_the_start_of_a_rank_is_kept_until_it_can_save(tmp_path):
    command = [sys.executable, str(ROOT / TRAIN), *arguments(tmp_path)]  # with its imports
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "SLURM_PROCID": "0"}
    )
    listening = 1 << (signal.SIGUSR1 - 1)
    deadline = time.monotonic() + 60
    while not int(re.findall(r"SigCgt:\t(\w+)", Path(f"/proc/{process.pid}/status").read_text())[0], 16) & listening:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    found, _ = end(process, PREEMPTED)
    assert found["step"] == 1 and Path(found["checkpoint"]).is_dir()


# Lightning has handlers of its own from here on
INTERRUPTED = """
import os, runpy, signal, sys
from nemo_diffgemma.training.nemo_model import DiffusionGemmaModel
load = DiffusionGemmaModel.setup
def interrupted(self, *arguments, **named):
    os.kill(os.getpid(), signal.SIGTERM)
    return load(self, *arguments, **named)
DiffusionGemmaModel.setup = interrupted
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_signal_just_before_the_first_step_is_not_lost(tmp_path):
    found, _ = end(Command(INTERRUPTED, str(ROOT / TRAIN), *arguments(tmp_path)), PREEMPTED)
    assert found["step"] == 1 and Path(found["checkpoint"]).is_dir()


def test_a_checkpoint_that_was_cut_short_is_put_aside(tmp_path, undisturbed):
    run = tmp_path / "run" / "one"
    process = start(tmp_path, "trainer.checkpoint_every=2")
    wait_for_step(run, 5, process)
    process.send_signal(signal.SIGUSR1)
    found, _ = end(process, PREEMPTED)
    last = Path(found["checkpoint"])
    longest = max(last.glob("*.distcp"), key=lambda file: file.stat().st_size)
    os.truncate(longest, longest.stat().st_size // 2)
    _, errors = end(start(tmp_path, "trainer.checkpoint_every=2"))
    assert f"{last} is damaged" in errors
    assert lines(run) == lines(undisturbed)
    assert last.with_name(f"{last.name}.damaged").is_dir()


def test_a_disk_that_fills_is_no_refusal(tmp_path):
    """Exit code 1, with which slurm/job.sbatch starts again: 2 would end the job."""
    process = start(tmp_path, steps=100_000)
    wait_for_step(tmp_path / "run" / "one", 3, process)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100_000, 100_000))
    process.send_signal(signal.SIGUSR1)
    _, errors = end(process, 1)
    assert "TrainingError: cannot write" in errors
    assert list((tmp_path / "run" / "one" / "checkpoints").iterdir()) == []


def test_a_run_that_hangs_says_in_which_line_and_ends(tmp_path):
    run = tmp_path / "run" / "one"
    process = start(tmp_path, "trainer.hang_minutes=0.1", steps=100_000)
    wait_for_step(run, 3, process)
    # as a file system that does not answer: opening a pipe that nobody reads waits for ever
    (run / "metrics.jsonl").rename(run / "aside")
    os.mkfifo(run / "metrics.jsonl")
    _, errors = end(process, HUNG)
    assert 'nemo_diffgemma/training/callbacks.py", line' in errors and "in append_line" in errors
    assert "no step within 0.1 minutes (trainer.hang_minutes)" in errors
    assert status(run)["state"] == "hung"


def test_an_error_in_a_run_is_in_its_status(tmp_path):
    process = start(tmp_path, "optim.lr=1e30", "optim.min_lr=1e30")
    _, errors = end(process, 1)
    assert "TrainingError" in errors
    assert status(tmp_path / "run" / "one")["state"] == "failed"


HANGING = """
import time
from nemo_diffgemma.training import monitoring
monitoring._DUMP_SECONDS = 0.2
heartbeat = monitoring.Heartbeat(monitoring.Path("/nowhere"), 1)
with monitoring.Watchdog(0.005, on_hang=lambda: heartbeat.write("hung")).watching():
    time.sleep(60)  # before process groups exist: waiting for the other ranks, say
"""


def test_a_start_that_hangs_before_there_are_process_groups_ends_too(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RANK": "3"}
    done = subprocess.run([sys.executable, "-c", HANGING], capture_output=True, text=True, env=environment)
    assert done.returncode == HUNG, done.stderr
    assert f"rank 3 ends with code {HUNG}" in done.stderr and "Exception in thread" not in done.stderr
    assert "line 7 in <module>" in done.stderr, "the stacks say where"


def test_a_second_start_in_the_same_directory_leaves_the_first_alone(tmp_path):
    first = start(tmp_path, steps=100_000)
    wait_for_step(tmp_path / "run" / "one", 2, first)
    _, errors = end(start(tmp_path, steps=100_000), 2)
    assert f"process {first.pid} on" in " ".join(errors.split()) and "exp_manager.version" in errors
    assert status(tmp_path / "run" / "one")["state"] == "running"
    first.send_signal(signal.SIGKILL)
    first.communicate(timeout=60)
    process = start(tmp_path, steps=3)  # the killed one no longer holds it
    end(process)
