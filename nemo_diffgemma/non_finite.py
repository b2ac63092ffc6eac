"""Where numbers stop being finite: a tensor of the checkpoint, else the first module whose output is not.

Asked only after a result was seen to be NaN or infinite, so that a step never waits for the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from nemo_diffgemma.checkpoint.names import released_name, text_tensors
from nemo_diffgemma.errors import UserError
from nemo_diffgemma.parallel.agreement import gather


class NonFiniteError(UserError):
    """A result is NaN or infinite; the message names the layer and the tensor where that begins."""


@torch.no_grad()
def raise_non_finite(network: nn.Module, run: Callable[[], Any]) -> NoReturn:
    """Raise `NonFiniteError` on every rank. Collective; `run` does again what gave the result."""
    weight = first_non_finite((released_name(name), tensor) for name, tensor in text_tensors(network))
    message = next((text for text in gather(weight) if text is not None), None)
    if message is not None:
        raise NonFiniteError(f"{message}, so nothing that this model computes is a number; {DAMAGED}")
    with _watching(network) as outputs:
        run()
    calls = [first for first in gather(outputs[:1]) if first]
    if not calls:
        raise NonFiniteError(
            "a result is NaN or infinite, but computed again neither weights nor outputs of layers are; is the memory "
            "of this machine sound?"
        )
    _, name, dtype = min(first[0] for first in calls)
    raise NonFiniteError(
        f"{name} is the first module whose output is not finite (NaN or infinite), though all weights are; values are "
        f"too large for {dtype}: use dtype=float32, or other weights"
    )


DAMAGED = "the checkpoint is damaged, or was saved by a run that had diverged: use another"


def first_non_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """What is wrong with the first (name, tensor) that holds NaN or infinity; None where all are finite."""
    for name, tensor in tensors:
        if not is_finite(tensor):
            count = int((~tensor.isfinite()).sum())
            return f"{name} holds NaN or infinity in {count} of its {tensor.numel()} entries"
    return None


def is_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite, in one reading without a mask of its size; waits for the device."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    return bool(torch.stack(tensor.aminmax()).isfinite().all())  # either is NaN where any entry is


@contextmanager
def _watching(network: nn.Module) -> Any:
    """A list that gets (number of the call, module, dtype) for every output that is not finite."""
    outputs: list[tuple[int, str, str]] = []
    calls = [0]

    def look(name: str, output: Any) -> None:
        calls[0] += 1
        for part in output if isinstance(output, tuple) else (output,):
            if isinstance(part, Tensor) and not is_finite(part):
                outputs.append((calls[0], name, str(part.dtype).removeprefix("torch.")))

    handles = [
        module.register_forward_hook(lambda module, args, output, name=name: look(name, output))
        for name, module in network.named_modules()
        if name
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
