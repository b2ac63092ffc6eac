"""Training jobs on a real Slurm: disturbed in every way we know, they end with the losses of the undisturbed one.

A job is what a user submits, `launch/train.py cluster=testcluster ...`: 2 nodes with 2 tasks each.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.slurm.conftest import STEPS, Job, Jobs


@pytest.fixture(scope="module")
def undisturbed(jobs: Jobs) -> Job:
    job = jobs.submit()
    job.wait()
    return job


def check_resumed(job: Job, undisturbed: Job) -> None:
    """Wait for the end of a job that was disturbed once."""
    job.wait()
    assert job.losses() == undisturbed.losses(), job.known()
    status = job.status()
    assert (status["state"], status["step"], status["restarts"]) == ("finished", STEPS, 1)
    check_nothing_left(job)


def check_nothing_left(job: Job) -> None:
    job.wait_for(lambda: not job.processes(), "the end of every process", 10)


def test_an_undisturbed_job_leaves_logs_a_heartbeat_and_no_process(undisturbed):
    status = undisturbed.status()
    assert (status["state"], status["step"], status["restarts"]) == ("finished", STEPS, 0)
    logs = sorted(file.name for file in (undisturbed.run / "slurm").glob("rank-*.log"))
    assert logs == [f"rank-{rank}.log" for rank in range(4)]
    assert f'"step": {STEPS}, "loss": {undisturbed.losses()[-1]}' in undisturbed.out()
    check_nothing_left(undisturbed)


def test_the_warning_before_the_time_limit(jobs, undisturbed):
    job = jobs.submit()
    job.wait_for_step(5)
    stopped = job.rank(3)
    os.kill(stopped, signal.SIGSTOP)  # or the run would end before Slurm, which looks twice a minute, warns it
    hours, minutes, _ = map(int, job.cluster.job(job.number)["RunTime"].split(":"))
    job.limit(60 * hours + minutes + 2)
    job.wait_for(lambda: is_pending(stopped, signal.SIGUSR1), "the warning")
    os.kill(stopped, signal.SIGCONT)
    job.wait_for_restart()
    job.limit(10)
    check_resumed(job, undisturbed)
    assert "stopped by a signal, after saving; restart 1 of at most 3" in job.out()
    assert set(job.checkpoints()) - {4, 8, 12, 16}, "it saved at the warning"


def is_pending(process: int, number: signal.Signals) -> bool:
    """Whether a stopped process was sent a signal."""
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    return bool(int(status["ShdPnd"], 16) >> (number - 1) & 1)


def test_a_signal_sent_by_hand(jobs, undisturbed):
    job = jobs.submit()
    job.wait_for_step(5)
    job.cluster.call("scancel", "--signal=USR1", job.number)
    check_resumed(job, undisturbed)
    assert "stopped by a signal, after saving; restart 1 of at most 3" in job.out()


def test_a_requeue_by_an_administrator(jobs, undisturbed):
    job = jobs.submit()
    job.wait_for_step(5)
    job.cluster.scontrol("requeue", job.number)
    check_resumed(job, undisturbed)
    assert set(job.checkpoints()) - {4, 8, 12, 16}, "it saved at the signal"


def test_preemption_by_a_job_of_a_higher_partition(jobs, undisturbed):
    job = jobs.submit()
    job.wait_for_step(5)
    options = ["--partition=high", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"]
    other = job.cluster.call("sbatch", "--parsable", *options)
    check_resumed(job, undisturbed)
    assert set(job.checkpoints()) - {4, 8, 12, 16}, "it saved at the signal"
    assert job.cluster.job(other)["JobState"] == "COMPLETED"


def test_a_killed_rank(jobs, undisturbed):
    job = jobs.submit()
    job.wait_for_step(5)
    os.kill(job.rank(3), signal.SIGKILL)
    check_resumed(job, undisturbed)
    assert job.checkpoints() == [4, 8, 12, 16], "it went back to the last periodic checkpoint"


def test_a_node_that_goes_down(jobs, undisturbed):
    job = jobs.submit()
    job.wait_for_step(5)
    lost = job.nodes()[-1]
    job.cluster.scontrol("update", f"NodeName={lost}", "State=DOWN", "Reason=test")
    try:
        check_resumed(job, undisturbed)
        assert lost not in job.nodes()
    finally:
        job.cluster.scontrol("update", f"NodeName={lost}", "State=RESUME")


def test_a_node_that_fails_its_check_is_left_out(jobs, undisturbed, tmp_path):
    for node in ("n1", "n3"):
        (tmp_path / node).mkdir()
    job = jobs.submit(f"cluster.preflight.scratch={tmp_path}/%N")
    check_resumed(job, undisturbed)
    assert job.nodes() == ["n1", "n3"]
    assert "pre-flight check: n2 broken" in job.out()


def test_a_hang_is_found_and_its_line_told(jobs, undisturbed):
    job = jobs.submit("trainer.hang_minutes=0.5")
    job.wait_for_step(5)
    metrics = job.run / "metrics.jsonl"
    metrics.rename(job.run / "aside")  # as a file system that does not answer: nobody reads this pipe
    os.mkfifo(metrics)
    job.wait_for_restart()
    metrics.unlink()
    (job.run / "aside").rename(metrics)
    check_resumed(job, undisturbed)
    dumps = [(job.run / "slurm" / f"rank-{rank}.log").read_text() for rank in range(4)]
    assert "callbacks.py" in dumps[0] and "in _append" in dumps[0]
    for dump in dumps:
        assert "no step within 0.5 minutes" in dump and "Thread 0x" in dump


def test_no_more_restarts_than_configured(jobs):
    job = jobs.submit("cluster.max_restarts=1", steps=100_000)
    for restarts in (0, 1):
        job.wait_for_restart(restarts)
        job.wait_for_step(5 * (1 + restarts))
        os.kill(job.rank(1), signal.SIGKILL)
    job.wait("FAILED")
    assert "1 restarts are the limit (cluster.max_restarts): giving up" in job.out()
    check_nothing_left(job)


def test_what_every_restart_would_refuse_is_not_tried_again(jobs, tmp_path):
    job = jobs.submit(f"model.checkpoint={tmp_path}/nothing")
    job.wait("FAILED")
    assert "refused what it was given" in job.out()
    assert job.cluster.job(job.number)["Restarts"] == "0"


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


def test_a_sweep_is_an_array_with_a_table_at_its_end(jobs):
    sweep = jobs.submit(
        "cluster.nodes=1", "cluster.gpus_per_node=1", "parallel=single", "--multirun", "seed=1,2,3,4", steps=6
    )
    table = sweep.run.parent / "results.txt"
    sweep.wait_for(lambda: table.exists() and '"jobs"' in table.read_text(), "the table")
    losses = [sweep.losses(run)[-1] for run in sweep.runs]
    assert len(set(losses)) == 4
    for loss in losses:
        assert f"{loss:.4f}" in table.read_text()
