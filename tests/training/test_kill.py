"""A run that is killed at any moment goes on from its last complete checkpoint and ends as if it had not been."""

from __future__ import annotations

import itertools
import random
import signal
import time
from pathlib import Path

import pytest

from nemo_diffgemma.checkpoint import sharded
from nemo_diffgemma.training.run_directory import complete_checkpoints, last_checkpoint, step_of
from tests.commands import Command
from tests.training.test_monitoring import end, lines, start, status

STEPS = 16
SAVING = ("trainer.checkpoint_every=1", "trainer.keep_last=3")  # so that a moment lies in a save as likely as in a step


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("undisturbed")
    end(start(directory, steps=STEPS))
    return directory / "run" / "one"


def is_saving(run: Path) -> bool:
    """Whether a checkpoint is half-written; one that is half removed ends in `.removed.partial`."""
    return any("removed" not in path.name for path in (run / "checkpoints").glob(".step-*.partial"))


def wait_for_a_save(run: Path, process: Command) -> None:
    """Until a checkpoint is being written, or the run is over."""
    for _ in itertools.count():
        if process.poll() is not None or is_saving(run):
            return
        time.sleep(0.001)


def is_running(run: Path, process: Command) -> bool:
    """Whether this process is past its start: the file is of the one before until it writes its own."""
    assert process.poll() in (None, 0), process.communicate(60)
    return process.poll() == 0 or status(run)["state"] in ("running", "finished")


@pytest.mark.parametrize("kills", [pytest.param(3, id="3"), pytest.param(30, id="30", marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_ends_with_the_loss_of_the_undisturbed_run(tmp_path, undisturbed, kills):
    moments, attempt, killed, in_a_save = random.Random(kills), 0, 0, 0
    while killed < kills:
        attempt += 1
        directory = tmp_path / str(attempt)
        run = directory / "run" / "one"
        while True:  # a run, killed and started again until it ends
            before = last_checkpoint(run)
            (run / "status.json").unlink(missing_ok=True)
            process = start(directory, *SAVING, steps=STEPS)
            if killed < kills:
                while not (run / "status.json").exists() or not is_running(run, process):
                    time.sleep(0.005)
                assert before is None or step_of(before) <= status(run)["step"], "it goes on from the last complete one"
                if killed % 2:  # a moment of the steps, or of a save
                    time.sleep(moments.uniform(0, 1.0))
                else:
                    wait_for_a_save(run, process)
                    time.sleep(moments.uniform(0, 0.03))
                process.send_signal(signal.SIGKILL)
                process.communicate(60)
                killed += process.returncode == -signal.SIGKILL
                in_a_save += is_saving(run)
                for checkpoint in complete_checkpoints(run):
                    sharded._check_sizes(checkpoint, sharded.read_metadata(checkpoint))
                if process.returncode == -signal.SIGKILL:
                    continue
            else:
                end(process)
            break
        assert lines(run) == lines(undisturbed)
        assert status(run)["state"] == "finished"
        assert [step_of(checkpoint) for checkpoint in complete_checkpoints(run)] == [STEPS, STEPS - 1, STEPS - 2]
        assert len(list((run / "checkpoints").iterdir())) == 3, "nothing half-written, nothing damaged"
    assert killed >= kills
    if kills >= 30:
        assert in_a_save, "no kill was in a save: not the test that it says it is"
