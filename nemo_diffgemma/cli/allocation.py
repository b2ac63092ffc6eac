"""Check that a layout fits an allocation before anything waits in a queue.

tasks = fit("train", config)      # one task a GPU; raises with the nearest that fits
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from nemo_diffgemma.config import ModelConfig
from nemo_diffgemma.data import Batches
from nemo_diffgemma.gpus import check_gpu
from nemo_diffgemma.parallel.layout import LayoutError, ParallelLayout
from nemo_diffgemma.schema import ClusterGroup, ConfigurationError


def fit(verb: str, config: Any) -> int:
    """Number of tasks of a job. Raises where layout and allocation differ.

    Sets what follows: the replicas of a training, and of other work the nodes, as many as its layout needs.
    """
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
        cluster.nodes = math.ceil(tasks / cluster.gpus_per_node)
        return tasks
    _check_time(cluster)
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
    seconds_of(cluster.time)
    for name in cluster.environment:
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise ConfigurationError(f"cluster.environment.{name}: expected the name of a variable, such as NCCL_DEBUG")
    options = {"partition": cluster.partition, "account": cluster.account, "qos": cluster.qos}
    for key, value in [*options.items(), *((f"sbatch.{key}", value) for key, value in cluster.sbatch.items())]:
        if len(f"{key}{value}".splitlines()) > 1:
            raise ConfigurationError(f"cluster.{key}={value!r}; expected one line: an option of sbatch")
    if cluster.gpu is not None:
        check_gpu("cluster.gpu", cluster.gpu)


def seconds_of(time: str) -> int:
    """Slurm's forms of a time limit: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S."""
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", time):
        raise ConfigurationError(f"cluster.time={time!r}; expected minutes, hours:minutes:seconds or days-hours")
    days, dash, clock = time.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if dash or len(parts) == 3:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    else:
        hours, minutes, seconds = [0, *parts, 0][:3]
    return (int(days or 0) * 24 + hours) * 3600 + minutes * 60 + seconds


def _check_time(cluster: ClusterGroup) -> None:
    """Training needs time between its start and the warning before the limit, which Slurm sends a minute early."""
    needed = cluster.grace_seconds + 60 + cluster.preflight.timeout_s
    if seconds_of(cluster.time) <= needed:
        raise ConfigurationError(
            f"cluster.time={cluster.time} leaves no time to train: the warning comes up to a minute and "
            f"cluster.grace_seconds={cluster.grace_seconds} before, and the pre-flight check may take "
            f"{cluster.preflight.timeout_s:g} s; give more than {math.ceil(needed / 60)} minutes, or a shorter grace"
        )


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
    layouts = []
    for tensor, expert, expert_tensor in product(sizes, repeat=3):
        other = ParallelLayout(tensor, expert, expert_tensor)
        if gpus % other.world_size or not _suits(other, model):
            continue
        distance = sum(abs(math.log2(a / b)) for a, b in zip(vars(other).values(), vars(layout).values(), strict=True))
        layouts.append((distance, -other.world_size, f"parallel.tensor={tensor} parallel.expert={expert}"
                      + (f" parallel.expert_tensor={expert_tensor}" if expert_tensor > 1 else "")))  # fmt: skip
    yield min(layouts)[2]


def _suits(layout: ParallelLayout, model: ModelConfig | None) -> bool:
    try:
        if model is not None:
            layout.check(model)
    except LayoutError:
        return False
    return True
