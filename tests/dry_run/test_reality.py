"""A dry run against a real one: memory of weights, gradients, optimizer state and activations of a small network."""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from nemo_diffgemma.cli.child_process import call_in_child
from nemo_diffgemma.dry_run.case import Case, released
from nemo_diffgemma.dry_run.driver import environment
from nemo_diffgemma.dry_run.ledger import Ledger, Numbers
from nemo_diffgemma.dry_run.memory import Memory
from nemo_diffgemma.dry_run.play import measure
from nemo_diffgemma.dry_run.whole import measure_all
from nemo_diffgemma.gpus import load_gpu
from nemo_diffgemma.schema import ModelGroup
from tests.dry_run import figures

# as many key as query heads: CUDA kernels want repeated ones in float32, which a CPU does not
SMALL = dict(
    vocab_size=8192,
    hidden_size=512,
    intermediate_size=1024,
    num_hidden_layers=4,
    layer_types=["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
    num_attention_heads=8,
    num_key_value_heads=8,
    head_dim=64,
    num_global_key_value_heads=8,
    global_head_dim=64,
    num_experts=16,
    top_k_experts=4,
    moe_intermediate_size=256,
    sliding_window=2048,
    canvas_length=256,
    initializer_range=0.02,
)
PARTS = ("weights", "gradients", "optimizer", "activations")


class RealMemory(TorchDispatchMode):
    """Tracks the storages of tensors that are there."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger()
        self.memory = Memory(self.ledger)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_iter(out):
            if isinstance(x, Tensor):
                self.memory.track(x)
        return out


class NormOfAGpu(torch.autograd.Function):
    """RMS norm that keeps what CUDA's one kernel keeps, input and one number a row; a CPU's keeps every step."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        scale = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(x, weight, scale)
        return x * scale if weight is None else x * scale * weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        normed = x * scale
        inner = gradient if weight is None else gradient * weight
        of_x = scale * (inner - normed * (inner * normed).mean(-1, keepdim=True))
        return of_x, None if weight is None else (gradient * normed).flatten(0, -2).sum(0), None


def real(cases: dict[str, Case]) -> dict[str, Numbers]:
    """What a training step of each case holds when it really runs, on the CPU."""
    from nemo_diffgemma.parallel import initialize

    initialize(figures.SINGLE)
    found = {}
    for name, case in cases.items():
        norm = mock.patch.object(F, "rms_norm", lambda x, _, weight, eps: NormOfAGpu.apply(x, weight, eps))
        with norm, RealMemory() as watch:
            found[name] = measure(watch, case, fill=lambda network: network.init_weights(0))
    return found


def test_memory_is_that_of_a_real_run() -> None:
    cases = {}
    for recompute in ("none", "full"):
        case = released(figures.SINGLE, recompute=recompute, prompts=(300,), responses=(1024,))
        model = ModelGroup(architecture=SMALL, recompute=recompute)
        cases[recompute] = dataclasses.replace(case, model=model)
    dry, _ = call_in_child(measure_all, cases, environment=environment(load_gpu("h100")))
    found, _ = call_in_child(real, cases)
    for recompute in cases:
        for part in PARTS:
            key = ("before_gb", "backward", part)
            assert dry[recompute].numbers[key] == pytest.approx(found[recompute][key], rel=0.05), (recompute, part)
