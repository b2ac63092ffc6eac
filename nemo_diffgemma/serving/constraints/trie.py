"""The bytes of all tokens as a trie, by depth: built once a tokenizer, walked once a constraint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Level(NamedTuple):
    """The nodes of one depth: each one's parent, an index into the level above, and its byte, [nodes] both."""

    parent: NDArray[np.int64]
    byte: NDArray[np.int64]


@dataclass(frozen=True)
class Trie:
    """`ids` [T] are the tokens; token t ends `depth[t]` bytes below the root, at node `node[t]` of that level."""

    ids: NDArray[np.int64]
    depth: NDArray[np.int64]
    node: NDArray[np.int64]
    levels: tuple[Level, ...]

    @staticmethod
    def of(tokens: Mapping[int, bytes]) -> Trie:
        """Of tokens that have one byte or more each."""
        words = list(tokens.values())
        depth = np.array([len(word) for word in words], np.int64)
        width = int(depth.max(initial=0))
        letters = np.zeros((len(words), width), np.uint8)
        letters[np.arange(width) < depth[:, None]] = np.frombuffer(b"".join(words), np.uint8)
        here, node, levels = np.zeros(len(words), np.int64), np.zeros(len(words), np.int64), []
        for level in range(width):
            longer = np.flatnonzero(depth > level)
            key, own = np.unique(here[longer] * 256 + letters[longer, level], return_inverse=True)
            levels.append(Level(key // 256, key % 256))
            here[longer] = own
            ending = longer[depth[longer] == level + 1]
            node[ending] = here[ending]
        return Trie(np.fromiter(tokens, np.int64, len(words)), depth, node, tuple(levels))
