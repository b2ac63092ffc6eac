"""Blocks of context memory by number: who holds them, and which are free."""

from __future__ import annotations

from collections.abc import Iterable


class Blocks:
    """Numbers 0 .. count - 1, each free or held by some holders: sequences, and the prefix cache.

    A block that is freed is taken again last, so that a wrong reader would see it changed as late as possible; block
    numbers are the same on every rank, since all take and free alike.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._holders = [0] * count
        self._free = dict.fromkeys(range(count))

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self, wanted: int) -> list[int]:
        """Blocks with one holder. Raises ValueError where not so many are free."""
        if wanted > len(self._free):
            raise ValueError(f"{wanted} blocks wanted, {len(self._free)} are free")
        taken = [next(iter(self._free))] if wanted == 1 else list(self._free)[:wanted]
        for block in taken:
            del self._free[block]
            self._holders[block] = 1
        return taken

    def share(self, blocks: Iterable[int]) -> None:
        """One more holder of each."""
        for block in blocks:
            assert self._holders[block] > 0
            self._holders[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """One holder less; without any they are free."""
        for block in blocks:
            assert self._holders[block] > 0
            self._holders[block] -= 1
            if self._holders[block] == 0:
                self._free[block] = None

    def is_shared(self, block: int) -> bool:
        """Whether more than one holds it."""
        return self._holders[block] > 1
