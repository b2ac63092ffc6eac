"""Several processes build one bundle, as srun starts them: what one alone builds, or nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import psutil
import pytest
import torch
from safetensors.torch import load_file

from export.build import BuildConfig, build
from nemo_diffgemma import DiffusionGemma
from nemo_diffgemma.checkpoint.open import save_network
from nemo_diffgemma.schema import ParallelGroup
from tests.export import kit
from tests.export.test_bundle import Shown
from tests.pool import free_port

SCRIPT = str(Path(__file__).resolve().parents[2] / "export" / "build.py")
LAYOUT = dict(tensor=2, expert=2)

pytestmark = pytest.mark.usefixtures("single")


def start(
    world: int, environment: Callable[[int], dict[str, str]], *arguments: str
) -> list[subprocess.CompletedProcess]:
    port = free_port()
    processes = []
    for rank in range(world):
        slurm = dict(SLURM_STEP_NUM_TASKS=str(world), SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank), SLURM_JOB_ID="1")
        meeting = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
        command = [sys.executable, SCRIPT, *arguments]
        processes.append(
            subprocess.Popen(
                command, env={**os.environ, **slurm, **meeting, **environment(rank)}, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )
        )  # fmt: skip
    ended = [(process, *process.communicate(timeout=240)) for process in processes]
    return [subprocess.CompletedProcess(p.args, p.returncode, out, errors) for p, out, errors in ended]


def arguments(checkpoint: Path, out: Path) -> list[str]:
    return [
        f"checkpoint={checkpoint}", f"out={out}", "weights=inline", "graphs=[encode,step]", "parallel=tp2_ep2",
        "max_context=64", "max_chunk=16",
    ]  # fmt: skip


def test_two_processes_build_what_one_does(traces, tmp_path):
    both = start(2, lambda rank: {}, *arguments(traces, tmp_path / "both"))
    assert [done.returncode for done in both] == [0, 0], both[0].stderr + both[1].stderr
    assert both[1].stdout == ""
    told = json.loads(both[0].stdout.splitlines()[-1])
    assert list(told["graphs"]) == ["encode.rank0", "encode.rank1", "step.rank0", "step.rank1"]
    config = BuildConfig(
        checkpoint=str(traces), out=str(tmp_path / "one"), weights="inline", graphs=["encode", "step"],
        parallel=ParallelGroup(**LAYOUT), max_context=64, max_chunk=16,
    )  # fmt: skip
    build(config, Shown())

    def files(bundle: Path) -> dict[str, Any]:
        found = {
            str(f.relative_to(bundle)): f for f in bundle.rglob("*") if f.is_file() and f.name != "build_info.json"
        }
        # equal graphs may be written in different bytes
        return {
            name: onnx.load(file, load_external_data=False) if file.suffix == ".onnx" else file.read_bytes()
            for name, file in found.items()
        }

    assert files(tmp_path / "both") == files(tmp_path / "one")


def test_an_error_of_one_ends_all_and_leaves_nothing(checkpoint, tmp_path):
    source = kit.calm(checkpoint)
    # the second process cannot write the weights of its rank: files of 1 KB are all it may have
    (tmp_path / "sitecustomize.py").write_text(
        "import resource, signal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))\n"
    )
    limited = {"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    both = start(2, lambda rank: limited if rank == 1 else {}, *arguments(source, tmp_path / "out" / "bundle"))
    # no refusal (2): where a disk has room again, the same command may succeed
    assert [done.returncode for done in both] == [1, 1], both[0].stderr + both[1].stderr
    assert "error: rank 1 stopped: OSError: [Errno 27] File too large" in " ".join(both[0].stderr.split())
    assert "Traceback" not in both[0].stderr + both[1].stderr  # rank 0 tells it for all
    assert list((tmp_path / "out").iterdir()) == []


def test_more_processes_than_ranks_are_refused(checkpoint, tmp_path):
    source = kit.calm(checkpoint)
    done = start(2, lambda rank: {}, f"checkpoint={source}", f"out={tmp_path / 'out'}", "max_context=64")
    assert [one.returncode for one in done] == [2, 2]
    assert "2 processes for the 1 ranks of layout single; start one a rank, or fewer" in " ".join(
        done[0].stderr.split()
    )


@pytest.mark.parametrize("format", ["nemo", "sharded"])
def test_a_checkpoint_of_another_format_gives_the_same_bundle(traces, tmp_path, format, monkeypatch):
    given = tmp_path / ("model.nemo" if format == "nemo" else "sharded")
    save_network(DiffusionGemma.from_checkpoint(traces), str(given), format)
    unpacked = []
    extract = tarfile.TarFile.extractall
    monkeypatch.setattr(
        tarfile.TarFile, "extractall", lambda self, path, **k: unpacked.append(path) or extract(self, path, **k)
    )
    for place, name in ((traces, "expected"), (given, "found")):
        config = BuildConfig(checkpoint=str(place), out=str(tmp_path / name), graphs=["encode", "step"], max_context=64)
        build(config, Shown())
    for file in ("encode.rank0.onnx", "step.rank0.onnx"):
        assert (tmp_path / "found" / file).read_bytes() == (tmp_path / "expected" / file).read_bytes()
    found, expected = (tensors(tmp_path / name / "checkpoint") for name in ("found", "expected"))
    assert found.keys() == expected.keys() and len(found) > 40
    for name, tensor in expected.items():
        assert tensor.dtype == found[name].dtype and torch.equal(tensor, found[name]), name
    # not under TMPDIR, which other nodes do not see
    assert [Path(place).parent for place in unpacked] == [tmp_path] * (format == "nemo")


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize(
    ("stage", "sent"),
    [
        ("tracing", signal.SIGTERM),
        ("tracing apart", signal.SIGTERM),
        ("tracing apart", signal.SIGKILL),
        pytest.param("building", signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_a_build_that_is_ended_leaves_nothing_behind(checkpoint, tmp_path, stage, sent):
    """As Slurm ends it at a pre-emption: no half-written bundle, and no child that goes on building."""
    if stage != "tracing":
        pytest.importorskip("tensorrt_rtx")
    out = tmp_path / "out" / "bundle"
    command = [sys.executable, SCRIPT, f"checkpoint={kit.calm(checkpoint)}", f"out={out}", "max_context=64"]
    command += ["builder=tensorrt_rtx"] * (stage != "tracing")
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    children: list[psutil.Process] = []
    until = time.monotonic() + 240
    while not (list(out.parent.glob(".bundle.*.partial/checkpoint")) if stage == "tracing" else children):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
        children = [child for child in psutil.Process(process.pid).children() if has_loaded(child, LOADED[stage])]
    for child in children:
        child.suspend()  # so that it is not its own end that is seen below
    process.send_signal(sent)
    _, errors = process.communicate(timeout=60)
    assert psutil.wait_procs(children, timeout=10)[1] == []
    if sent == signal.SIGTERM:  # else there was no time for more
        assert process.returncode == 128 + signal.SIGTERM, errors
        assert list(out.parent.iterdir()) == []


# the library by which a child is known
LOADED = {"tracing": "", "tracing apart": "libtorch_cpu", "building": "libtensorrt"}


def has_loaded(process: psutil.Process, library: str) -> bool:
    """Not before it is a program of its own: until then it has what its parent has loaded."""
    try:
        return "nemo_diffgemma.cli.child_process" in process.cmdline() and any(
            library in file.path for file in process.memory_maps()
        )
    except psutil.Error:
        return False
