"""Seconds a denoising step and tokens a second of a bundle's engines.

    python benchmarks/engine.py bundles/mine --provider tensorrt --batch 8 --context 4096 --steps 16
    python benchmarks/engine.py bundles/mine                  # ONNX Runtime, on the CPU

One canvas of every row after a context of random ids. "a step" is the median of single steps, "a canvas" that of
whole canvases: the encoding of the context and all steps, stopping switched off, by `loop` where the bundle has one of
so many steps. Tokens a second are those of whole canvases. Prints the row as it stands in benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from export import open_bundle
from export.bundle.format import read_bundle
from export.engine.engine import Engine
from nemo_diffgemma import SamplerConfig


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--provider", default="onnxruntime", help="or tensorrt_rtx, tensorrt, tensorrt_llm")
    parser.add_argument("--device", type=int, default=None, help="default: that of LOCAL_RANK, or the only one")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=512, help="tokens before the canvas")
    parser.add_argument("--steps", type=int, default=16, help="denoising steps of a canvas")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    return parser.parse_args()


def seconds(call: Callable[[], object], engine: Engine, repeats: int) -> float:
    """Median of `repeats` calls, after three that warm up: the second of a shape captures a CUDA Graph."""
    times = []
    for _ in range(3 + repeats):
        start = time.perf_counter()
        call()
        if engine.device.type == "cuda":
            torch.cuda.synchronize(engine.device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[3:])


def one_step(engine: Engine, ids: torch.Tensor) -> Callable[[], object]:
    """A call of `step` as the first of a canvas, with everything on the device."""
    rows, canvas = ids.shape[0], (ids.shape[0], engine.model_config.canvas_length)
    context = engine.encode(ids.to(engine.device), engine.start([0] * rows))
    inputs = {
        "canvas": torch.randint(engine.model_config.vocab_size, canvas),
        "soft": engine.no_signal(rows),
        "temperature": torch.full((rows,), 0.8),
        "entropy_bound": torch.full((rows,), 0.1),
        "uniforms": torch.rand(canvas),
        "replacements": torch.randint(engine.model_config.vocab_size, canvas),
    }
    placed = {name: tensor.to(engine.device) for name, tensor in inputs.items()}
    return lambda: engine.step(context, placed)


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    settings = read_bundle(options.bundle).settings
    engine = open_bundle(options.bundle, options.provider, options.device)
    ids = torch.randint(engine.model_config.vocab_size, (options.batch, options.context))
    sampler = SamplerConfig(max_denoising_steps=options.steps, confidence_threshold=0.0)
    new = engine.model_config.canvas_length
    step = seconds(one_step(engine, ids), engine, options.repeats)
    canvas = seconds(lambda: engine.generate(ids, max_new_tokens=new, sampler=sampler), engine, options.repeats)
    where = f"CPU, threads: {options.threads}"
    if engine.device.type == "cuda":
        where = f"{settings.layout.world_size} x {torch.cuda.get_device_name(engine.device)}"
    if int(os.environ.get("RANK", 0)) > 0:
        return
    print("| provider | on | precision | experts | batch | context | steps | ms a step | ms a canvas | tokens/s |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    print(
        f"| {options.provider} | {where} | {settings.dtype} | {settings.quantization or settings.dtype} | "
        f"{options.batch} | {options.context} | {options.steps} | {step * 1e3:.2f} | {canvas * 1e3:.1f} | "
        f"{options.batch * new / canvas:.1f} |"
    )


if __name__ == "__main__":
    main()
