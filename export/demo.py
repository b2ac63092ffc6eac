"""Export the Sudoku model of `make demo`: build every graph, compare with PyTorch, solve a puzzle with the graphs.

    make export-demo
    make export-demo ARGS="checkpoint=runs/sudoku_cpu/mine/checkpoints/step-1300"

Without a checkpoint it takes the newest one under runs/sudoku_cpu, and trains a shorter one where there is none. The
last line is JSON: bundles, what export/check.py found of each, and the engines that were built.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from export.build import BuildConfig, build
from export.check import CheckConfig, check
from export.run import RunConfig, run
from nemo_diffgemma.cli.demo_checkpoint import demo_checkpoint
from nemo_diffgemma.cli.output import Results
from nemo_diffgemma.cli.start import start
from nemo_diffgemma.repository import user_path
from nemo_diffgemma.schema import ParallelGroup, SamplerGroup

CALIBRATION = ("1...4..3.2....1.", "................", "..3.4...1.....2.", "2..4....3...1...")
PUZZLE = "..4.2..1.2..1..."  # one of those that are never trained on; the demo shows it too
STEPS = 16  # of a canvas
SHORT = 300  # steps of the demo: its tokens mean something, but it does not solve much


@dataclass
class DemoConfig:
    """Configuration of `export/demo.py`."""

    checkpoint: str | None = None
    out: str = "runs/export_demo"
    max_batch_size: int = 4
    max_context: int = 256


BUNDLES: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "float16": {"dtype": "float16"},
    "bfloat16": {"dtype": "bfloat16"},
    "fp8": {"dtype": "float16", "quantization": "fp8"},  # float16: ONNX Runtime computes it
    "int4": {"dtype": "float16", "quantization": "int4"},
    "nvfp4": {"dtype": "bfloat16", "quantization": "nvfp4"},
    "tp2_ep2": {"dtype": "float32", "layout": {"tensor": 2, "expert": 2}},
}


def demo(config: DemoConfig, results: Results) -> dict[str, Any]:
    """Build, compare, solve."""
    checkpoint = demo_checkpoint(config.checkpoint, results, SHORT)
    builder = "tensorrt_rtx" if importlib.util.find_spec("tensorrt_rtx") else "onnx"
    results.show(f"checkpoint: {checkpoint}\nbuilder: {builder}\n")
    user_path(config.out).mkdir(parents=True, exist_ok=True)
    (user_path(config.out) / "calibration.txt").write_text("".join(f"{puzzle}\n" for puzzle in (PUZZLE, *CALIBRATION)))
    built: dict[str, Any] = {}
    for name, given in BUNDLES.items():
        built[name] = one(name, given, checkpoint, builder, config, results)
    results.show("The float32 bundle solves a puzzle, step by step:\n")
    bundle = f"{config.out}/float32"
    solved = run(RunConfig(bundle, prompt=PUZZLE, show=True, sampler=SamplerGroup(max_denoising_steps=STEPS)), results)
    again = f"bundle={bundle} prompt={PUZZLE} show=true sampler.max_denoising_steps={STEPS}"
    results.show(f"\nrun it again: python export/run.py {again}\n")
    return {"checkpoint": str(checkpoint), "bundles": built, "text": solved["text"]}


def one(
    name: str, given: dict[str, Any], checkpoint: str, builder: str, config: DemoConfig, results: Results
) -> dict[str, Any]:
    """Build one bundle and compare it -> what was found. Engines of earlier demos make room."""
    out = user_path(config.out) / name
    shutil.rmtree(out, ignore_errors=True)
    layout = ParallelGroup(**given.get("layout", {}))
    results.show(f"== {name}")
    asked = BuildConfig(
        checkpoint=checkpoint,
        out=str(out),
        builder=builder,
        dtype=given["dtype"],
        quantization=given.get("quantization"),
        calibration=f"{config.out}/calibration.txt",
        steps=STEPS,
        max_batch_size=config.max_batch_size,
        max_context=config.max_context,
        parallel=layout,
    )
    graphs = build(asked, results)["graphs"]
    results.show("")
    verdict = check(CheckConfig(str(out), canvases=1, agreement=0.8), results)
    results.show("")
    return {"graphs": graphs, **verdict}


if __name__ == "__main__":
    start(demo, DemoConfig, "export_demo")
