"""Read what a launcher (torchrun, srun) says about its processes, and join their process group.

started_by_launcher()       # is this process one of several? Slurm's variables get torchrun's names
join(backend, timeout)      # the default process group; says after ten seconds who is awaited
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from datetime import timedelta

from nemo_diffgemma.errors import UserError

_QUIET_SECONDS = 10.0  # imports of several processes end seconds apart; a rank that waits longer names the missing ones
_ALONE = "env -u RANK -u WORLD_SIZE -u SLURM_STEP_NUM_TASKS python ..."
_SHELLS = ("interactive", "bash", "sh", "zsh", "fish", "tcsh")  # names that Slurm gives to jobs of a shell


class LauncherError(UserError):
    """The environment says that there are several processes, but not how they meet."""


def rank() -> int:
    """Number of this process; 0 where no launcher has given one, or nothing that is a number."""
    given = os.environ.get("RANK", "0")
    return int(given) if given.isdecimal() else 0


def started_by_launcher() -> bool:
    """Whether torchrun, or srun with several tasks, has started this process as one of several.

    Raises `LauncherError` where its variables are incomplete or no numbers.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        if _number("RANK") >= _number("WORLD_SIZE"):
            raise LauncherError(
                f"RANK={os.environ['RANK']} in a world of WORLD_SIZE={os.environ['WORLD_SIZE']}; expected ranks from 0 "
                f"to {_number('WORLD_SIZE') - 1}. To run alone: {_ALONE}"
            )
        return True
    if "SLURM_STEP_NUM_TASKS" not in os.environ or _number("SLURM_STEP_NUM_TASKS") <= 1:
        return False
    if _in_interactive_shell():
        print(
            f"note: this shell is one of {os.environ['SLURM_STEP_NUM_TASKS']} tasks of a Slurm step; running alone. "
            "`srun --overlap python ...` inside of the allocation runs one process a task.",
            file=sys.stderr,
        )
        return False
    _name_as_torchrun_does()
    return True


def _in_interactive_shell() -> bool:
    """Whether a shell that srun started has started us: its other tasks are shells too, and nobody types into them."""
    is_task = os.environ.get("SLURM_TASK_PID") == str(os.getpid())
    if is_task or os.environ.get("SLURM_PROCID") != "0":  # nobody types into the shells of other tasks
        return False
    has_terminal = any(name.startswith("SLURM_PTY_") for name in os.environ)
    # a job of salloc is called interactive too, and its srun starts scripts, which have no terminal
    return has_terminal or (os.environ.get("SLURM_JOB_NAME") in _SHELLS and os.isatty(0))


def _number(name: str) -> int:
    given = os.environ.get(name)
    if given is None or not given.isdecimal():
        what = "is not set" if given is None else f"is {given!r}"
        raise LauncherError(
            f"the launcher's variable {name} {what}; expected a whole number. Start with torchrun or srun, or run "
            f"alone: {_ALONE}"
        )
    return int(given)


def _name_as_torchrun_does() -> None:
    """Slurm's variables in torchrun's names."""
    for name, value in (
        ("RANK", _number("SLURM_PROCID")),
        ("WORLD_SIZE", _number("SLURM_STEP_NUM_TASKS")),
        ("LOCAL_RANK", _number("SLURM_LOCALID")),
        ("MASTER_PORT", 20_000 + _number("SLURM_JOB_ID") % 20_000),
    ):
        os.environ.setdefault(name, str(value))
    if "MASTER_ADDR" not in os.environ:
        os.environ["MASTER_ADDR"] = _first_node()


def _first_node() -> str:
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "")
    if nodes and not set(nodes) & set("[],"):
        return nodes
    try:
        hosts = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
        return hosts.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        raise LauncherError(
            f"SLURM_STEP_NUM_TASKS={os.environ['SLURM_STEP_NUM_TASKS']} says that this is one of several processes, "
            f"but scontrol cannot say which node is the first of {nodes!r}; set MASTER_ADDR to its name, or run alone: "
            f"{_ALONE}"
        ) from None


def join(backend: str, timeout: timedelta) -> None:
    """Make the default process group of the processes that a launcher started.

    Raises `LauncherError` where nothing says how they meet.
    """
    import torch.distributed as dist

    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise LauncherError(
            f"RANK={os.environ.get('RANK')} and WORLD_SIZE={os.environ.get('WORLD_SIZE')} say that this is one of "
            f"several processes, but {' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} not set, so they "
            f"cannot meet; start with torchrun or srun, which set them, or run alone: {_ALONE}"
        )
    _number("MASTER_PORT")
    waiting = threading.Timer(_QUIET_SECONDS, _say_who_is_awaited)
    waiting.daemon = True
    waiting.start()
    try:
        dist.init_process_group(backend, timeout=timeout)
    finally:
        waiting.cancel()


def _say_who_is_awaited() -> None:
    mine, size = rank(), _number("WORLD_SIZE")
    others = [str(other) for other in range(size) if other != mine]
    awaited = ", ".join(others if len(others) < 9 else [*others[:3], "...", others[-1]])
    print(
        f"rank {mine} of {size} has waited {_QUIET_SECONDS:.0f} s at {os.environ['MASTER_ADDR']}:"
        f"{os.environ['MASTER_PORT']} for all of rank{'s' * (len(others) > 1)} {awaited}. Where they will not come "
        f"(variables inherited from a launcher), stop this and run alone: {_ALONE}",
        file=sys.stderr,
        flush=True,
    )
