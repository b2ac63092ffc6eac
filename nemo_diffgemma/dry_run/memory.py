"""Memory of GPU tensors: storages from the operation that makes them to the moment nobody holds them.

Rounded to 512 bytes as torch's caching allocator does. Not in it: the CUDA context, cuBLAS and NCCL, workspaces inside
kernels, fragmentation.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Mapping

from torch import Tensor

from nemo_diffgemma.dry_run.ledger import Ledger, Numbers, place

GB = 1e9
_ROUND = 512
_LARGE = 256 << 20  # bytes from which on an allocation is remembered with its line


class Memory:
    """What is held now, and the peaks of every phase with what they were made of."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._sizes: dict[int, tuple[int, str, str]] = {}  # storage -> bytes, part, phase
        self.held: Counter[str] = Counter()  # by part
        self._held_of_phase: Counter[str] = Counter()
        self.now = 0
        self._peaks: dict[str, tuple[int, Mapping[str, int]]] = {}
        self._own: Counter[str] = Counter()
        self._before: dict[str, Mapping[str, int]] = {}  # what was held, by part, when each phase first began
        self.largest: dict[tuple[str, str], int] = {}  # phase, line -> bytes of the largest temporary there

    def track(self, tensor: Tensor) -> None:
        """Take note of the storage of a tensor, unless it is known."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, -(-storage.nbytes() // _ROUND) * _ROUND
        if key in self._sizes or size == 0:
            return
        part, phase = self._ledger.part, self._ledger.phase
        self._sizes[key] = (size, part, phase)
        weakref.finalize(storage, self._free, key).atexit = False
        self.held[part] += size
        self._held_of_phase[phase] += size
        self.now += size
        if size >= _LARGE:
            where = (phase, str(place()))
            self.largest[where] = max(self.largest.get(where, 0), size)
        self.look()

    def begin(self) -> None:
        """A phase begins."""
        self._before.setdefault(self._ledger.phase, dict(self.held))
        self.look()

    def look(self) -> None:
        """Compare what is held now with the peak of the phase."""
        phase = self._ledger.phase
        if self.now > self._peaks.get(phase, (0, {}))[0]:
            self._peaks[phase] = (self.now, dict(self.held))
        self._own[phase] = max(self._own[phase], self._held_of_phase[phase])

    def forget_peaks(self) -> None:
        """What follows is measured; what is held stays."""
        self._peaks.clear()
        self._own.clear()
        self._before.clear()
        self._held_of_phase.clear()
        self.largest.clear()
        self._sizes = {key: (size, part, "before") for key, (size, part, _) in self._sizes.items()}

    def rename(self, tensors: Iterable[Tensor], part: str) -> None:
        """The memory of these tensors belongs to `part`."""
        for x in tensors:
            key = x.untyped_storage()._cdata
            size, before, phase = self._sizes[key]
            self._sizes[key] = (size, part, phase)
            self.held[before] -= size
            self.held[part] += size

    def rename_part(self, before: str, part: str) -> None:
        """What belonged to one part belongs to another."""
        self.held[part] += self.held.pop(before, 0)
        self._sizes = {k: (size, part if p == before else p, phase) for k, (size, p, phase) in self._sizes.items()}

    def _free(self, key: int) -> None:
        size, part, phase = self._sizes.pop(key)
        self.held[part] -= size
        if phase in self._held_of_phase:
            self._held_of_phase[phase] -= size
        self.now -= size

    def numbers(self) -> Numbers:
        """Peaks in GB by phase; `own_gb` is the most that was held at one time of what the phase has taken."""
        numbers: Numbers = {}
        for phase, (peak, parts) in self._peaks.items():
            numbers["peak_gb", phase] = peak / GB
            numbers["own_gb", phase] = self._own[phase] / GB
            for part, size in parts.items():
                numbers["part_gb", phase, part] = size / GB
        for phase, parts in self._before.items():
            for part, size in parts.items():
                numbers["before_gb", phase, part] = size / GB
        return numbers
