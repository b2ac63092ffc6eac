"""The released architecture, 25.2 B parameters, without weights: every graph is exported and built on two CPU cores."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from export.bundle.format import Bundle, read_bundle
from export.graph.loop import to_loop
from export.quantization.qdq import quantize_graph
from export.roofline import RooflineConfig, roofline
from nemo_diffgemma.cli.child_process import call_in_child
from tests.export.test_bundle import Shown

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Bundle, dict]:
    """The bundle, and what the command says of its graphs."""
    pytest.importorskip("tensorrt_rtx")
    out = tmp_path_factory.mktemp("released") / "bundle"
    command = [sys.executable, "export/build.py", "model=diffusiongemma_26b_a4b", f"out={out}"]
    command += ["builder=tensorrt_rtx", "dtype=bfloat16"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    print(done.stdout)  # the table, with -s
    return read_bundle(out), json.loads(done.stdout.splitlines()[-1])["graphs"]


def test_the_released_architecture_builds_without_its_weights(built):
    bundle, graphs = built
    assert bundle.settings.experts == "sparse"
    assert set(graphs) == {"encode.rank0", "step.rank0", "loop.rank0"}
    for graph in graphs.values():
        assert 1e6 < graph["engine_bytes"] < 2e8  # no weights in it
        assert graph["peak_memory"] < 4e9  # the weights alone are 50e9


def test_a_step_computes_what_was_chosen(built):
    """13.5e12 where every expert computes every token; a round of eight experts in every layer apart."""
    step = roofline(RooflineConfig(str(built[0].path)), Shown())["graphs"]["step"]
    assert step["flops_by_dtype"]["bfloat16"] <= 4.5e12
    assert step["round_flops_by_dtype"]["bfloat16"] == pytest.approx(0.73e12, rel=0.01)
    assert step["round_bytes"] == pytest.approx(45.7e9 / 16, rel=0.01)


@pytest.mark.parametrize(("scheme", "target"), [("int4", "sm_120"), ("nvfp4", "sm_121"), ("fp8", "sm_89")])
def test_loops_of_quantised_steps_build_for_their_gpus(built, scheme, target, tmp_path):
    """The loop holds the step, and the loops over overloaded experts inside of it."""
    bundle, _ = built
    call_in_child(build_loop, bundle.path, scheme, target, tmp_path)
    assert 1e6 < (tmp_path / "loop.engine").stat().st_size < 2e8


def build_loop(path: Path, scheme: str, target: str, folder: Path) -> None:
    """In a process of its own, for the memory."""
    from export.engine.builders import build_engine

    bundle = read_bundle(path)
    step = onnx.load(path / "step.rank0.onnx")
    model = to_loop(quantize_graph(step, scheme, dict.fromkeys(bundle.weights, 1.0)), 48)
    onnx.save(model, folder / "loop.onnx")
    profile = bundle.settings.profile("loop", bundle.config)
    build_engine("tensorrt_rtx", folder / "loop.onnx", folder / "loop.engine", profile, targets=[target])
