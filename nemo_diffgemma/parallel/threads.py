"""How many CPU threads a process may take, beside the others on its machine."""

from __future__ import annotations

import os
import re


def threads_of_process(processes: int | None = None) -> int:
    """The share of one of `processes` on this machine (None: as many as torchrun or srun started on it)."""
    mine = len(os.sched_getaffinity(0))  # a container or srun may have given us a part of the machine
    cores = mine
    if processes is None:
        processes = _started_here()
        if "LOCAL_WORLD_SIZE" not in os.environ:  # of srun, which may have shared out the cores already
            cores = int(os.environ.get("SLURM_CPUS_ON_NODE", mine))
    return max(1, min(mine, cores // processes))


def _started_here() -> int:
    """Processes of this run on this machine; Slurm writes `4(x2),3` for nodes with 4, 4 and 3 tasks."""
    if "WORLD_SIZE" not in os.environ:
        return 1
    for name in ("LOCAL_WORLD_SIZE", "SLURM_STEP_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE", "WORLD_SIZE"):
        counts = re.findall(r"(\d+)(?:\(x\d+\))?", os.environ.get(name, ""))
        if counts:
            return max(1, *map(int, counts))
    return 1
