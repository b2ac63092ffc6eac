"""From composed configurations to one Slurm job.

    submission = Submission("train", sys.argv)
    if submission.takes(config):              # where a cluster is configured:
        submission.add(config)                # once, or once for each run of a sweep
    submission.send()                         # renders slurm/train.sbatch, submits it, says how to follow it

One task per GPU under srun. Nodes, tasks and replicas follow from `cluster.*` and `parallel.*` alone; each task reads
the configuration that was composed here, whatever becomes of conf/ while the job waits.
"""

from __future__ import annotations

import math
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from itertools import count, product
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from nemo_diffgemma.cli.allocation import fit
from nemo_diffgemma.cli.configuration import freeze
from nemo_diffgemma.cli.output import Results
from nemo_diffgemma.gpus import load_gpu
from nemo_diffgemma.repository import ROOT, user_path
from nemo_diffgemma.schema import ClusterGroup, ConfigurationError

CONFIG, JOB = "config.json", "job"  # in slurm/ of a run directory: what its tasks read, its number
VERBS = ("train", "evaluate", "convert", "export")  # each has a script in slurm/
_INPUTS, _OUTPUTS = ("checkpoint", "source", "calibration"), ("target", "out")  # keys of the entry points


# -- the script --------------------------------------------------------------------------------------------------------


def render(
    verb: str,
    cluster: ClusterGroup,
    *,
    tasks: int,
    directory: Path,
    command: str,
    name: str,
    array: int = 0,
    mounts: Sequence[Path] = (),
    root: Path = ROOT,
    python: str = sys.executable,
) -> str:
    """The batch script of `array` runs (0: a single one), whose files are below `directory`.

    `mounts` are further paths that a container must see.
    """
    scripts = Environment(
        loader=FileSystemLoader(ROOT / "slurm"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        comment_start_string="<#", comment_end_string="#>", keep_trailing_newline=True,
    )  # fmt: skip
    interpreter = cluster.python or ("python" if cluster.container_image else python)
    return scripts.get_template(f"{verb}.sbatch").render(
        verb=verb,
        c=cluster,
        name=shlex.quote(name),
        command=" ".join(command.splitlines()),
        tasks=tasks,
        tasks_per_node=math.ceil(tasks / cluster.nodes),
        options=_sbatch_options(cluster),
        array=array,
        directory=shlex.quote(str(directory)),
        log_directory=shlex.quote(str(directory).replace("%", "%%")),  # Slurm has its own patterns, such as %j
        root=shlex.quote(str(root)),
        python=shlex.quote(interpreter),
        environment=[(key, shlex.quote(str(value))) for key, value in cluster.environment.items()],
        srun=[_quoted(option) for option in _srun(cluster, [root, directory, *mounts])],
        preflight=_preflight_options(cluster),
    )


def _sbatch_options(cluster: ClusterGroup) -> list[tuple[str, str]]:
    """Names and quoted values of #SBATCH lines; an empty value is a switch."""
    options = {
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "time": cluster.time,
        "cpus-per-task": cluster.cpus_per_task,
        **cluster.sbatch,
    }
    given = {key: str(value) for key, value in options.items() if value is not None}
    return [(key, value and shlex.quote(value)) for key, value in given.items()]


def _preflight_options(cluster: ClusterGroup) -> str:
    """Command line of slurm/preflight.py."""
    options = {
        "gpus": cluster.gpus_per_node,
        "device": cluster.device,
        "scratch": cluster.preflight.scratch,
        "min-free-gb": cluster.preflight.min_free_gb,
        "min-shm-gb": cluster.preflight.min_shm_gb,
        "max-clock-skew": cluster.preflight.max_clock_skew_s,
        "timeout": cluster.preflight.timeout_s,
    }
    return " ".join(f"--{key} {shlex.quote(str(value))}" for key, value in options.items())


def _quoted(word: str) -> str:
    """A word of a bash array, where a comma looks like a mistake."""
    quoted = shlex.quote(word)
    return f"'{word}'" if quoted == word and "," in word else quoted


def _srun(cluster: ClusterGroup, mounts: Sequence[Path]) -> list[str]:
    """Options of every step. A container, through pyxis, sees the code and the results where they are outside."""
    options = [] if cluster.cpus_per_task is None else [f"--cpus-per-task={cluster.cpus_per_task}"]  # not inherited
    if cluster.container_image is not None:
        mounted = [*(f"{place}:{place}" for place in mounts), *cluster.container_mounts]
        options += [
            f"--container-image={cluster.container_image}",
            f"--container-mounts={','.join(dict.fromkeys(mounted))}",
            f"--container-workdir={mounts[0]}",  # else the image's own copy of the code would run
            "--no-container-mount-home",
        ]
    return [*options, *cluster.srun]


# -- submission --------------------------------------------------------------------------------------------------------


class Submission:
    """Runs that become one job: those of a sweep become an array. `verb` is the name of an entry point's function."""

    def __init__(self, verb: str, command: list[str]) -> None:
        self.verb, self.command = {"build": "export"}.get(verb, verb), command
        self.configs: list[Any] = []
        self.tasks, self.sweep = 0, False
        self.outputs: list[Path] = []
        self.mounts: dict[Path, None] = {}

    def takes(self, config: Any) -> bool:
        """Whether a run goes to a cluster. Raises `ConfigurationError` where it cannot."""
        cluster = getattr(config, "cluster", None)
        if cluster is None or cluster.scheduler is None:
            if cluster is not None and config.dry_run and self.verb != "convert":
                raise ConfigurationError("dry_run=true shows the script of a cluster's job; add cluster=dgx_h100, ...")
            return False
        if self.verb not in VERBS:
            raise ConfigurationError(f"{self.verb} runs on this machine only; leave cluster.scheduler out")
        return True

    def add(self, config: Any, sweep: bool = False) -> None:
        """Check a run and remember it. Raises a `UserError` that says what to do."""
        self.sweep = sweep
        tasks = fit(self.verb, config)
        if self.configs and (tasks, config.cluster) != (self.tasks, self.configs[0].cluster):
            raise ConfigurationError(
                "the runs of a sweep are one job array: cluster.* and the number of processes must be the same for all"
            )
        self.tasks = tasks
        inputs, outputs = _make_absolute(config)
        self.outputs += outputs
        self.mounts |= dict.fromkeys([*inputs, *(path.parent for path in outputs)])
        self.configs.append(config)

    def send(self) -> None:
        """Submit the added runs, if there are any, and show how to follow them; with dry_run only show the script."""
        if not self.configs:
            return
        results = Results(0)
        results.close(self._send(results, self.sweep))

    def _send(self, results: Results, sweep: bool) -> dict[str, Any]:
        first = self.configs[0]
        directory, name = self._name(first)
        runs = [directory / str(number) for number in range(len(self.configs))] if sweep else [directory]
        script = render(
            self.verb,
            first.cluster,
            tasks=self.tasks,
            directory=directory,
            command=f"python {shlex.join(self.command)}",
            name=name,
            array=len(self.configs) if sweep else 0,
            mounts=list(self.mounts),
        )
        if first.dry_run:
            results.show(script)
            return {"job": None, "runs": [str(run) for run in runs]}
        for output in self.outputs:
            output.parent.mkdir(parents=True, exist_ok=True)
        self._write_configs(directory, runs)
        file = directory / "slurm" / f"{self.verb}.sbatch"
        file.write_text(script)
        job = _sbatch([str(file)])
        (directory / "slurm" / JOB).write_text(job)
        self._tell(results, job, directory, sweep)
        if sweep:
            _collect(results, job, directory, first.cluster)
        return {"job": job, "runs": [str(run) for run in runs]}

    def _name(self, config: Any) -> tuple[Path, str]:
        """Directory of the job, which no other job gets or has, and its name in the queue."""
        moment = f"{datetime.now():%Y-%m-%d_%H-%M-%S}"
        if not hasattr(config, "exp_manager"):
            place = user_path(config.cluster.jobs_dir).absolute()
            _check_slurm_takes(place, "cluster.jobs_dir")
            return _unused(place / f"{self.verb}-{moment}"), self.verb
        group = config.exp_manager
        place = user_path(group.exp_dir).absolute() / group.name
        _check_slurm_takes(place / (group.version or ""), "exp_manager.exp_dir, name or version")
        if group.version is None:
            return _unused(place / moment), group.name
        _check_nobody_works_in(place / group.version)
        return place / group.version, group.name

    def _write_configs(self, directory: Path, runs: list[Path]) -> None:
        """The configuration of each run, as its tasks will read it."""
        (directory / "slurm").mkdir(parents=True, exist_ok=True)
        for config, run in zip(self.configs, runs, strict=True):
            if hasattr(config, "exp_manager"):
                group = config.exp_manager
                group.exp_dir, group.name, group.version = str(run.parent.parent), run.parent.name, run.name
            (run / "slurm").mkdir(parents=True, exist_ok=True)
            (run / "slurm" / CONFIG).write_text(freeze(config))

    def _tell(self, results: Results, job: str, directory: Path, sweep: bool) -> None:
        cluster: ClusterGroup = self.configs[0].cluster
        gpu = "GPUs" if cluster.gpu is None else load_gpu(cluster.gpu).name
        log = directory / "slurm" / f"job-{job}{'_0' if sweep else ''}.out"
        results.show(
            f"job {job}: {self.verb}, {f'{len(self.configs)} runs of ' if sweep else ''}{self.tasks} processes on "
            f"{cluster.nodes} node{'s' * (cluster.nodes > 1)} with {cluster.gpus_per_node} {gpu}, layout "
            f"{self.configs[0].parallel.layout()}\n"
            f"  log     {log} (and rank-*.log beside it)\n"
            f"  follow  python launch/status.py {job}        tail -F {log}\n"
            f"  cancel  scancel {job}"
        )


def _sbatch(arguments: list[str]) -> str:
    """Submit -> the number of the job."""
    try:
        done = subprocess.run(["sbatch", "--parsable", *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        raise ConfigurationError(
            "there is no sbatch here: submit from a login node of the cluster, or look at the script with dry_run=true"
        ) from None
    if done.returncode:
        raise ConfigurationError(f"Slurm refuses the job: {done.stderr.strip()}; look at the script with dry_run=true")
    return done.stdout.strip().partition(";")[0]


def _unused(directory: Path) -> Path:
    """A name of this second that no other submission has taken."""
    return next(
        place
        for number in count(1)
        if not (place := directory.with_name(f"{directory.name}_{number}" if number > 1 else directory.name)).exists()
    )


def _check_slurm_takes(directory: Path, keys: str) -> None:
    """Slurm writes logs below `directory`, and reads signs of its own in the names of their files: %j, %A, a \\."""
    signs = sorted({sign for sign in str(directory) if sign in "%\\" or not sign.isprintable()})
    if signs:
        raise ConfigurationError(
            f"{str(directory)!r} has {' and '.join(map(repr, signs))} in its name, which Slurm would replace in the "
            f"names of logs; choose {keys} without"
        )


def _check_nobody_works_in(directory: Path) -> None:
    """Two jobs in one directory would write the same files."""
    file = directory / "slurm" / JOB
    if not file.is_file():
        return
    job = file.read_text().strip()
    try:
        known = subprocess.run(["squeue", "--noheader", "--jobs", job], capture_output=True, text=True)
    except FileNotFoundError:
        return
    if known.returncode == 0 and known.stdout.strip():
        raise ConfigurationError(
            f"job {job} waits or works in {directory}; cancel it first (scancel {job}), or give another "
            "exp_manager.version"
        )


def _make_absolute(config: Any) -> list[list[Path]]:
    """Paths mean in the job what they meant where it was submitted -> those that are read, and those written."""
    paths: list[list[Path]] = []
    for names in (_INPUTS, _OUTPUTS):
        paths.append([])
        for holder, name in product((config, getattr(config, "model", None)), names):
            if (given := getattr(holder, name, None)) is not None:
                paths[-1].append(user_path(given).absolute())
                setattr(holder, name, str(paths[-1][-1]))
    return paths


def _collect(results: Results, job: str, directory: Path, cluster: ClusterGroup) -> None:
    """A small job that writes the table of a sweep when all of its runs have ended; the sweep goes on without it."""
    command = [sys.executable, "launch/status.py", "--once", str(directory)]
    options = [f"--{key}={value}" for key in ("partition", "account", "qos") if (value := getattr(cluster, key))]
    try:
        _sbatch(
            [
                f"--dependency=afterany:{job}",
                f"--job-name={directory.parent.name}-table",
                f"--output={directory}/results.txt",
                "--open-mode=truncate",
                "--ntasks=1",
                "--time=10",
                *options,
                f"--wrap=cd {shlex.quote(str(ROOT))} && {shlex.join(command)}",
            ]
        )
    except ConfigurationError as error:
        results.show(f"  but no table will be written at its end: {error}")
