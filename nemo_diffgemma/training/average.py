"""An exponential moving average of the trained weights, beside the optimizer's state: float32, cut over replicas alike.

    optim.ema=0.999        each update moves the average by a thousandth towards the weights

It is saved with the optimizer's state; `weights=ema` of launch/evaluate.py and launch/convert.py takes it.
"""

from __future__ import annotations

import torch
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from nemo_diffgemma.training.update import parts_of

EMA = "ema"  # in the state of each parameter


def decay_at(decay: float, step: int) -> float:
    """Of update `step`, counted from 1: smaller at first, so that initial weights are forgotten (TensorFlow's rule)."""
    return min(decay, (1.0 + step) / (10.0 + step))


@torch.no_grad()
def start(optimizer: MegatronOptimizer) -> None:
    """The average is the weights, where there is none yet; the optimizer's own state must be there."""
    for main, state in _states(optimizer):
        if EMA not in state:
            state[EMA] = main.detach().clone()


@torch.no_grad()
def update(optimizer: MegatronOptimizer, decay: float) -> None:
    """Move the average towards the weights as they are now."""
    pairs = [(state[EMA], main.detach()) for main, state in _states(optimizer)]
    if pairs:
        averages, weights = zip(*pairs, strict=True)
        torch._foreach_lerp_(list(averages), list(weights), 1.0 - decay)


def _states(optimizer: MegatronOptimizer) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Float32 weights of this rank and what the optimizer keeps of them."""
    return [
        (main, part.optimizer.state[main])
        for part in parts_of(optimizer)
        for group in part.optimizer.param_groups
        for main in group["params"]
    ]
