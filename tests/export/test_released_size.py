"""The released architecture, 25.2 B parameters, without weights: every graph is exported and built on two CPU cores."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_released_architecture_builds_without_its_weights(tmp_path):
    pytest.importorskip("tensorrt_rtx")
    command = [sys.executable, "export/build.py", "model=diffusiongemma_26b_a4b", f"out={tmp_path / 'bundle'}"]
    command += ["builder=tensorrt_rtx", "dtype=bfloat16"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    print(done.stdout)  # the table, with -s
    graphs = json.loads(done.stdout.splitlines()[-1])["graphs"]
    assert set(graphs) == {"encode.rank0", "step.rank0", "loop.rank0"}
    for graph in graphs.values():
        assert 1e6 < graph["engine_bytes"] < 1e8  # no weights in it
        assert graph["peak_memory"] < 2e9  # the weights alone are 50e9
