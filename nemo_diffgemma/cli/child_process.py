"""Call a function in a child process, whose memory is free again when it ends.

A process that builds an engine needs no torch, and what tracing leaves in memory nobody else needs. The child, run as
`python -m nemo_diffgemma.cli.child_process`, reads the pickled function and its arguments and answers with the pickled
result. It ends with whoever has started it.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

from nemo_diffgemma.errors import UserError
from nemo_diffgemma.repository import ROOT


def peak_memory() -> int:
    """Most bytes of memory that this process has held."""
    status = Path("/proc/self/status")
    held = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    # getrusage counts for a child what its parent held when it started it
    return 1024 * (int(held[1]) if held else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


class ChildCrash(RuntimeError):
    """A child died, and no user's mistake is to blame: a defect, or too little memory."""


def call_in_child[T](
    function: Callable[..., T], /, *arguments: object, environment: Mapping[str, str] | None = None
) -> tuple[T, int]:
    """`function(*arguments)` in a child, on this process's own GPU -> its result, the child's peak memory in bytes.

    `environment` holds variables of the child's beside those of this process.
    Raises the function's `UserError` or `OSError`; any other end of the child is a `ChildCrash`.
    """
    done = subprocess.run(  # kills the child where it is left by an exception, SystemExit of a signal too
        [sys.executable, "-P", "-m", "nemo_diffgemma.cli.child_process"],
        input=pickle.dumps((function, arguments)),
        stdout=subprocess.PIPE,
        env={**os.environ, **_one_gpu(), "PYTHONPATH": search_path(), **(environment or {})},
    )
    if done.returncode:
        raise ChildCrash(f"the process of {function.__name__} ended with code {done.returncode}; see above")
    result, peak = pickle.loads(done.stdout)
    if isinstance(result, UserError | OSError):
        raise result
    return result, peak


def search_path() -> str:
    """This repository first. An empty part would be the working directory, which `-P` keeps out."""
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join([str(ROOT), *filter(None, given)])


def _one_gpu() -> dict[str, str]:
    """Each of several processes on a machine builds on a GPU of its own."""
    from nemo_diffgemma.parallel.team import own_device  # imports torch, for which the child may have no use

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if "LOCAL_RANK" not in os.environ or visible == "":
        return {}
    return {"CUDA_VISIBLE_DEVICES": str(own_device()) if visible is None else visible.split(",")[own_device()]}


def end_with_parent() -> None:
    """Have the kernel (Linux) kill this process when its parent ends, even one that could not say so any more."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def main() -> None:
    end_with_parent()
    answer = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is not the answer
    function, arguments = pickle.load(sys.stdin.buffer)
    try:
        result = function(*arguments)
    except (UserError, OSError) as error:
        error.add_note(traceback.format_exc())
        result = error
    with answer:
        pickle.dump((result, peak_memory()), answer)


if __name__ == "__main__":
    main()
