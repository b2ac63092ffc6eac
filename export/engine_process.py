"""Builds an engine in a process of its own, which needs no torch and gives all of TensorRT's memory back at its end.

Run as `python -m export.engine_process`, it reads the arguments of `build_engine` as JSON and answers with JSON. It
ends with whoever has started it.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from export.builders import BuilderError, Profile, build_engine

ROOT = Path(__file__).resolve().parents[1]


def build_engine_apart(
    builder: str, onnx_file: Path, engine_file: Path, profile: Profile, world: int = 1, targets: Sequence[str] = ()
) -> int:
    """`build_engine` in a child, on this process's own GPU -> the child's peak memory in bytes."""
    asked = [builder, str(onnx_file), str(engine_file), dict(profile), world, list(targets)]
    done = subprocess.run(  # kills the child where it is left by an exception, SystemExit of a signal too
        [sys.executable, "-P", "-m", "export.engine_process"],
        input=json.dumps(asked),
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **_one_gpu(), "PYTHONPATH": _search_path()},
    )
    if done.returncode:
        raise BuilderError(f"the process that built {engine_file.name} ended with code {done.returncode}; see above")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if "error" in answer:
        raise BuilderError(answer["error"])
    return answer["peak_memory"]


def _search_path() -> str:
    """This repository first. An empty part would be the working directory, which `-P` keeps out."""
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join([str(ROOT), *filter(None, given)])


def _one_gpu() -> dict[str, str]:
    """Of several processes on a machine, each builds on a GPU of its own."""
    from export.team import own_device  # imports torch, for which the child has no use

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if "LOCAL_RANK" not in os.environ or visible == "":
        return {}
    return {"CUDA_VISIBLE_DEVICES": str(own_device()) if visible is None else visible.split(",")[own_device()]}


def _end_with_parent() -> None:
    """Have the kernel (Linux) kill this process when its parent ends, even one that could not say so any more."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def main() -> None:
    _end_with_parent()
    builder, onnx_file, engine_file, profile, world, targets = json.load(sys.stdin)
    sizes = {name: tuple(of_axis) for name, of_axis in profile.items()}
    try:
        report = build_engine(builder, Path(onnx_file), Path(engine_file), sizes, world=world, targets=targets)
        answer = dataclasses.asdict(report)
    except BuilderError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
