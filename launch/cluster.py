"""From composed configurations to one Slurm job: what fits is checked here, before anything waits in a queue.

    submission = Submission("train", sys.argv)
    if submission.takes(config):              # where a cluster is configured:
        submission.add(config)                # once, or once for each run of a sweep
    submission.send()                         # renders slurm/train.sbatch, submits it, says how to follow it

One task per GPU under srun. Nodes, tasks and replicas follow from `cluster.*` and `parallel.*` alone; each task reads
the configuration that was composed here, whatever becomes of conf/ while the job waits.
"""

from __future__ import annotations

import dataclasses
import math
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from launch.configuration import freeze
from launch.output import Results, refuse
from nemo_diffgemma.config import ModelConfig
from nemo_diffgemma.data import Batches
from nemo_diffgemma.parallel.layout import LayoutError, ParallelLayout
from nemo_diffgemma.training.schema import ClusterGroup, ConfigurationError

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "config.json"
VERBS = ("train", "evaluate", "convert", "export")  # each has a script in slurm/


# -- what fits ---------------------------------------------------------------------------------------------------------


def fit(verb: str, config: Any) -> int:
    """Number of tasks of a job; sets `parallel.replicas` of a training. Raises where layout and allocation differ."""
    cluster: ClusterGroup = config.cluster
    _check(cluster)
    layout, gpus = config.parallel.layout(), cluster.nodes * cluster.gpus_per_node
    model = _model(config)
    if model is not None:
        layout.check(model)
    if verb != "train":
        tasks = layout.world_size * config.parallel.replicas
        if tasks > gpus:
            raise LayoutError(
                f"layout {layout} needs {tasks} processes, one a GPU, but {_allocation(cluster)}; use "
                f"cluster.nodes={math.ceil(tasks / cluster.gpus_per_node)}"
            )
        return tasks
    if gpus % layout.world_size:
        raise LayoutError(
            f"layout {layout} needs {layout.world_size} processes or a multiple of it, but {_allocation(cluster)}; the "
            f"nearest that fit: {' or '.join(_nearest(layout, cluster, model))}"
        )
    replicas = gpus // layout.world_size
    if config.parallel.replicas not in (1, replicas):
        raise ConfigurationError(
            f"parallel.replicas={config.parallel.replicas}, but {_allocation(cluster)}, which makes {replicas} of "
            f"layout {layout}; leave parallel.replicas out"
        )
    config.parallel.replicas = replicas
    Batches(config.data.global_batch_size, 0, layout.replicas(gpus))  # raises where the batch cannot be shared
    return gpus


def _check(cluster: ClusterGroup) -> None:
    if cluster.scheduler != "slurm":
        raise ConfigurationError(f"cluster.scheduler={cluster.scheduler!r}; use slurm, or null to stay on this machine")
    for name in ("nodes", "gpus_per_node"):
        if getattr(cluster, name) < 1:
            raise ConfigurationError(f"cluster.{name}={getattr(cluster, name)}; expected at least 1")
    if cluster.device not in ("cuda", "cpu"):
        raise ConfigurationError(f"cluster.device={cluster.device!r}; use cuda or cpu")
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", cluster.time):
        raise ConfigurationError(
            f"cluster.time={cluster.time!r}; expected minutes, hours:minutes:seconds or days-hours"
        )
    gpus = sorted(file.stem for file in (ROOT / "conf" / "gpu").glob("*.yaml"))
    if cluster.gpu is not None and cluster.gpu not in gpus:
        raise ConfigurationError(f"cluster.gpu={cluster.gpu!r} is no file of conf/gpu; use {', '.join(gpus)}")


def _model(config: Any) -> ModelConfig | None:
    """The architecture, where it is known before the job runs."""
    group = getattr(config, "model", None)
    named = [getattr(holder, name, None) for holder in (group, config) for name in ("checkpoint", "source")]
    checkpoint = next(filter(None, named), None)
    if checkpoint is None:
        return ModelConfig(**group.architecture) if group is not None else None
    for place in (Path(checkpoint), Path(checkpoint) / "assets"):
        if (place / "config.json").is_file():
            return ModelConfig.from_pretrained(place)
    return None  # an archive, or on a disk that only the nodes have


def _allocation(cluster: ClusterGroup) -> str:
    gpus = cluster.nodes * cluster.gpus_per_node
    return f"cluster.nodes={cluster.nodes} x cluster.gpus_per_node={cluster.gpus_per_node} are {gpus}"


def _nearest(layout: ParallelLayout, cluster: ClusterGroup, model: ModelConfig | None) -> Iterator[str]:
    """The next number of nodes for this layout, and the closest layout for these nodes."""
    step = layout.world_size // math.gcd(layout.world_size, cluster.gpus_per_node)
    near = sorted({max(1, round(cluster.nodes / step)) * step, math.ceil(cluster.nodes / step) * step})
    yield f"cluster.nodes={min(near, key=lambda nodes: abs(nodes - cluster.nodes))}"
    gpus = cluster.nodes * cluster.gpus_per_node
    sizes = [size for size in range(1, gpus + 1) if gpus % size == 0]
    found = []
    for tensor, expert, expert_tensor in product(sizes, repeat=3):
        other = ParallelLayout(tensor, expert, expert_tensor)
        if gpus % other.world_size or not _suits(other, model):
            continue
        distance = sum(abs(math.log2(a / b)) for a, b in zip(vars(other).values(), vars(layout).values(), strict=True))
        found.append((distance, -other.world_size, f"parallel.tensor={tensor} parallel.expert={expert}"
                      + (f" parallel.expert_tensor={expert_tensor}" if expert_tensor > 1 else "")))  # fmt: skip
    yield min(found)[2]


def _suits(layout: ParallelLayout, model: ModelConfig | None) -> bool:
    try:
        if model is not None:
            layout.check(model)
    except LayoutError:
        return False
    return True


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
    root: Path = ROOT,
    python: str = sys.executable,
) -> str:
    """The batch script of `array` runs (0: a single one), whose files are below `directory`."""
    options = {
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "time": cluster.time,
        "cpus-per-task": cluster.cpus_per_task,
        **cluster.sbatch,
    }
    preflight = {
        "gpus": cluster.gpus_per_node,
        "device": cluster.device,
        "scratch": cluster.preflight.scratch,
        "min-free-gb": cluster.preflight.min_free_gb,
        "min-shm-gb": cluster.preflight.min_shm_gb,
        "max-clock-skew": cluster.preflight.max_clock_skew_s,
        "timeout": cluster.preflight.timeout_s,
    }
    scripts = Environment(
        loader=FileSystemLoader(ROOT / "slurm"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        comment_start_string="<#", comment_end_string="#>", keep_trailing_newline=True,
    )  # fmt: skip
    interpreter = cluster.python or ("python" if cluster.container_image else python)
    return scripts.get_template(f"{verb}.sbatch").render(
        verb=verb,
        c=cluster,
        name=name,
        command=command,
        tasks=tasks,
        tasks_per_node=math.ceil(tasks / cluster.nodes),
        options=[(key, str(value)) for key, value in options.items() if value is not None],
        array=array,
        directory=shlex.quote(str(directory)),
        root=shlex.quote(str(root)),
        python=shlex.quote(interpreter),
        environment=[(key, shlex.quote(str(value))) for key, value in cluster.environment.items()],
        srun=[_quoted(option) for option in [*_container(cluster, root, directory), *cluster.srun]],
        preflight=" ".join(f"--{key} {shlex.quote(str(value))}" for key, value in preflight.items()),
    )


def _quoted(word: str) -> str:
    """A word of a bash array, where a comma looks like a mistake."""
    quoted = shlex.quote(word)
    return f"'{word}'" if quoted == word and "," in word else quoted


def _container(cluster: ClusterGroup, root: Path, directory: Path) -> list[str]:
    """Options of pyxis. The code and the results are where they are outside."""
    if cluster.container_image is None:
        return []
    mounts = [f"{root}:{root}", f"{directory}:{directory}", *cluster.container_mounts]
    return [
        f"--container-image={cluster.container_image}",
        f"--container-mounts={','.join(dict.fromkeys(mounts))}",
        "--no-container-mount-home",
    ]


# -- submission --------------------------------------------------------------------------------------------------------


class Submission:
    """Runs that become one job: those of a sweep become an array. `verb` is the name of an entry point's function."""

    def __init__(self, verb: str, command: list[str]) -> None:
        self.verb, self.command = {"build": "export"}.get(verb, verb), command
        self.configs: list[Any] = []
        self.tasks, self.sweep = 0, False

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
        """Check a run and remember it. Raises a ValueError that says what to do."""
        self.sweep = sweep
        tasks = fit(self.verb, config)
        if self.configs and dataclasses.asdict(config.cluster) != dataclasses.asdict(self.configs[0].cluster):
            raise ConfigurationError(
                "the runs of a sweep are one job array: cluster.* must be the same for all of them"
            )
        self.tasks = tasks
        self.configs.append(config)

    def send(self) -> None:
        """Submit what was added, if anything was, and tell how to follow it; or with dry_run only show the script."""
        if not self.configs:
            return
        results = Results(0)
        try:
            results.close(self._send(results, self.sweep))
        except (ValueError, OSError) as error:
            refuse(error)

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
        )
        if first.dry_run:
            results.show(script)
            return {"job": None, "runs": [str(run) for run in runs]}
        self._write_configs(runs)
        file = directory / "slurm" / f"{self.verb}.sbatch"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(script)
        job = _sbatch([str(file)])
        if sweep:
            _collect(job, directory, first.cluster)
        self._tell(results, job, directory, sweep)
        return {"job": job, "runs": [str(run) for run in runs]}

    def _name(self, config: Any) -> tuple[Path, str]:
        """Directory of the job, and its name in the queue."""
        moment = f"{datetime.now():%Y-%m-%d_%H-%M-%S}"
        if hasattr(config, "exp_manager"):
            group = config.exp_manager
            version = group.version or moment
            return (Path(group.exp_dir) / group.name / version).absolute(), group.name
        return (Path(config.cluster.jobs_dir) / f"{self.verb}-{moment}").absolute(), f"{self.verb}"

    def _write_configs(self, runs: list[Path]) -> None:
        """The configuration of each run, as its tasks will read it."""
        for config, run in zip(self.configs, runs, strict=True):
            if hasattr(config, "exp_manager"):
                group = config.exp_manager
                group.exp_dir, group.name, group.version = str(run.parent.parent), run.parent.name, run.name
            (run / "slurm").mkdir(parents=True, exist_ok=True)
            (run / "slurm" / CONFIG).write_text(freeze(config))

    def _tell(self, results: Results, job: str, directory: Path, sweep: bool) -> None:
        cluster: ClusterGroup = self.configs[0].cluster
        gpu = "GPUs" if cluster.gpu is None else _gpu_name(cluster.gpu)
        log = directory / "slurm" / f"job-{job}{'_0' if sweep else ''}.out"
        results.show(
            f"job {job}: {self.verb}, {f'{len(self.configs)} runs of ' if sweep else ''}{self.tasks} processes on "
            f"{cluster.nodes} nodes with {cluster.gpus_per_node} {gpu}, layout {self.configs[0].parallel.layout()}\n"
            f"  log     {log} (and rank-*.log beside it)\n"
            f"  follow  python launch/status.py {job}        tail -F {log}\n"
            f"  cancel  scancel {job}"
        )


def _gpu_name(name: str) -> str:
    return yaml.safe_load((ROOT / "conf" / "gpu" / f"{name}.yaml").read_text())["name"]


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


def _collect(job: str, directory: Path, cluster: ClusterGroup) -> None:
    """A small job that writes the table of a sweep when all of its runs have ended."""
    python = cluster.python or sys.executable
    line = f"cd {shlex.quote(str(ROOT))} && {shlex.quote(python)} launch/status.py --once {shlex.quote(str(directory))}"
    options = [f"--{key}={value}" for key in ("partition", "account", "qos") if (value := getattr(cluster, key))]
    _sbatch(
        [
            f"--dependency=afterany:{job}",
            f"--job-name={directory.parent.name}-table",
            f"--output={directory}/results.txt",
            "--open-mode=truncate",
            "--ntasks=1",
            "--time=10",
            *options,
            f"--wrap={line}",
        ]
    )
