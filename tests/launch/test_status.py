"""The status table, from run directories and a scontrol that says what Slurm's says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

SCRIPT = str(Path(__file__).resolve().parents[2] / "launch" / "status.py")


def heartbeat(run: Path, **changes: Any) -> Path:
    (run / "slurm").mkdir(parents=True)
    status = dict(
        state="running", step=12, max_steps=30, loss=1.23456, tokens_per_second=4321.0, job=None, restarts=1,
        checkpoint=f"{run}/checkpoints/step-8", time=time.time() - 7,
    )  # fmt: skip
    (run / "status.json").write_text(json.dumps(status | changes))
    return run


def status(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": str(path)}
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, env=environment)


def scontrol(directory: Path, *jobs: str) -> Path:
    """A scontrol that knows these jobs."""
    file = directory / "bin" / "scontrol"
    file.parent.mkdir()
    (directory / "jobs").write_text("".join(f"{job}\n" for job in jobs))
    file.write_text(f"#!/bin/sh\n/bin/cat '{directory}/jobs'\n")
    file.chmod(0o755)
    return file.parent


def test_a_run_directory_is_enough(tmp_path):
    done = status("--once", str(heartbeat(tmp_path / "mine")))
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout.splitlines()[-1])["jobs"][0]
    assert (row["state"], row["step"], row["checkpoint"], row["restarts"]) == ("running", 12, 8, 1)
    assert 7 <= row["age"] < 60
    for shown in ("12/30", "1.2346", "4,321", "step-8"):
        assert shown in done.stdout


def test_a_job_is_found_by_its_output_file(tmp_path):
    run = heartbeat(tmp_path / "mine")
    known = f"JobId=17 JobName=x Restarts=2 JobState=RUNNING NodeList=n[1-2] StdOut={run}/slurm/job-17.out Power="
    row = json.loads(status("--once", "17", path=scontrol(tmp_path, known)).stdout.splitlines()[-1])["jobs"][0]
    assert (row["job"], row["state"], row["nodes"], row["restarts"]) == ("17", "RUNNING", "n[1-2]", 2)


def test_a_sweep_has_a_row_for_every_element_also_those_that_wait(tmp_path):
    for number in (0, 1):
        heartbeat(tmp_path / "sweep" / str(number), step=number + 1)
    out = f"StdOut={tmp_path}/sweep/slurm/job-5_%a.out"
    path = scontrol(
        tmp_path,
        f"JobId=5 ArrayJobId=5 ArrayTaskId=2-3 JobState=PENDING NodeList=(null) Restarts=0 {out}",
        f"JobId=7 ArrayJobId=5 ArrayTaskId=1 JobState=RUNNING NodeList=n2 Restarts=0 {out}",
        f"JobId=6 ArrayJobId=5 ArrayTaskId=0 JobState=COMPLETED NodeList=n1 Restarts=0 {out}",
    )
    rows = json.loads(status("--once", "5", path=path).stdout.splitlines()[-1])["jobs"]
    assert [row["job"] for row in rows] == ["5_0", "5_1", "5_2", "5_3"]
    assert [row["step"] for row in rows] == [1, 2, None, None]


def test_it_follows_until_the_job_has_ended(tmp_path):
    run = heartbeat(tmp_path / "mine", state="finished", step=30)
    done = status(str(run))
    assert done.returncode == 0 and "30/30" in done.stdout


def test_it_ends_when_slurm_has_forgotten_the_job(tmp_path):
    run = heartbeat(tmp_path / "mine", state="preempted")
    known = f"JobId=17 JobState=RUNNING Restarts=2 NodeList=n1 StdOut={run}/slurm/job-17.out Power="
    path = scontrol(tmp_path, known)
    # the second time it knows nothing
    (path / "scontrol").write_text(f"#!/bin/sh\n/bin/cat '{tmp_path}/jobs'\n: >'{tmp_path}/jobs'\n")
    done = status("17", path=path)
    assert done.returncode == 0, done.stderr
    assert "preempted" in done.stdout


def test_a_run_that_waits_for_its_start_is_known_by_its_directory(tmp_path):
    run = tmp_path / "mine"
    (run / "slurm").mkdir(parents=True)
    (run / "slurm" / "job").write_text("17")
    path = scontrol(tmp_path, "JobId=17 JobState=PENDING NodeList=(null) Restarts=0")
    row = json.loads(status("--once", str(run), path=path).stdout.splitlines()[-1])["jobs"][0]
    assert (row["job"], row["state"], row["step"]) == ("17", "PENDING", None)


@pytest.mark.parametrize(
    ("job", "known", "told"),
    [
        ("17", [], "Slurm does not know job 17 (any more); give its run directory instead"),
        ("17", None, "there is no scontrol here"),
        ("nowhere", None, "nowhere is no run directory"),
    ],
)
def test_what_cannot_be_found_is_one_paragraph(tmp_path, job, known, told):
    path = tmp_path / "empty" if known is None else scontrol(tmp_path, *known)
    done = status("--once", job, path=path)
    assert (done.returncode, done.stdout) == (2, "")
    assert told in " ".join(done.stderr.split())
