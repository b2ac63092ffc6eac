"""The released architecture, 25.2 B parameters, without weights: every graph is exported and built on two CPU cores."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from export.bundle.format import Bundle, read_bundle
from export.roofline import RooflineConfig, roofline
from tests.export.test_bundle import Shown

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]


def build(out: Path, *overrides: str) -> tuple[Bundle, dict]:
    """The bundle, and what the command says of its graphs."""
    command = [sys.executable, "export/build.py", "model=diffusiongemma_26b_a4b", f"out={out}"]
    command += ["builder=tensorrt_rtx", "dtype=bfloat16", *overrides]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    print(done.stdout)  # the table, with -s
    return read_bundle(out), json.loads(done.stdout.splitlines()[-1])["graphs"]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Bundle, dict]:
    pytest.importorskip("tensorrt_rtx")
    return build(tmp_path_factory.mktemp("released") / "bundle")


def test_the_released_architecture_builds_without_its_weights(built):
    bundle, graphs = built
    assert bundle.settings.experts == "sparse"
    assert set(graphs) == {"encode.rank0", "step.rank0"}
    for graph in graphs.values():
        assert 1e6 < graph["engine_bytes"] < 4e8  # no weights in it
        assert graph["peak_memory"] < 4e9  # the weights alone are 50e9
        assert 1e9 < graph["scratch_bytes"] < 8e9  # of GPU memory, at batches up to 8; copies of all experts are 46e9


def test_a_step_computes_what_was_chosen(built):
    """13.5e12 where every expert computes every token; a round of eight experts in every layer apart."""
    step = roofline(RooflineConfig(str(built[0].path)), Shown())["graphs"]["step"]
    assert step["flops_by_dtype"]["bfloat16"] <= 4.5e12
    assert step["round_flops_by_dtype"]["bfloat16"] == pytest.approx(0.73e12, rel=0.01)
    assert step["round_bytes"] == pytest.approx(45.7e9 / 16, rel=0.01)


@pytest.mark.parametrize(("scheme", "gpu"), [("int4", "rtx_5090"), ("nvfp4", "dgx_spark"), ("fp8", "rtx_pro_6000")])
def test_quantised_experts_build_for_their_gpus(scheme, gpu, tmp_path):
    """In the form that is chosen for them."""
    pytest.importorskip("tensorrt_rtx")
    bundle, graphs = build(tmp_path / "bundle", f"quantization={scheme}", f"gpu={gpu}")
    assert bundle.settings.experts == "sparse"
    assert set(graphs) == {"encode.rank0", "step.rank0"}
    for graph in graphs.values():
        assert 1e6 < graph["engine_bytes"] < 8e8  # no weights in it
        assert graph["peak_memory"] < 4e9
        assert 1e9 < graph["scratch_bytes"] < 12e9
