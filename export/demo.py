"""Export the Sudoku model of `make demo`: build every graph, compare with PyTorch, solve a puzzle with the engine's graphs.

    make export-demo
    make export-demo ARGS="checkpoint=runs/sudoku_cpu/mine/checkpoints/step-1050"

Without a checkpoint it takes the newest one under runs/sudoku_cpu, and trains a shorter one where there is none. The last
line is JSON: bundles, what export/check.py found of each, and the engines that were built.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from export.build import BuildConfig, build
from export.check import CheckConfig, check
from export.entry import start
from export.run import RunConfig, run
from launch.output import Results
from nemo_diffgemma.training.schema import SamplerGroup

RUNS = Path("runs") / "sudoku_cpu"
PUZZLE = "..4.2..1.2..1..."  # one of those that are never trained on; the demo shows it too
SHORT = ("trainer.max_steps=300", "trainer.validate_every=0", "trainer.checkpoint_every=0")


@dataclass
class DemoConfig:
    """What `export/demo.py` reads."""

    checkpoint: str | None = None
    out: str = "runs/export_demo"
    max_batch_size: int = 4
    max_context: int = 256
    bundles: dict[str, Any] = field(
        default_factory=lambda: {
            "float32": {"dtype": "float32"},
            "bfloat16": {"dtype": "bfloat16"},
            "int4": {"dtype": "bfloat16", "quantization": "int4"},
            "tp2_ep2": {"dtype": "float32", "layout": {"tensor": 2, "expert": 2}},
        }
    )


def demo(config: DemoConfig, results: Results) -> dict[str, Any]:
    """Build, compare, solve."""
    checkpoint = config.checkpoint or newest() or train_a_short_one(results)
    builder = "tensorrt_rtx" if importlib.util.find_spec("tensorrt_rtx") else "onnx"
    results.show(f"checkpoint: {checkpoint}\nbuilder: {builder}\n")
    built: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="nemo_diffgemma.") as folder:
        source = released_format(checkpoint, Path(folder))
        for name, given in config.bundles.items():
            built[name] = one(name, given, source, builder, config, results)
    results.show("The float32 bundle solves a puzzle, step by step:\n")
    first = f"{config.out}/{next(iter(config.bundles))}"
    prompt = RunConfig(first, prompt=PUZZLE, max_new_tokens=16, show=True, sampler=SamplerGroup(max_denoising_steps=16))
    solved = run(prompt, results)
    results.show(f"\nrun it again: python export/run.py bundle={first} prompt={PUZZLE} show=true\n")
    return {"checkpoint": str(checkpoint), "bundles": built, "text": solved["text"]}
