"""What the nodes of a job must show before work starts on them. Run by slurm/job.sbatch, one task a node:

    python slurm/preflight.py --report DIR --nodes n1,n2 --gpus 8 --device cuda --scratch /tmp ...
    python slurm/preflight.py --verdict DIR --nodes n1,n2      # afterwards: the broken nodes; exit code 0, 87 or 1

Each node looks at its GPUs, disk, shared memory and clock, and does an all-reduce with the others. It writes what it
found to DIR/<node>.json and ends with code 0 whatever that is, so that nobody's report is cut short; a node without a
report is broken, unless none has one. If the all-reduce fails, tests of pairs show which node is to blame.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing.forkserver
import os
import shutil
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

BROKEN_NODE = 87
_SHM = "/dev/shm"
# This process asks CUDA for its GPUs, and a copy of a process that has cannot use them: children are copies of a server
# that has only imported torch, which takes seconds in each child that is started anew.
_CHILDREN = multiprocessing.get_context("forkserver")


def main() -> None:
    arguments = _parser().parse_args()
    nodes = arguments.nodes.split(",")
    if arguments.verdict is not None:
        broken, problems = verdict(arguments.verdict, nodes)
        for line in problems:
            print(line, file=sys.stderr)
        print(*broken)
        raise SystemExit(BROKEN_NODE if broken else int(bool(problems)))
    report = Report(arguments.report, os.environ.get("SLURMD_NODENAME", socket.gethostname()))
    last = threading.Timer(arguments.timeout, report.give_up, [f"not done within {arguments.timeout:g} s (--timeout)"])
    last.daemon = True
    last.start()
    _CHILDREN.set_forkserver_preload(["torch"])
    multiprocessing.forkserver.ensure_running()  # imports torch beside the local checks
    check(arguments, nodes, report)
    report.write()
    os._exit(0)  # without waiting for what hangs


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", required=True, help="names of the job's nodes in the order of their ranks")
    parser.add_argument("--report", type=Path, help="directory for what the nodes find")
    parser.add_argument("--verdict", type=Path, help="the same directory, afterwards")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--scratch", default=tempfile.gettempdir(), help="%%N is the node's name")
    parser.add_argument("--min-free-gb", type=float, default=10.0)
    parser.add_argument("--min-shm-gb", type=float, default=1.0)
    parser.add_argument("--max-clock-skew", type=float, default=5.0, help="seconds from the median")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for everything")
    return parser


# -- reports -----------------------------------------------------------------------------------------------------------


class Report:
    """What one node found: `problems` are its own, `blames` names others."""

    def __init__(self, directory: Path, node: str) -> None:
        self.file, self.node = directory / f"{node}.json", node
        self.problems: list[str] = []
        self.blames: dict[str, str] = {}  # node -> what for
        self.failed: str | None = None  # what went wrong where nobody can be blamed
        self.started = time.monotonic()

    def write(self) -> None:
        """Whole or not at all; problems also on standard error."""
        seconds = round(time.monotonic() - self.started, 1)
        report = dict(node=self.node, problems=self.problems, blames=self.blames, failed=self.failed, seconds=seconds)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        partial = self.file.with_suffix(".partial")
        partial.write_text(json.dumps(report) + "\n")
        partial.replace(self.file)
        for problem in self.problems:
            print(f"pre-flight check of {self.node}: {problem}", file=sys.stderr, flush=True)

    def give_up(self, why: str) -> None:
        self.failed = why
        self.write()
        os._exit(0)


def verdict(directory: Path, nodes: list[str]) -> tuple[list[str], list[str]]:
    """Broken nodes, and what is wrong in sentences (also where no node is to blame); both empty where all is well.

    If every one of several nodes fails, the demands are probably wrong: then no node counts as broken.
    """
    reports = {}
    for node in nodes:
        file = directory / f"{node}.json"
        if file.is_file():
            reports[node] = json.loads(file.read_text())
    if not reports:
        return [], ["no node has reported: the check was cut off, or could not start (see the job's output)"]
    problems = [f"{node}: no report" for node in nodes if node not in reports]
    problems += [f"{node}: {problem}" for node, report in reports.items() for problem in report["problems"]]
    broken = [node for node in nodes if node not in reports or reports[node]["problems"]]
    if len(broken) == len(nodes) > 1:
        return [], [*problems, "every node fails: does cluster.preflight ask for what these nodes have?"]
    if broken:
        return broken, problems
    blames = Counter(other for report in reports.values() for other in report["blames"])
    problems = [
        f"{other}: {why} (says {node})" for node, report in reports.items() for other, why in report["blames"].items()
    ]
    problems += [f"{node}: {report['failed']}" for node, report in reports.items() if report["failed"]]
    return [node for node in nodes if blames[node] > len(reports) / 2], problems


# -- checks of one node ------------------------------------------------------------------------------------------------


def local_problems(arguments: argparse.Namespace, node: str) -> list[str]:
    """What is wrong here, looking at this node alone."""
    problems = []
    gpus = visible_gpus(arguments.device)
    if gpus != arguments.gpus:
        problems.append(f"{gpus} GPUs are visible, expected {arguments.gpus}")
    elif arguments.device == "cuda" and not _alone(_use_gpus, 60.0):
        problems.append("a multiplication on each GPU and an all-reduce among them fail; see above")
    scratch = Path(arguments.scratch.replace("%N", node))
    for place, least, option in (
        (scratch, arguments.min_free_gb, "scratch"),
        (Path(_SHM), arguments.min_shm_gb, "shm"),
    ):
        try:
            tempfile.TemporaryFile(dir=place).close()
            free = shutil.disk_usage(place).free / 1e9
            if free < least:
                problems.append(f"{place} has {free:.1f} GB free, expected {least:g} (cluster.preflight.*{option}*)")
        except OSError as error:
            problems.append(f"{place} cannot be written ({error})")
    return problems


def visible_gpus(device: str) -> int:
    """On a machine without GPUs, as many as Slurm pretends."""
    if device == "cuda":
        import torch

        return torch.cuda.device_count()
    return len([part for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part])


def _use_gpus() -> None:
    import torch
    from torch.cuda import nccl

    gpus = range(torch.cuda.device_count())
    squares = [torch.ones(512, 512, device=f"cuda:{gpu}") @ torch.ones(512, 512, device=f"cuda:{gpu}") for gpu in gpus]
    nccl.all_reduce(squares)
    for square in squares:
        assert square.eq(512 * len(gpus)).all(), f"wrong numbers on {square.device}"


def _alone(work: Callable[..., None], seconds: float, *arguments: Any) -> bool:
    """Whether `work` succeeds in time in a process of its own, which may hang or die."""
    child = _CHILDREN.Process(target=work, args=arguments, daemon=True)
    child.start()
    child.join(seconds)
    if child.is_alive():
        child.kill()
    return child.exitcode == 0


# -- checks of all nodes together --------------------------------------------------------------------------------------


class Meeting:
    """The nodes of a job at a store that the first of them keeps.

    `seconds` are for an exchange or an all-reduce, `patience` for the first of them: nodes may come late.
    """

    def __init__(self, nodes: list[str], rank: int, device: str, seconds: float, patience: float) -> None:
        from torch.distributed import TCPStore

        self.nodes, self.rank, self.backend = nodes, rank, "nccl" if device == "cuda" else "gloo"
        # beside the port of the work itself, which may start at once
        self.address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]) + 1
        self.seconds, self.patience = seconds, patience
        self.store = TCPStore(*self.address, None, rank == 0, timedelta(seconds=patience), wait_for_workers=False)

    def exchange(self, what: str, mine: Any, seconds: float | None = None) -> dict[str, Any]:
        """What every node says to `what`; nodes that say nothing in time are left out."""
        self.store.set(f"{what}/{self.rank}", json.dumps(mine))
        keys = {node: f"{what}/{rank}" for rank, node in enumerate(self.nodes)}
        try:
            self.store.wait(list(keys.values()), timedelta(seconds=seconds or self.seconds))
        except RuntimeError:
            keys = {node: key for node, key in keys.items() if self.store.check([key])}
        return {node: json.loads(self.store.get(key)) for node, key in keys.items()}

    def leave(self) -> None:
        """The store lives in the first node's process, which stays until the others have read what they want."""
        with contextlib.suppress(RuntimeError):
            self.store.set(f"bye/{self.rank}", "")
            if self.rank == 0:
                self.store.wait([f"bye/{rank}" for rank in range(len(self.nodes))], timedelta(seconds=self.seconds))

    def reduces(self, name: str, ranks: list[int]) -> bool:
        """Whether an all-reduce of these nodes gives the right sum, here."""
        return _alone(_reduce, self.seconds, self.address, self.backend, name, ranks.index(self.rank), len(ranks))


def _reduce(address: tuple[str, int], backend: str, name: str, rank: int, size: int) -> None:
    import torch
    import torch.distributed as dist

    store = dist.PrefixStore(name, dist.TCPStore(*address, None, False))
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    numbers = torch.full((1 << 20,), rank + 1.0, device="cuda" if backend == "nccl" else "cpu")
    dist.all_reduce(numbers)
    assert numbers.eq(size * (size + 1) / 2).all(), "the all-reduce gives wrong sums"


def check(arguments: argparse.Namespace, nodes: list[str], report: Report) -> None:
    """Fill the report."""
    rank = int(os.environ["SLURM_PROCID"])
    report.problems = local_problems(arguments, report.node)
    report.write()
    if len(nodes) == 1:
        return
    try:
        # beside local checks, three all-reduces at most have to end in time
        meeting = Meeting(nodes, rank, arguments.device, arguments.timeout * 0.15, arguments.timeout * 0.4)
    except (RuntimeError, OSError) as error:
        report.blames[nodes[0]] = f"its store cannot be reached ({str(error).splitlines()[0]})"
        return
    try:
        check_across_nodes(meeting, report, arguments.max_clock_skew)
    except RuntimeError as error:
        report.blames[nodes[0]] = f"its store is gone ({str(error).splitlines()[0]})"
    finally:
        meeting.leave()


def check_across_nodes(meeting: Meeting, report: Report, max_skew: float) -> None:
    """Checks that need all nodes: clocks and collectives."""
    came = meeting.exchange("problems", report.problems, meeting.patience)
    report.blames = {node: "did not come" for node in meeting.nodes if node not in came}
    if report.blames:  # those that did have waited for different times, so that their clocks cannot be compared
        return
    clocks = meeting.exchange("clock", time.time())  # all have waited for the last to come: a round trip is the error
    skew = skews(clocks).get(report.node, 0.0)
    if abs(skew) > max_skew:
        report.problems.append(f"its clock is {skew:+.1f} s from the median, expected {max_skew:g} at most")
    if any(came.values()):
        return
    everyone = list(range(len(meeting.nodes)))
    passed = meeting.exchange("sum", meeting.reduces("all", everyone))
    if len(passed) < len(everyone) or not all(passed.values()):
        report.failed = "the all-reduce of all nodes fails"
        report.blames = {node: "every pair with it fails" for node in to_blame(meeting)}


def skews(clocks: dict[str, float]) -> dict[str, float]:
    """Seconds by which each clock is ahead of the median."""
    median = statistics.median(clocks.values())
    return {node: clock - median for node, clock in clocks.items()}


def pairs(size: int, shift: int) -> list[list[int]]:
    """Neighbours in a ring, from `shift` on; one is left over where `size` is odd."""
    order = [(index + shift) % size for index in range(size)]
    return [order[start : start + 2] for start in range(0, size - 1, 2)]


def to_blame(meeting: Meeting) -> list[str]:
    """Nodes that fail with two different neighbours; with two nodes it cannot be told."""
    size, rank = len(meeting.nodes), meeting.rank
    if size < 3:
        return []
    failures: Counter[str] = Counter()
    for shift in (0, 1):
        mine = next((pair for pair in pairs(size, shift) if rank in pair), None)
        fine = mine is None or meeting.reduces(f"pair {shift} {mine}", mine)
        results = meeting.exchange(f"pair {shift}", fine)
        failures.update(node for node in meeting.nodes if not results.get(node, False))
    return [node for node, count in failures.items() if count == 2]


if __name__ == "__main__":
    main()
