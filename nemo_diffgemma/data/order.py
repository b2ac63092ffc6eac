"""The order in which examples are seen: a pure function of (seed, index), so that a resumed run asks for the next ones.

    order = Order([7168, 900], weights=[3.0, 1.0], seed=0)
    order.at(10**9)         # (source, example): nothing is kept, nothing is counted

Each source is shuffled anew for every epoch; within an epoch no example comes twice. Permutations are Feistel networks
(Luby and Rackoff, 1988) with cycle walking: they need no memory, whatever the number of examples.
"""

from __future__ import annotations

from collections.abc import Sequence

_ROUNDS = 8
_MASK = (1 << 64) - 1
_BLOCK = 4096  # examples over which the shares of weighted sources are exact


def _mix(value: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014): each bit of the result depends on all of `value`."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _key(*parts: int) -> int:
    key = 0
    for part in parts:
        key = _mix(key ^ (part & _MASK))
    return key


def permuted(index: int, size: int, key: int) -> int:
    """Where `index` goes in the permutation of range(size) that `key` names."""
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    while True:  # the network permutes the next power of 4, at most 4 times `size`: walk until inside
        left, right = index >> half, index & low
        for turn in range(_ROUNDS):
            left, right = right, left ^ (_mix(key ^ (turn << 58) ^ right) & low)
        index = left << half | right
        if index < size:
            return index


class Order:
    """Which example of which source is the one at an index of the endless stream.

    Without `weights` all sources are one set: each of its examples comes once an epoch. With them source k has the
    share weights[k] / sum(weights) of every 4096 examples, evenly spread, and epochs of its own. Sizes are positive.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float] | None, seed: int) -> None:
        self.sizes, self.seed = list(sizes), seed
        self.shares = None if weights is None else _shares(weights)
        self._block = [] if self.shares is None else _spread(self.shares)

    def at(self, index: int) -> tuple[int, int]:
        """(source, example) at `index`."""
        if self.shares is None:
            position = self._example(0, sum(self.sizes), index)
            for source, size in enumerate(self.sizes):
                if position < size:
                    return source, position
                position -= size
        assert self.shares is not None
        block, place = divmod(index, _BLOCK)
        source, before = self._block[place]
        return source, self._example(source + 1, self.sizes[source], block * self.shares[source] + before)

    def _example(self, stream: int, size: int, index: int) -> int:
        epoch, place = divmod(index, size)
        return permuted(place, size, _key(self.seed, 2, stream, epoch))


def _shares(weights: Sequence[float]) -> list[int]:
    """Whole numbers in proportion to `weights` that add up to a block, none below 1: by largest remainder."""
    exact = [weight * (_BLOCK - len(weights)) / sum(weights) for weight in weights]
    shares = [1 + int(part) for part in exact]
    by_remainder = sorted(range(len(exact)), key=lambda source: int(exact[source]) - exact[source])
    for source in by_remainder[: _BLOCK - sum(shares)]:
        shares[source] += 1
    return shares


def _spread(shares: Sequence[int]) -> list[tuple[int, int]]:
    """Each place of a block: its source, and how many of that source come before it."""
    places = [
        ((number + 0.5) / share, source, number) for source, share in enumerate(shares) for number in range(share)
    ]
    return [(source, number) for _, source, number in sorted(places)]
