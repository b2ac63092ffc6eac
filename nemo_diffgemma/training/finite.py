"""Which tensor is not finite. Asked only after a step has failed, by every rank alike; all get the same answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from nemo_diffgemma.parallel.agreement import gather


def not_finite_weight(network: nn.Module) -> str | None:
    """The first weight with a value that is not finite, on any rank."""
    return _agreed(_first((name, parameter) for name, parameter in network.named_parameters()))


def not_finite_gradient(network: nn.Module) -> str | None:
    """The weight nearest to the loss whose gradient is not finite, on any rank: from there it went to those before."""
    gradients = [(name, getattr(p, "main_grad", p.grad)) for name, p in network.named_parameters()]
    return _agreed(_first((name, gradient) for name, gradient in reversed(gradients) if gradient is not None))


def not_finite_output(network: nn.Module, run: Callable[[], Any]) -> str | None:
    """The module of which, when `run` calls the network, an output is the first that is not finite, on any rank."""
    calls: list[str] = []
    culprit: list[tuple[int, str]] = []

    def hook(name: str) -> Callable[..., None]:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            calls.append(name)
            outputs = output if isinstance(output, tuple | list) else [output]
            tensors = ((name, part) for part in outputs if isinstance(part, Tensor))
            if not culprit and _first(tensors) is not None:
                culprit.append((len(calls), name))

        return look

    handles = [module.register_forward_hook(hook(name)) for name, module in network.named_modules() if name]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return _agreed(culprit[0] if culprit else None)


def _first(tensors: Iterable[tuple[str, Tensor]]) -> tuple[int, str] | None:
    for index, (name, tensor) in enumerate(tensors):
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            return index, name
    return None


def _agreed(mine: tuple[int, str] | None) -> str | None:
    """The first of all ranks."""
    return min((place for place in gather(mine) if place is not None), default=(0, None))[1]
