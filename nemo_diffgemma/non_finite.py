"""Find where numbers stop being finite: in a tensor of the checkpoint, a gradient or a module's output.

Asked only after a result was seen to be NaN or infinite, so that no step waits for the answer. What concerns a whole
network is collective: every rank asks, and all get the same answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from nemo_diffgemma.checkpoint.names import released_name, text_tensors
from nemo_diffgemma.errors import UserError
from nemo_diffgemma.parallel.agreement import gather

DAMAGED = "the checkpoint is damaged, or was saved by a run that had diverged: use another"


class NonFiniteError(UserError):
    """A result is NaN or infinite; the message names the layer and the tensor where that begins."""


def is_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite, in one reading without a mask of its size; waits for the device."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    return bool(torch.stack(tensor.aminmax()).isfinite().all())  # either is NaN where any entry is


def first_non_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """What is wrong with the first (name, tensor) that holds NaN or infinity; None where all are finite."""
    for name, tensor in tensors:
        if not is_finite(tensor):
            count = int((~tensor.isfinite()).sum())
            return f"{name} holds NaN or infinity in {count} of its {tensor.numel()} entries"
    return None


def raise_non_finite(network: nn.Module, run: Callable[[], Any]) -> NoReturn:
    """Raise `NonFiniteError` on every rank; `run` does again what gave the result."""
    weight = non_finite_weight(network)
    if weight is not None:
        raise NonFiniteError(f"{weight}, so nothing that this model computes is a number; {DAMAGED}")
    module = non_finite_output(network, run)
    if module is None:
        raise NonFiniteError(
            "a result is NaN or infinite, but computed again neither weights nor outputs of layers are; is the memory "
            "of this machine sound?"
        )
    raise NonFiniteError(
        f"{module} is the first module whose output is not finite (NaN or infinite), though all weights are; values "
        "are too large for the dtype of this model: use dtype=float32, or other weights"
    )


def non_finite_weight(network: nn.Module) -> str | None:
    """What is wrong with the first weight that is not finite on any rank, by its name on disk."""
    weight = first_non_finite((released_name(name), tensor) for name, tensor in text_tensors(network))
    return next((text for text in gather(weight) if text is not None), None)


def non_finite_gradient(network: nn.Module) -> str | None:
    """What is wrong with the gradient nearest to the loss that is not finite: from there it went to those before."""
    gradients = [(name, getattr(p, "main_grad", p.grad)) for name, p in network.named_parameters()]
    gradient = first_non_finite((name, gradient) for name, gradient in reversed(gradients) if gradient is not None)
    return next((text for text in gather(gradient) if text is not None), None)


@torch.no_grad()
def non_finite_output(network: nn.Module, run: Callable[[], Any]) -> str | None:
    """The module whose output is the first that is not finite, on any rank, when `run` calls the network."""
    calls = 0
    failures: list[tuple[int, str]] = []

    def look(name: str, output: Any) -> None:
        nonlocal calls
        calls += 1
        parts = output if isinstance(output, tuple | list) else [output]
        if not failures and not all(is_finite(part) for part in parts if isinstance(part, Tensor)):
            failures.append((calls, name))

    handles = [
        module.register_forward_hook(lambda module, inputs, output, name=name: look(name, output))
        for name, module in network.named_modules()
        if name
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return min((call for calls_of_rank in gather(failures) for call in calls_of_rank), default=(0, None))[1]
