"""What a step has to say: a line of metrics.jsonl, and the same for TensorBoard and Weights & Biases.

Meanings and formulas: docs/metrics.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist

from nemo_diffgemma.gpus import gpu_of_device
from nemo_diffgemma.training.step import StepNumbers


@dataclass(frozen=True)
class StepResult:
    """Result of a step; `loss` is the mean over the global batch before the update.

    What cannot be said (MFU of a CPU, levels that no canvas of the step had) is left out.
    """

    step: int
    loss: float
    grad_norm: float  # global, before clipping
    lr: float
    diffusion: float
    autoregressive: float
    tokens_per_second: float  # of rows
    seconds: float
    canvas_tokens_per_second: float  # scored
    canvas_accuracy: float
    loss_by_level: dict[str, float]
    accuracy_by_level: dict[str, float]
    expert_load: float  # of the busiest expert over the mean one, in the layer where that is most
    unused_experts: int  # of all layers
    model_tflops: float  # a second and process
    memory_gb: float  # of rank 0: the most that its GPU has held; on a CPU, what the process holds
    mfu: float | None  # model_tflops over the GPU's dense peak in the model's dtype

    @classmethod
    def of(cls, step: int, numbers: StepNumbers, grad_norm: float, lr: float, seconds: float, dtype: str) -> StepResult:
        """From what the passes and the update told."""
        per_second = numbers.flops / seconds / dist.get_world_size()
        peak = _peak(dtype)
        busiest, unused = balance(numbers.loads)
        return cls(
            step=step,
            loss=numbers.loss,
            grad_norm=grad_norm,
            lr=lr,
            diffusion=numbers.diffusion,
            autoregressive=numbers.autoregressive,
            tokens_per_second=numbers.tokens / seconds,
            seconds=seconds,
            canvas_tokens_per_second=numbers.canvas_tokens / seconds,
            canvas_accuracy=numbers.canvas_accuracy,
            loss_by_level=numbers.loss_by_level,
            accuracy_by_level=numbers.accuracy_by_level,
            expert_load=busiest,
            unused_experts=unused,
            model_tflops=per_second / 1e12,
            memory_gb=_memory() / 1e9,
            mfu=None if peak is None else per_second / peak,
        )

    def line(self) -> dict[str, Any]:
        """For metrics.jsonl."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}

    def scalars(self) -> dict[str, float]:
        """One number a name, for loggers."""
        return dict(scalars(self.line()))


def scalars(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Numbers by name; those of a dictionary are named `outer/inner`."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from scalars(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", float(value)


def balance(loads: Sequence[Sequence[float]]) -> tuple[float, int]:
    """Tokens of the busiest expert over the mean, in the layer where that is most, and experts that got none."""
    busiest = max(max(layer) * len(layer) / max(1, sum(layer)) for layer in loads)
    return busiest, sum(load == 0 for layer in loads for load in layer)


@cache
def _peak(dtype: str) -> float | None:
    """FLOP/s of this GPU in `dtype`; None on a CPU, and for a GPU that conf/gpu does not know."""
    gpu = gpu_of_device(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    return None if gpu is None else gpu.peak(dtype)


def _memory() -> int:
    """Bytes: the most that this process has held of its GPU since the start, or what it holds now."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
