"""A live table of a job, of a sweep, or of what is in a run directory.

python launch/status.py 1234                  # number of a job or of an array; ends when the jobs have
python launch/status.py runs/sudoku/mine      # a run directory, or the directory of a sweep; without Slurm too
python launch/status.py --once 1234           # one table; the last line is JSON: jobs
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.live import Live
from rich.table import Table

from nemo_diffgemma.cli.reporting import exit_after
from nemo_diffgemma.cli.signals import leaving_at_signals
from nemo_diffgemma.errors import UserError
from nemo_diffgemma.json_files import read_object

# of Slurm, and of heartbeats where Slurm does not know the job
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL",
         "PREEMPTED", "finished", "failed", "preempted", "hung", "unknown")  # fmt: skip
STALE_SECONDS = 300
REFRESH_SECONDS = 2.0

# what status.json holds, if it is known
_HEARTBEAT = {
    "state": str, "step": int, "max_steps": int, "loss": float | int, "tokens_per_second": float | int, "job": str,
    "restarts": int, "checkpoint": str, "time": float | int,
}  # fmt: skip

type Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", help="number of a Slurm job, or a run directory")
    parser.add_argument("--once", action="store_true", help="print the table once, and JSON")
    arguments = parser.parse_args()
    try:
        with leaving_at_signals():
            show(arguments.job, arguments.once)
    except Exception as error:
        exit_after(error)


def show(job: str, once: bool) -> None:
    """The table, once or until all jobs have ended."""
    rows = collect(job)
    console = Console(width=None if sys.stdout.isatty() else 160)
    if once:
        console.print(table(rows))
        print(json.dumps({"jobs": rows}))
        return
    with Live(table(rows), console=console, auto_refresh=False) as live:
        while not all(row["state"] in ENDED for row in rows):
            time.sleep(REFRESH_SECONDS)
            rows = again(job, rows)
            live.update(table(rows), refresh=True)


# -- what is known -----------------------------------------------------------------------------------------------------


def collect(job: str) -> list[Row]:
    """One row a run, those of a sweep in the order of their numbers. Raises a `UserError` that says what to give."""
    if not re.fullmatch(r"\d+(_\d+)?", job):
        return _of_directory(Path(job))
    jobs = slurm_jobs(job)
    if not jobs:
        raise UserError(f"Slurm does not know job {job} (any more); give its run directory instead")
    rows = [row for job_fields in jobs for row in _of_job(job_fields)]
    return sorted(rows, key=lambda row: [int(number) for number in re.findall(r"\d+", row["job"])])


def again(job: str, rows: list[Row]) -> list[Row]:
    """The rows some time later; of a job that Slurm has forgotten since, or while it does not answer, the heartbeat."""
    try:
        known = {row["job"]: row for row in collect(job)}
    except UserError:
        known = {}
    return [known.get(row["job"]) or _row(Path(row["run"]), row["job"], {}) for row in rows]


def slurm_jobs(job: str) -> list[dict[str, str]]:
    """What scontrol says of a job, or of each element of an array."""
    try:
        done = subprocess.run(["scontrol", "show", "job", "-o", job], capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError(f"there is no scontrol here to ask about job {job}; give its run directory instead") from None
    return [
        dict(re.findall(r"(?:^|\s)(\w[\w:/]*)=(.*?)(?=\s+\w[\w:/]*=|\s*$)", line))
        for line in done.stdout.splitlines()
        if "JobId=" in line
    ]


def _of_job(fields: dict[str, str]) -> list[Row]:
    directory, element = Path(fields["StdOut"]).parents[1], fields.get("ArrayTaskId")
    if element is None:
        return [_row(directory, fields["JobId"], fields)]
    numbers: list[int] = []  # one array element, or pending ones in one record: 0-3,7
    for first, last in re.findall(r"(\d+)(?:-(\d+))?", element.partition("%")[0]):
        numbers += range(int(first), int(last or first) + 1)
    return [_row(directory / str(number), f"{fields['ArrayJobId']}_{number}", fields) for number in numbers]


def _of_directory(directory: Path) -> list[Row]:
    runs = sorted(
        (run for run in directory.glob("*/slurm") if run.parent.name.isdigit()), key=lambda r: int(r.parent.name)
    )
    directories = [run.parent for run in runs] or [directory]
    if not any((run / "status.json").is_file() or (run / "slurm").is_dir() for run in directories):
        raise UserError(f"{directory} is no run directory (exp_dir/name/version): it has no status.json")
    rows = []
    for run in directories:
        job = _heartbeat(run).get("job") or _submitted(directory, run)
        known = slurm_jobs(job) if job is not None and _has_slurm() else []
        rows.append(_row(run, job or run.name, known[0] if known else {}))
    return rows


def _submitted(directory: Path, run: Path) -> str | None:
    """The job of a run that has not begun."""
    file = directory / "slurm" / "job"
    if not file.is_file():
        return None
    return file.read_text().strip() + ("" if run == directory else f"_{run.name}")


def _has_slurm() -> bool:
    try:
        return subprocess.run(["scontrol", "ping"], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def _heartbeat(run: Path) -> dict[str, Any]:
    file = run / "status.json"
    if not file.is_file():
        return {}
    beat = read_object(file)
    for key, kind in _HEARTBEAT.items():
        if beat.get(key) is not None and not isinstance(beat[key], kind):
            raise UserError(f"{file}: {key} is {beat[key]!r}; expected {getattr(kind, '__name__', 'a number')}")
    return beat


def _row(run: Path, job: str, slurm: dict[str, str]) -> Row:
    beat = _heartbeat(run)
    nodes = slurm.get("NodeList", "")
    checkpoint = re.search(r"step-(\d+)$", beat.get("checkpoint") or "")
    return {
        "job": job,
        "run": str(run),
        "state": slurm.get("JobState") or beat.get("state", "unknown"),
        "heartbeat": beat.get("state"),
        "nodes": "" if nodes == "(null)" else nodes,
        "step": beat.get("step"),
        "max_steps": beat.get("max_steps"),
        "loss": beat.get("loss"),
        "tokens_per_second": beat.get("tokens_per_second"),
        "checkpoint": int(checkpoint[1]) if checkpoint else None,
        "restarts": int(slurm.get("Restarts", beat.get("restarts", 0))),
        "age": round(time.time() - beat["time"], 1) if "time" in beat else None,
    }


# -- how it looks ------------------------------------------------------------------------------------------------------


def table(rows: list[Row]) -> Table:
    """As a person wants it; a heartbeat that stands still while the job runs is red."""
    names = ("job", "state", "run", "nodes", "step", "loss", "tokens/s", "checkpoint", "restarts", "heartbeat")
    drawn = Table(*names)
    for row in rows:
        age = row["age"]
        stale = age is not None and age > STALE_SECONDS and row["state"] in ("RUNNING", "running")
        beat = "-" if age is None else f"{row['heartbeat']}, {age:.0f} s ago"
        drawn.add_row(
            row["job"],
            row["state"],
            Path(row["run"]).name,
            row["nodes"] or "-",
            "-" if row["step"] is None else f"{row['step']}/{row['max_steps']}",
            "-" if row["loss"] is None else f"{row['loss']:.4f}",
            "-" if row["tokens_per_second"] is None else f"{row['tokens_per_second']:,.0f}",
            "-" if row["checkpoint"] is None else f"step-{row['checkpoint']}",
            str(row["restarts"]),
            f"[red]{beat}[/red]" if stale else beat,
        )
    return drawn


if __name__ == "__main__":
    main()
