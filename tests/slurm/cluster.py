"""The test cluster and its jobs, from Python: slurm/testcluster/cluster.sh and Slurm's own commands."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).resolve().parents[2] / "slurm" / "testcluster" / "cluster.sh"
NOT_POSSIBLE = 77  # its exit code where Slurm cannot be installed


class Cluster:
    """A running cluster. `started` gives None and the reason where there can be none."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.environment = {**os.environ, "SLURM_CONF": str(directory / "etc" / "slurm.conf")}
        self.environment.pop("TMPDIR", None)

    @classmethod
    def started(cls, directory: Path) -> tuple[Cluster | None, str]:
        found = subprocess.run([SCRIPT, "install"], capture_output=True, text=True)
        if found.returncode == NOT_POSSIBLE:
            return None, found.stderr.strip()
        subprocess.run([SCRIPT, "start", directory], check=True)
        return cls(directory), ""

    def stop(self) -> None:
        subprocess.run([SCRIPT, "stop", self.directory], check=True)

    def call(self, *command: Any) -> str:
        """Output of a command of Slurm's, which gives up sooner than two busy cores."""
        for _ in range(3):
            done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=self.environment)
            if done.returncode == 0:
                return done.stdout.strip()
            time.sleep(1)
        raise AssertionError(f"{command} ended with {done.returncode}: {done.stderr}")

    def scontrol(self, *arguments: Any) -> str:
        return self.call("scontrol", *arguments)

    def job(self, number: str) -> dict[str, str]:
        """What Slurm knows of a job."""
        return dict(re.findall(r"(?:^|\s)(\w[\w:/]*)=(\S*)", self.scontrol("show", "job", "-o", number)))

    def hosts(self, nodes: str) -> list[str]:
        """n[1-2] -> n1, n2."""
        return [] if nodes in ("", "(null)") else self.scontrol("show", "hostnames", nodes).split()

    def processes(self, **environment: str) -> list[int]:
        """Processes whose environment has all of these, which Slurm sets for the tasks of a job."""
        wanted = {f"{name}={value}".encode() for name, value in environment.items()}
        found = []
        for entry in Path("/proc").glob("[0-9]*/environ"):
            try:
                if wanted <= set(entry.read_bytes().split(b"\0")):
                    found.append(int(entry.parent.name))
            except OSError:
                continue  # it has ended
        return found

    def log(self) -> str:
        return "\n".join((self.directory / "log" / "slurmctld.log").read_text().splitlines()[-15:])


def wait_for(claim: Callable[[], Any], what: Callable[[], str], timeout: float) -> None:
    """Until a claim is true; fails with what is known then."""
    deadline = time.monotonic() + timeout
    while not claim():
        assert time.monotonic() < deadline, what()
        time.sleep(0.2)
