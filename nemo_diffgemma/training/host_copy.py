"""Numbers of the device on their way to the host."""

from __future__ import annotations

import torch
from torch import Tensor


class HostCopy:
    """A copy of a small tensor that is made while the host goes on: it waits where the numbers are asked for.

    It then waits for what had been enqueued before the copy, not for what came after.
    """

    def __init__(self, values: Tensor) -> None:
        self._values = values.detach().flatten().to("cpu", non_blocking=True)  # from CUDA: into pinned memory
        self._done: torch.cuda.Event | None = None
        if values.is_cuda:
            self._done = torch.cuda.Event()
            self._done.record()

    def numbers(self) -> list[float]:
        """The numbers."""
        if self._done is not None:
            self._done.synchronize()
        return self._values.tolist()
