"""Training jobs on a real Slurm: disturbed in every way we know, they end with the losses of the undisturbed one.

A job is what a user submits, `launch/train.py cluster=testcluster ...`: 2 nodes with 2 tasks each. A job meets several
disturbances in turn: what costs minutes here are the starts of four ranks on two cores. `make test-slurm` leaves out
what is marked `slow`, `make test-all` does not.
"""

from __future__ import annotations

import json
import os
import signal

import pytest

from tests.slurm.conftest import EVERY, STEPS, Job, Jobs


@pytest.fixture(scope="module")
def undisturbed(jobs: Jobs) -> Job:
    job = jobs.submit()
    job.wait()
    return job


def check_resumed(job: Job, undisturbed: Job, restarts: int, saved: int) -> None:
    """Wait for the end of a job that was disturbed `restarts` times, and saved when asked to stop `saved` times."""
    job.wait()
    assert job.losses() == undisturbed.losses(), job.known()
    status = job.status()
    assert (status["state"], status["step"], status["restarts"]) == ("finished", STEPS, restarts)
    check_nothing_left(job)
    *interrupted, last = job.saved()
    assert len(interrupted) == saved and all(step < STEPS for step in interrupted) and last == STEPS
    assert set(job.checkpoints()) == {*range(EVERY, STEPS + 1, EVERY), *interrupted}


def check_nothing_left(job: Job) -> None:
    job.wait_for(lambda: not job.processes(), "the end of every process", 10)


def test_an_undisturbed_job_leaves_logs_a_heartbeat_and_no_process(undisturbed):
    status = undisturbed.status()
    assert (status["state"], status["step"], status["restarts"]) == ("finished", STEPS, 0)
    logs = sorted(file.name for file in (undisturbed.run / "slurm").glob("rank-*.log"))
    assert logs == [f"rank-{rank}.log" for rank in range(4)]
    assert f'"step": {STEPS}, "loss": {undisturbed.losses()[-1]}' in undisturbed.out()
    check_nothing_left(undisturbed)


def test_a_node_that_fails_its_check_is_left_out_then_a_killed_rank_then_the_warning_before_the_time_limit(
    jobs, undisturbed, tmp_path
):
    for node in ("n1", "n3"):
        (tmp_path / node).mkdir()
    job = jobs.submit(f"cluster.preflight.scratch={tmp_path}/%N")
    job.wait_for_checkpoint(restarts=1)
    assert job.nodes() == ["n1", "n3"]
    assert "pre-flight check: n2 broken" in job.out()
    os.kill(job.rank(3), signal.SIGKILL)
    assert job.wait_for_checkpoint(restarts=2) >= EVERY
    assert "ended with code 137; restart 2 of at most 3" in job.out()
    os.kill(job.rank(3), signal.SIGSTOP)  # until the warning: else the run would be done before Slurm looks
    job.limit(1)
    job.wait_for_restart(3)
    job.limit(10)
    check_resumed(job, undisturbed, restarts=3, saved=1)
    assert "stopped by a signal, after saving; restart 3 of at most 3" in job.out()
    assert job.nodes() == ["n1", "n3"]


@pytest.mark.slow
def test_a_killed_rank_then_a_hang_then_a_requeue_by_an_administrator(jobs, undisturbed):
    job = jobs.submit("trainer.hang_minutes=0.5")
    job.wait_for_checkpoint()
    os.kill(job.rank(3), signal.SIGKILL)
    assert job.wait_for_checkpoint(restarts=1) >= EVERY
    assert "ended with code 137; restart 1 of at most 3" in job.out()
    with job.blocked():
        job.wait_for_restart(2)
    assert job.wait_for_checkpoint(restarts=2) >= 2 * EVERY
    assert f"made no step in time, stacks are in {job.run}/slurm/rank-*.log; restart 2 of at most 3" in job.out()
    job.cluster.scontrol("requeue", job.number)
    check_resumed(job, undisturbed, restarts=3, saved=1)
    dumps = [(job.run / "slurm" / f"rank-{rank}.log").read_text() for rank in range(4)]
    assert "callbacks.py" in dumps[0] and "in append_line" in dumps[0]
    for dump in dumps:
        assert "no step within 0.5 minutes" in dump and "Thread 0x" in dump


@pytest.mark.slow
def test_a_lost_node_then_a_time_limit_without_time_to_save_then_preemption(jobs, undisturbed):
    job = jobs.submit()
    job.wait_for_checkpoint()
    lost = job.nodes()[-1]
    job.cluster.scontrol("update", f"NodeName={lost}", "State=DOWN", "Reason=test")
    try:
        assert job.wait_for_checkpoint(restarts=1) >= EVERY
        assert lost not in job.nodes()
    finally:
        job.cluster.scontrol("update", f"NodeName={lost}", "State=RESUME")
    at_loss = len(job.saved())  # Slurm ends the ranks with SIGTERM, and here those of the lost node are there to save
    with job.blocked():
        job.limit(-1)
        job.wait_for_restart(2)
    job.limit(10)
    assert job.wait_for_checkpoint(restarts=2) >= 2 * EVERY
    assert "not done, and not stopped either, at the time limit; restart 2 of at most 3" in job.out()
    assert len(job.saved()) == at_loss
    options = ["--partition=high", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"]
    other = job.cluster.call("sbatch", "--parsable", *options)
    check_resumed(job, undisturbed, restarts=3, saved=at_loss + 1)
    assert job.cluster.job(other)["JobState"] == "COMPLETED"


@pytest.mark.slow
def test_no_more_restarts_than_configured(jobs):
    job = jobs.submit("cluster.max_restarts=1", steps=100_000)
    for restarts in (0, 1):
        job.wait_for_checkpoint(restarts)
        os.kill(job.rank(1), signal.SIGKILL)
    job.wait("FAILED")
    assert "1 restarts are the limit (cluster.max_restarts): giving up" in job.out()
    check_nothing_left(job)
    job.cluster.scontrol("requeue", job.number)  # Slurm asks nobody
    job.wait_for(lambda: "restart 2 is beyond the limit (cluster.max_restarts): giving up" in job.out(), "the refusal")
    job.wait("FAILED")


ONE_PROCESS = ["cluster.nodes=1", "cluster.gpus_per_node=1", "parallel=single"]


def test_a_job_that_refuses_what_it_was_given_is_not_started_again(jobs, tmp_path):
    job = jobs.submit(f"model.checkpoint={tmp_path}/nothing", *ONE_PROCESS)
    job.wait("FAILED")
    assert "refused what it was given" in job.out()
    assert job.cluster.job(job.number)["Restarts"] == "0"


@pytest.mark.slow
def test_what_fails_twice_at_one_place_is_not_started_a_third_time(jobs):
    job = jobs.submit("optim.lr=1e30", "optim.min_lr=1e30", *ONE_PROCESS)
    job.wait("FAILED")
    assert "at the same place as the failure before: giving up" in job.out()
    assert job.cluster.job(job.number)["Restarts"] == "1"


@pytest.mark.slow
def test_the_other_scripts_do_their_work_on_the_cluster(jobs, undisturbed, tmp_path):
    checkpoint = undisturbed.run / "checkpoints" / f"step-{STEPS}"
    small = ["cluster.nodes=1", "parallel=tp2_ep2", f"cluster.jobs_dir={tmp_path}/jobs"]
    evaluation = ["data.test_puzzles=8", "steps=[2]", "levels=[0.5]"]
    bundle = [f"out={tmp_path}/bundle", "builder=tensorrt_rtx", "gpu=rtx_5090", "weights=inline", "max_context=64"]
    three = [
        jobs.run("launch/evaluate.py", f"checkpoint={checkpoint}", *evaluation, *small),
        jobs.run("launch/convert.py", f"source={checkpoint}", f"target={tmp_path}/converted", *small),
        jobs.run("export/build.py", f"checkpoint={checkpoint}", "graphs=[encode,step]", *bundle, *small),
    ]
    for job in three:
        job.wait()
        check_nothing_left(job)
    assert '"solve_rate": {"2": ' in three[0].out()
    assert (tmp_path / "converted" / "config.json").is_file()
    assert sorted(file.name for file in (tmp_path / "bundle").glob("*.engine")) == [
        f"{graph}.rank{rank}.engine" for graph in ("encode", "step") for rank in (0, 1)
    ]


@pytest.mark.slow
def test_a_sweep_is_an_array_with_a_table_at_its_end(jobs):
    """Of five runs one is cancelled while it works; another, whose number is that of the array, is killed once."""
    sweep = jobs.submit(*ONE_PROCESS, "--multirun", "seed=1,2,3,4,5", steps=6)
    cancelled, killed = sweep.element(0), sweep.element(4)
    os.kill(killed.rank(0), signal.SIGKILL)
    cancelled.rank(0)
    cancelled.cluster.call("scancel", cancelled.number)
    table = sweep.run.parent / "results.txt"
    sweep.wait_for(lambda: table.exists() and '"jobs"' in table.read_text(), "the table")
    rows = json.loads(table.read_text().splitlines()[-1])["jobs"]
    assert [row["state"] for row in rows] == ["CANCELLED", *4 * ["COMPLETED"]]
    assert [row["restarts"] for row in rows] == [0, 0, 0, 0, 1]
    losses = [sweep.losses(run)[-1] for run in sweep.runs[1:]]
    assert len(set(losses)) == 4
    for loss in losses:
        assert f"{loss:.4f}" in table.read_text()
    check_nothing_left(cancelled)
