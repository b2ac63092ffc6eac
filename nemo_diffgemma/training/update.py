"""One update of Megatron's optimizer in which nothing waits for the device: gradient norm, clipping, AdamW.

Megatron's own `step` reads one number a gradient where neither TransformerEngine nor apex is installed (hundreds a
step), and torch's default AdamW holds a temporary as large as all of its parameters. Here the norm and the factor of
clipping stay on the device, and torch's AdamW runs fused (one kernel, on CPUs as well); that of TransformerEngine or
apex, which Megatron takes where it finds one, is fused already.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from nemo_diffgemma.parallel.groups import device

_TORCH = (torch.optim.Adam, torch.optim.AdamW)


def parts_of(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The chained optimizers, of dense and of expert parameters; a rank without any of these has a stub."""
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in chained if not getattr(part, "is_stub_optimizer", False)]


def is_torchs(part: MegatronOptimizer) -> bool:
    """Whether AdamW is torch's, which counts steps in each parameter's state; the others count them in the group."""
    return isinstance(part.optimizer, _TORCH)


def fuse(optimizer: MegatronOptimizer) -> None:
    """Have torch's AdamW run its fused kernel; Megatron's configuration has no way to say so."""
    for part in filter(is_torchs, parts_of(optimizer)):
        for group in part.optimizer.param_groups:
            group["fused"], group["foreach"] = True, False


@torch.no_grad()
def update(optimizer: MegatronOptimizer) -> Tensor:
    """Update with the gradients in Megatron's buffers -> their global norm before clipping, [] float32 on the device.

    Where the norm is not finite nothing is scaled, so that whoever looks for the origin finds the gradients as they
    were.
    """
    optimizer.prepare_grads()
    norm = gradient_norm(optimizer)
    most = optimizer.config.clip_grad
    if most > 0.0:
        factor = (most / (norm + 1e-6)).clamp_max(1.0)
        factor = torch.where(norm.isfinite(), factor, 1.0)
        gradients = [main.grad for part in parts_of(optimizer) for main in part.get_parameters()]
        torch._foreach_mul_([gradient for gradient in gradients if gradient is not None], factor)
    optimizer.step_with_ready_grads()
    return norm


@torch.no_grad()
def gradient_norm(optimizer: MegatronOptimizer) -> Tensor:
    """Euclidean norm of the whole gradient, [] float32, equal on every rank.

    Each rank adds the squares of the shards that count on it (Megatron leaves out replicas over tensor parallelism),
    and one sum over the ranks is made where dense and expert parameters have the same ranks, as they do under the
    distributed optimizer.
    """
    squares: dict[dist.ProcessGroup, list[Tensor]] = {}
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):  # stubs too: their ranks join the sum
        gradients = [] if getattr(part, "is_stub_optimizer", False) else part.get_grads_for_grad_norm()
        squares.setdefault(part.get_grad_stats_parallel_group(), []).extend(gradients)
    total = torch.zeros((), dtype=torch.float32, device=device())
    for group, gradients in squares.items():
        part_total = torch.zeros_like(total)
        if gradients:
            part_total += torch.stack(torch._foreach_norm(gradients)).square().sum()
        dist.all_reduce(part_total, group=group)
        total += part_total
    return total.sqrt()
