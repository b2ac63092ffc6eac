"""Megatron's optimizer from our configuration: AdamW, learning-rate schedule, and the adapter that Lightning counts.

Weight decay falls on matrices only: Megatron marks the groups of parameters of one axis. The learning rate is a
function of the step alone, so nothing of the schedule needs saving.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer

from nemo_diffgemma.model.network import Network
from nemo_diffgemma.parallel import megatron_cpu
from nemo_diffgemma.schema import ConfigurationError, OptimGroup
from nemo_diffgemma.training import average, optimizer_state, overlap
from nemo_diffgemma.training.update import fuse, update
from nemo_diffgemma.transfer import HostCopy

# says at each start that it divides the optimizer's state by itself
logging.getLogger(DistributedDataParallel.__module__).setLevel(logging.ERROR)

DECAYS = ("constant", "linear", "cosine")


def check(optim: OptimGroup) -> None:
    """Raise `ConfigurationError` for settings that make no schedule."""
    if optim.decay not in DECAYS:
        raise ConfigurationError(f"optim.decay={optim.decay!r}; use one of {', '.join(DECAYS)}")
    if not 0.0 <= optim.min_lr <= optim.lr or optim.lr == 0.0:
        raise ConfigurationError(
            f"optim.min_lr={optim.min_lr}, optim.lr={optim.lr}; expected 0 <= min_lr <= lr, lr > 0"
        )
    if not 0.0 <= optim.decay_start <= 1.0:
        raise ConfigurationError(f"optim.decay_start={optim.decay_start}; expected a part of the run, 0 to 1")
    if optim.clip_grad < 0.0 or not 0.0 <= optim.ema < 1.0:
        raise ConfigurationError(
            f"optim.clip_grad={optim.clip_grad}, optim.ema={optim.ema}; expected 0 or more, and 0 to below 1"
        )
    if optim.warmup_steps < 0:  # more than max_steps is fine: a short trial of a long run ends inside its warm-up
        raise ConfigurationError(f"optim.warmup_steps={optim.warmup_steps}; expected 0 or more")


def learning_rate(optim: OptimGroup, step: int, max_steps: int) -> float:
    """Rate of update `step`, counted from 1: linear warm-up, flat until `decay_start` of the run, down to `min_lr`.

    The first decayed update still has the full rate, and the last one is just above `min_lr`.
    """
    if step <= optim.warmup_steps:
        return optim.lr * step / optim.warmup_steps
    start = max(optim.warmup_steps, optim.decay_start * max_steps)
    progress = min(1.0, max(0.0, step - 1 - start) / max(1.0, max_steps - start))
    height = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}
    return optim.min_lr + (optim.lr - optim.min_lr) * height[optim.decay]


def data_parallel(network: Network, optim: OptimGroup) -> DistributedDataParallel:
    """Megatron's gradient buffers around `network`: float32, summed over replicas (our loss carries global weights).

    Sums, and the gathering of weights that the distributed optimizer has updated, run behind computation.
    """
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=optim.distributed,
        overlap_grad_reduce=True,
        overlap_param_gather=optim.distributed,
    )
    wrapped = DistributedDataParallel(network.config, config, network)
    overlap.wait_for_weights_where_they_are_used(wrapped, network)
    return wrapped


def build(wrapped: DistributedDataParallel, optim: OptimGroup, dtype: torch.dtype) -> MegatronOptimizer:
    """AdamW with float32 state and, for bfloat16 weights, float32 main weights; cut over replicas if `distributed`."""
    megatron_cpu.enable()
    config = OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        min_lr=optim.min_lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.betas[0],
        adam_beta2=optim.betas[1],
        adam_eps=optim.eps,
        clip_grad=optim.clip_grad,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=optim.distributed,
        overlap_param_gather=optim.distributed,
    )
    optimizer = get_megatron_optimizer(config, [wrapped], use_gloo_process_groups=False)
    for group in optimizer.param_groups:  # left to Megatron's own scheduler, which we do not use
        group["weight_decay"] = optim.weight_decay * group["wd_mult"]
    fuse(optimizer)
    optimizer_state.keep_average(optimizer, optim.ema > 0.0)
    return optimizer


class MegatronAdapter(torch.optim.Optimizer):
    """What Lightning sees of Megatron's optimizer: `step` advances `trainer.global_step` by one.

    `lr` goes to every parameter group at the next step; then the average of weights moves by 1 - `average_decay`.
    """

    def __init__(self, megatron: MegatronOptimizer) -> None:
        super().__init__([torch.nn.Parameter(torch.zeros(()))], {})
        self.megatron = megatron
        self.lr = 0.0
        self.average_decay: float | None = None
        self._grad_norm: HostCopy | None = None

    @property
    def grad_norm(self) -> float:
        """Global norm before clipping of the last step; waits until the device knows it, not until it is done."""
        return math.nan if self._grad_norm is None else self._grad_norm.numbers()[0]

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        if closure is not None:
            closure()
        for group in self.megatron.param_groups:
            group["lr"] = self.lr
        if self.average_decay is not None:
            optimizer_state.prime(self.megatron)  # from the weights before the first update
        self._grad_norm = HostCopy(update(self.megatron))
        if self.average_decay is not None:
            average.update(self.megatron, self.average_decay)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.megatron.zero_grad(set_to_none)
