"""Two runs never write into one directory, and a dead one does not keep it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from nemo_diffgemma.errors import ConfigurationError
from nemo_diffgemma.repository import ROOT
from nemo_diffgemma.training import run_lock
from nemo_diffgemma.training.run_lock import RunLock

TOUCH = 0.1


@pytest.fixture(params=["flock", "no flock"])
def file(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A lock on a file system that knows flock, and on one that does not."""
    if request.param == "no flock":

        def refuse(descriptor: int, operation: int) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "flock", refuse)
    return tmp_path / "lock"


def written(file: Path, **holder: object) -> None:
    ours = {"host": socket.gethostname(), "pid": os.getpid(), "started": run_lock._start_of(os.getpid()), "job": None}
    file.write_text(json.dumps({**ours, "since": "2026-11-25 10:00:00", **holder}))


def test_a_second_one_is_refused_with_the_name_of_the_first_and_has_it_afterwards(file):
    first, second = RunLock(file, TOUCH), RunLock(file, TOUCH)
    first.acquire()
    with pytest.raises(ConfigurationError, match=f"process {os.getpid()} on {socket.gethostname()} works in") as told:
        second.acquire()
    assert "exp_manager.version" in str(told.value)
    assert "token" in json.loads(file.read_text()), "the refused one has changed nothing"
    first.release()
    second.acquire()
    second.release()
    assert file.read_text() == ""


@pytest.mark.parametrize(
    "holder",
    [
        {"pid": 2**22 + 1},  # beyond the largest
        {"started": "1"},  # its number belongs to another process now
        {"host": "node17", "job": "31"},  # elsewhere: nobody touches the file
    ],
    ids=["dead", "number used again", "elsewhere"],
)
def test_the_lock_of_a_dead_one_is_taken_over(file, holder):
    written(file, **holder)
    lock = RunLock(file, TOUCH)
    lock.acquire()
    assert json.loads(file.read_text())["pid"] == os.getpid()
    lock.release()


def test_a_requeued_job_waits_for_its_own_start_before(file, monkeypatch):
    """Slurm starts it anew while the old one ends, or while a file server still keeps the lock of a lost node."""
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    first = RunLock(file, TOUCH)
    first.acquire()
    with pytest.raises(TimeoutError, match="job 77"):  # no user's mistake: the job may be started again
        RunLock(file, TOUCH, patience_seconds=0.3).acquire()
    ends = threading.Timer(0.5, first.release)
    ends.start()
    second = RunLock(file, TOUCH, patience_seconds=30)
    second.acquire()
    ends.join()
    second.release()


def test_a_holder_that_has_no_name_yet_or_any_more_is_waited_for(tmp_path):
    """Between flock and its name in the file, at either end."""
    file = tmp_path / "lock"
    with file.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(TimeoutError, match="waited for"):
            RunLock(file, TOUCH, patience_seconds=0.3).acquire()
        ends = threading.Timer(0.3, fcntl.flock, (stream, fcntl.LOCK_UN))
        ends.start()
        second = RunLock(file, TOUCH, patience_seconds=30)
        second.acquire()
        ends.join()
        second.release()


def test_a_damaged_lock_is_taken_over(file):
    file.write_text('{"host": "no')
    lock = RunLock(file, TOUCH)
    lock.acquire()
    lock.release()


TOUCHING = """
import os, sys, time
print(flush=True)
while True:
    os.utime(sys.argv[1])
    time.sleep(0.02)
"""  # RunLock does so in a thread


def test_one_that_lives_on_another_machine_keeps_it(file):
    written(file, host="node17", job="31")
    with subprocess.Popen([sys.executable, "-c", TOUCHING, str(file)], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None and process.stdout.readline()
            with pytest.raises(ConfigurationError, match="on node17, job 31 works in"):
                RunLock(file, 20 * TOUCH).acquire()
        finally:
            process.kill()


HOLDING = """
import sys, time
from pathlib import Path
from nemo_diffgemma.training.run_lock import RunLock
RunLock(Path(sys.argv[1]), 0.1).acquire()
print(flush=True)
time.sleep(600)
"""


def test_a_process_that_is_killed_lets_go_of_it(file):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HOLDING, str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        try:
            assert process.stdout is not None and process.stdout.readline()
            with pytest.raises(ConfigurationError, match=f"process {process.pid} on"):
                RunLock(file, TOUCH).acquire()
        finally:
            process.kill()
    lock = RunLock(file, TOUCH)
    lock.acquire()
    lock.release()
