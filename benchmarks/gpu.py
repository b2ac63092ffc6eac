"""The released network with random weights on one GPU: denoising steps, recorded and launched, and their kernels.

    python benchmarks/gpu.py                       # 52 GB of bfloat16 weights; layers=30 rows=1,4 prompt=1024
    python benchmarks/gpu.py 4 1 1024              # layers, rows, tokens of the prompt

Prints milliseconds of a denoising step (median over the steps of a canvas, all 48 of them), with and without the CUDA
graph, memory, and the kernels that take most of a launched step.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from nemo_diffgemma import DiffusionGemma, ModelConfig, ParallelLayout, SamplerConfig
from nemo_diffgemma.parallel import initialize

STEPS = 48


def network(layers: int) -> DiffusionGemma:
    """Random weights of the released widths, drawn on the GPU."""
    model = DiffusionGemma(ModelConfig(num_hidden_layers=layers), torch.bfloat16)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.02) if parameter.dim() > 1 else parameter.fill_(1.0)
    return model.eval()


def step_times(model: DiffusionGemma, rows: int, prompt: int, canvases: int) -> list[float]:
    """Milliseconds of each canvas over its steps, the prompt's or the last canvas's context included."""
    ids = torch.randint(2, 262_000, (rows, prompt), generator=torch.Generator().manual_seed(rows))
    never = SamplerConfig(max_denoising_steps=STEPS, confidence_threshold=0.0)
    times: list[float] = []

    def observe(step: Any) -> None:
        if step.remaining in (STEPS - 2, 2):
            torch.cuda.synchronize()
            times.append(time.perf_counter())

    model.generate(ids, max_new_tokens=canvases * model.model_config.canvas_length, sampler=never, observe=observe)
    return [(end - begin) * 1e3 / (STEPS - 4) for begin, end in zip(times[::2], times[1::2], strict=True)]


def main(layers: int = 30, rows: str = "1,4", prompt: int = 1024) -> None:
    initialize(ParallelLayout())
    began = time.perf_counter()
    model = network(layers)
    torch.cuda.synchronize()
    gb = torch.cuda.memory_allocated() / 1e9
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}: {layers} layers, {gb:.1f} GB of weights, "
        f"made in {time.perf_counter() - began:.1f} s",
        flush=True,
    )
    for count in map(int, rows.split(",")):
        for recorded in (True, False):
            fixed, model.fixed_steps = model.fixed_steps, model.fixed_steps if recorded else None
            torch.cuda.reset_peak_memory_stats()
            times = step_times(model, count, prompt, 3)
            print(
                f"rows {count}, prompt {prompt}, {'CUDA graph' if recorded else 'launched'}: "
                f"{statistics.median(times):.2f} ms a step (canvases: {', '.join(f'{t:.2f}' for t in times)}), "
                f"peak {torch.cuda.max_memory_allocated() / 1e9:.1f} GB",
                flush=True,
            )
            model.fixed_steps = fixed
    fixed, model.fixed_steps = model.fixed_steps, None
    with torch.profiler.profile() as profile:
        model.generate(torch.full((1, prompt), 7), max_new_tokens=1, sampler=SamplerConfig(max_denoising_steps=12))
    model.fixed_steps = fixed
    print(profile.key_averages().table(sort_by="cuda_time_total", row_limit=22, max_name_column_width=70))


if __name__ == "__main__":
    main(*(kind(value) for kind, value in zip((int, str, int), sys.argv[1:], strict=False)))
