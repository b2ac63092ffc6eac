"""Copies between host and device that neither side waits for."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`; from a host to a GPU through pinned memory, without waiting for what the GPU is at."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class HostCopy:
    """A copy of a small tensor that is made while the host goes on: it waits where the numbers are asked for.

    It then waits for what had been enqueued before the copy, not for what came after.
    """

    def __init__(self, values: Tensor) -> None:
        self._values = values.detach().flatten().to("cpu", non_blocking=True)  # from CUDA: into pinned memory
        self._copied: torch.cuda.Event | None = None
        if values.device.type == "cuda":
            self._copied = torch.cuda.Event()
            self._copied.record()

    def numbers(self) -> list[float]:
        """The numbers."""
        return self.values().tolist()

    def values(self) -> Tensor:
        """The copy, flat."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values


class LateFlag(HostCopy):
    """A flag of the device, on its way to the host: asked early, `bool()` waits until the device has computed it."""

    def __bool__(self) -> bool:
        if self._copied is not None and not self._copied.query():
            self._copied.synchronize()
        return bool(self._values)
