"""A real Slurm for the session, and jobs as a user submits them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import Cluster, wait_for

ROOT = Path(__file__).resolve().parents[2]
STEPS, EVERY = 24, 2  # of a run; between its checkpoints
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
SECONDS = 300  # from the submission to the end, a restart included: importing NeMo costs ten seconds a rank


class Job:
    """A submitted job of one run, or of a sweep."""

    def __init__(self, cluster: Cluster, number: str, runs: list[str]) -> None:
        self.cluster, self.number, self.runs = cluster, number, [Path(run) for run in runs]
        self.run = self.runs[0]

    def element(self, number: int) -> Job:
        """One run of a sweep as a job."""
        return Job(self.cluster, f"{self.number}_{number}", [str(self.runs[number])])

    def out(self) -> str:
        folder = self.run.parent if "_" in self.number else self.run
        file = folder / "slurm" / f"job-{self.number}.out"
        return file.read_text(errors="replace") if file.exists() else ""

    def known(self) -> str:
        """For a failing test."""
        return f"job {self.cluster.job(self.number)}\n\n{self.out()[-6000:]}\n\n{self.cluster.log()}"

    def wait_for(self, claim: Any, what: str, timeout: float = SECONDS) -> None:
        wait_for(claim, lambda: f"waited for {what} of {self.known()}", timeout)

    def wait(self, state: str = "COMPLETED") -> None:
        self.wait_for(lambda: self.cluster.job(self.number)["JobState"] in ENDED, "the end")
        assert self.cluster.job(self.number)["JobState"] == state, self.known()

    def wait_for_checkpoint(self, restarts: int = 0) -> int:
        """Until a start of this job is beyond a checkpoint of its own -> about where it began."""
        began: list[int] = []

        def reached() -> bool:
            assert self.cluster.job(self.number)["JobState"] not in ENDED, self.known()
            status = self.status()
            if (status.get("state"), status.get("restarts")) != ("running", restarts):
                return False
            began[:] = began or [status["step"]]
            return len(self.lines()) > began[0] + EVERY

        self.wait_for(reached, f"a checkpoint after {restarts} restarts")
        return began[0]

    def wait_for_restart(self, restarts: int) -> None:
        """Until Slurm has put the job back into its queue."""

        def is_back() -> bool:
            known = self.cluster.job(self.number)
            return int(known["Restarts"]) >= restarts and known["JobState"] in ("PENDING", "RUNNING")

        self.wait_for(is_back, f"restart {restarts}")

    def limit(self, minutes: int) -> None:
        """Let the time limit be so many whole minutes from now, and what has begun of one, as an administrator may."""
        hours, begun, _ = map(int, self.cluster.job(self.number)["RunTime"].split(":"))
        limit = max(1, 60 * hours + begun + 1 + minutes)
        self.cluster.scontrol("update", f"JobId={self.number}", f"TimeLimit={limit}")

    @contextmanager
    def blocked(self) -> Iterator[None]:
        """Let rank 0 hang as with a file system that does not answer: nobody reads the pipe that it writes to."""
        metrics = self.run / "metrics.jsonl"
        metrics.rename(self.run / "aside")
        os.mkfifo(metrics)
        yield
        metrics.unlink()
        (self.run / "aside").rename(metrics)

    def status(self) -> dict[str, Any]:
        file = self.run / "status.json"
        return json.loads(file.read_text()) if file.exists() else {}

    def lines(self, run: Path | None = None) -> list[dict[str, Any]]:
        file = (run or self.run) / "metrics.jsonl"
        try:
            return [json.loads(line) for line in file.read_text().splitlines()]
        except (FileNotFoundError, json.JSONDecodeError):
            return []

    def losses(self, run: Path | None = None) -> list[float]:
        return [line["loss"] for line in self.lines(run)]

    def nodes(self) -> list[str]:
        return self.cluster.hosts(self.cluster.job(self.number)["NodeList"])

    def processes(self, **environment: str) -> list[int]:
        mine, _, element = self.number.partition("_")
        names = {"SLURM_ARRAY_JOB_ID": mine, "SLURM_ARRAY_TASK_ID": element} if element else {"SLURM_JOB_ID": mine}
        return self.cluster.processes(SLURM_CONF=self.cluster.environment["SLURM_CONF"], **names, **environment)

    def rank(self, rank: int) -> int:
        """The process of a rank, once it is there."""
        found: list[int] = []

        def is_there() -> bool:
            mine = self.processes(SLURM_PROCID=str(rank))
            found[:] = [pid for pid in mine if b"launch/train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
            return bool(found)

        self.wait_for(is_there, f"rank {rank}")
        return min(found)

    def saved(self) -> list[int]:
        """Steps of the last checkpoints of all starts that had time for one."""
        told = (self.run / "slurm" / "rank-0.log").read_text()
        return [json.loads(line)["step"] for line in told.splitlines() if line.startswith('{"run_dir"')]

    def checkpoints(self) -> list[int]:
        return sorted(int(d.name.removeprefix("step-")) for d in (self.run / "checkpoints").glob("step-*"))


class Jobs:
    """Submits what a user types."""

    def __init__(self, cluster: Cluster, directory: Path) -> None:
        self.cluster, self.directory, self.count = cluster, directory, 0

    def run(self, script: str, *overrides: str) -> Job:
        """A script of ours with cluster=testcluster."""
        command = [sys.executable, script, "cluster=testcluster", *overrides]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=self.cluster.environment)
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout.splitlines()[-1])
        assert re.search(rf"follow +python launch/status.py {told['job']}\b", done.stdout)
        return Job(self.cluster, told["job"], told["runs"])

    def submit(self, *overrides: str, steps: int = STEPS) -> Job:
        """Sudoku in TP2 x EP2 on 2 nodes with 2 tasks each, two replicas."""
        self.count += 1
        return self.run(
            "launch/train.py", "parallel=tp2_ep2", "data.global_batch_size=8",
            f"trainer.max_steps={steps}", f"trainer.checkpoint_every={EVERY}", "optim.warmup_steps=2",
            "trainer.progress=false", "exp_manager.tensorboard=false", f"exp_manager.exp_dir={self.directory}",
            f"exp_manager.name=run{self.count}", "exp_manager.version=one", *overrides,
        )  # fmt: skip


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    # munge wants folders that everybody may enter, which pytest's are not
    with tempfile.TemporaryDirectory(prefix="testcluster.") as directory:
        running, reason = Cluster.started(Path(directory))
        if running is None:
            pytest.skip(reason)
        yield running
        running.stop()


@pytest.fixture(scope="session")
def jobs(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    return Jobs(cluster, tmp_path_factory.mktemp("runs"))
