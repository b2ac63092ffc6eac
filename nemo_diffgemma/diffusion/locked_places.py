"""Ids that stand in the answers of a batch, canvas by canvas, on the device (see `diffusion.locked`).

Shapes: B rows, C canvas positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nemo_diffgemma.transfer import to_device


def cells_of(locked: Mapping[int, int], index: int, length: int) -> list[int] | None:
    """The ids that stand in canvas `index` of an answer, -1 where none does; None for a canvas without any."""
    first = index * length
    cells = [locked.get(place, -1) for place in range(first, first + length)] if locked else []
    return cells if any(id >= 0 for id in cells) else None


class LockedPlaces:
    """`locked` has for each row ids by their place in its answer; nothing where no row has any."""

    def __init__(self, locked: Sequence[Mapping[int, int]], length: int, device: torch.device) -> None:
        self._locked = locked if any(locked) else ()
        self._length, self._device = length, device
        if self._locked:
            self._last_B1 = to_device(torch.tensor([[max(row, default=0)] for row in self._locked]), device)

    def of_canvas(self, index: int) -> Tensor | None:
        """The ids in canvas `index`, [B, C] int64, -1 where none stands; None where no row has any in it."""
        rows = [cells_of(row, index, self._length) for row in self._locked]
        if not any(rows):
            return None
        return to_device(torch.tensor([row or [-1] * self._length for row in rows]), self._device)

    def may_end(self, index: int, ends_BC: Tensor) -> Tensor:
        """Which of the tokens of canvas `index` that end an answer do: none before the last place that is locked."""
        if not self._locked:
            return ends_BC
        place_C = torch.arange(self._length, device=self._device) + index * self._length
        return ends_BC & (place_C >= self._last_B1)
