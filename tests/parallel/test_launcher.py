"""What launchers say in the environment, whole or in part, inherited or meant."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from nemo_diffgemma.parallel import launcher
from nemo_diffgemma.parallel.launcher import LauncherError, started_by_launcher
from nemo_diffgemma.repository import ROOT

STEP = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "77"}


@pytest.fixture
def environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SLURM_", "MASTER_", "TORCHELASTIC_")) or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", "/nowhere")  # no scontrol

    def set(**values: str) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    yield set
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)


def test_nothing_said_is_one_process(environment):
    assert not started_by_launcher()
    environment(SLURM_STEP_NUM_TASKS="1", SLURM_JOB_ID="77")
    assert not started_by_launcher()


def test_a_step_of_several_tasks_is_named_as_torchrun_does(environment):
    environment(**STEP, SLURM_STEP_NODELIST="node7")
    assert started_by_launcher()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    assert [os.environ[name] for name in names] == ["1", "4", "1", "node7", "20077"]


@pytest.mark.parametrize(
    "said", [{"SLURM_PTY_PORT": "1"}, {"SLURM_JOB_NAME": "interactive"}, {"SLURM_JOB_NAME": "zsh"}]
)
def test_in_an_interactive_shell_a_command_runs_alone_and_says_so(environment, capsys, monkeypatch, said):
    monkeypatch.setattr(os, "isatty", lambda descriptor: True)
    environment(**{**STEP, **said, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_TASK_PID": "1"})
    assert not started_by_launcher()
    assert "running alone" in capsys.readouterr().err and "RANK" not in os.environ
    environment(SLURM_TASK_PID=str(os.getpid()), MASTER_ADDR="a")  # srun --pty python ...: a task itself
    assert started_by_launcher()


@pytest.mark.parametrize("task", ["0", "1"])
def test_scripts_that_srun_starts_in_an_allocation_of_salloc_are_the_ranks_of_one_run(environment, monkeypatch, task):
    monkeypatch.setattr(os, "isatty", lambda descriptor: False)
    given = {"SLURM_JOB_NAME": "interactive", "SLURM_TASK_PID": "1", "SLURM_PROCID": task, "MASTER_ADDR": "a"}
    environment(**{**STEP, **given})
    assert started_by_launcher() and os.environ["RANK"] == task


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({**STEP, "SLURM_STEP_NODELIST": "n[1-2]"}, "scontrol cannot say which node is the first of 'n\\[1-2\\]'"),
        (STEP, "set MASTER_ADDR to its name, or run alone: env -u RANK"),
        ({**STEP, "SLURM_PROCID": "one", "MASTER_ADDR": "a"}, "SLURM_PROCID is 'one'; expected a whole number"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_PROCID is not set"),
        ({"SLURM_STEP_NUM_TASKS": "many"}, "SLURM_STEP_NUM_TASKS is 'many'"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK is 'x'"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "expected ranks from 0 to 1"),
    ],
)
def test_what_is_incomplete_or_no_number_is_refused_by_name(environment, given, told):
    environment(**given)
    with pytest.raises(LauncherError, match=told):
        started_by_launcher()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "MASTER_ADDR and MASTER_PORT are not set"),
        ({"MASTER_ADDR": "a"}, "MASTER_PORT is not set"),
        ({"MASTER_ADDR": "a", "MASTER_PORT": "p"}, "MASTER_PORT is 'p'"),
    ],
)
def test_processes_that_cannot_meet_are_told_how_they_could(environment, given, told):
    environment(RANK="0", WORLD_SIZE="2", **given)
    with pytest.raises(LauncherError, match=told):
        launcher.join("gloo", None)


WAITS = """
import signal, threading, os
from datetime import timedelta
from nemo_diffgemma.cli import signals
from nemo_diffgemma.parallel import launcher
launcher._QUIET_SECONDS, signals._STUCK_SECONDS = 0.3, 0.3
print_note = launcher._say_who_is_awaited
def note():
    print_note()
    os.kill(os.getpid(), signal.SIGTERM)
launcher._say_who_is_awaited = note
with signals.leaving_at_signals():
    launcher.join("gloo", timedelta(minutes=30))
"""


def test_who_waits_says_for_whom_and_can_be_ended():
    from tests.pool import free_port

    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "RANK": "1", "WORLD_SIZE": "3"}
    environment = {**os.environ, **meeting, "RANK": "0"}
    done = subprocess.run([sys.executable, "-c", WAITS], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 143, done.stderr
    assert "rank 0 of 3 has waited 0 s at 127.0.0.1" in done.stderr and "for all of ranks 1, 2." in done.stderr
