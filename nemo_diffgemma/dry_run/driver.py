"""Build the stand-in for the CUDA driver, and say what environment a process needs to see its GPU.

    call_in_child(function, environment=environment(load_gpu("h100")))

The library is compiled once for each state of its source, of the CUDA headers (those of torch's own wheels) and of the
compiler, into a cache directory of the user.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

from nemo_diffgemma.errors import UserError
from nemo_diffgemma.gpus import Gpu
from nemo_diffgemma.scratch import scratch_directory, temporary_directory

_SOURCE = Path(__file__).with_name("driver.c")
NOT_THERE = "(not there)"  # ends the name of its GPU
_COMPILERS = ("cc", "gcc", "clang")
# multiprocessors and shared memory of a block by compute capability (CUDA programming guide, table of technical
# specifications; white papers for the first figure): what torch reads of a GPU beside its capability
_PROPERTIES = {
    "sm_80": (108, 163 << 10),
    "sm_90": (132, 227 << 10),
    "sm_100": (148, 227 << 10),
    "sm_120": (170, 99 << 10),
    "sm_121": (48, 99 << 10),
}


class DriverError(UserError):
    """The stand-in driver cannot be built on this machine."""


def environment(gpu: Gpu) -> dict[str, str]:
    """Variables with which a new process finds one GPU of this kind. Raises `DriverError`."""
    properties = _PROPERTIES.get(gpu.compute_capability)
    if properties is None:
        raise DriverError(
            f"{gpu.name} has compute capability {gpu.compute_capability}, for which a dry run knows no properties; it "
            f"knows {', '.join(_PROPERTIES)}"
        )
    number = int(gpu.compute_capability.removeprefix("sm_"))
    multiprocessors, shared_memory = properties
    described = f"{number // 10} {number % 10} {multiprocessors} {shared_memory} {gpu.memory_gb * 1e9:.0f} {gpu.name}"
    return {
        "LD_PRELOAD": str(library()),
        "NEMO_DIFFGEMMA_DRY_RUN_GPU": described,
        "CUDA_VISIBLE_DEVICES": "0",
        "TORCHDYNAMO_DISABLE": "1",  # nothing can be compiled for a GPU that is not there
        "OMP_NUM_THREADS": "1",
    }


def check_loaded() -> None:
    """Raise `DriverError` in a process that was to find the GPU and does not: on its CPUs a network would take memory.

    A library that cannot be preloaded is left out with a warning.
    """
    import torch

    if not torch.cuda.is_available() or not torch.cuda.get_device_name().endswith(NOT_THERE):
        raise DriverError(
            "the dry run's stand-in for a GPU was compiled but not loaded (a file system mounted noexec, or a torch "
            "without CUDA); name a folder whose files can be executed in XDG_CACHE_HOME, and install torch for CUDA"
        )


def library() -> Path:
    """The compiled driver; built on first use. Raises `DriverError`."""
    compiler, headers = _compiler(), _headers()
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    key = hashlib.sha256(b"\0".join([_SOURCE.read_bytes(), str(headers).encode(), compiler.encode(), version]))
    name = f"driver-{key.hexdigest()[:16]}.so"
    try:
        return _built(_cache(), name, compiler, headers)
    except (OSError, RuntimeError):  # a home directory that cannot be written, or none
        return _built(temporary_directory("dry_run")[0], name, compiler, headers)


def _cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "nemo_diffgemma"


def _built(folder: Path, name: str, compiler: str, headers: list[Path]) -> Path:
    target = folder / name
    if target.is_file():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with scratch_directory(folder, name, private=True) as scratch:
        made = scratch / name
        options = ["-shared", "-fPIC", "-O1", "-w", "-pthread", "-Wl,-soname,libcuda.so.1"]
        options += [f"-I{folder}" for folder in headers]
        done = subprocess.run([compiler, *options, str(_SOURCE), "-o", str(made)], capture_output=True, text=True)
        if done.returncode:
            problem = " ".join(done.stderr.split())[:400]
            raise DriverError(f"{compiler} cannot compile {_SOURCE.name}, the dry run's stand-in for a GPU: {problem}")
        os.replace(made, target)  # whoever builds at the same time puts the same there
    return target


def _compiler() -> str:
    given = os.environ.get("CC")
    for name in [given] if given else _COMPILERS:
        if found := shutil.which(name):
            return found
    raise DriverError(
        f"a dry run compiles a small C file on first use, and there is no compiler ({given or ', '.join(_COMPILERS)}) "
        "on this machine; install one (apt-get install gcc), or name it in CC"
    )


def _headers() -> list[Path]:
    """Folders with the CUDA runtime's headers: those of torch's wheels and of Triton's (crt/), else of a toolkit."""
    site = Path(sysconfig.get_paths()["purelib"])
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"
    folders = [*sorted(site.glob("nvidia/*/include")), site / "triton/backends/nvidia/include", toolkit]
    for needed in ("cuda_runtime_api.h", "crt/host_defines.h"):
        if not any((folder / needed).is_file() for folder in folders):
            raise DriverError(
                f"a dry run needs the header {needed}, which the CUDA build of torch brings with Triton; it is "
                f"neither in {site} nor in {toolkit}; install it (pip install torch), or set CUDA_HOME to a toolkit"
            )
    return [folder for folder in folders if folder.is_dir()]
