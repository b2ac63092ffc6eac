"""Names of the beginnings of prompts, the same in the front end and in every replica. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

Key = bytes


def keys_of(tokens: Sequence[int], tile: int, salt: str = "") -> list[Key]:
    """The keys of the whole tiles of a prompt: each a hash of its tokens and of the key of the tile before.

    `salt` parts prompts whose keys and values differ (adapters).
    """
    key, keys = hashlib.blake2b(salt.encode(), digest_size=16).digest(), []
    whole = len(tokens) // tile * tile
    for tokens_of_tile in np.asarray(tokens[:whole], dtype=np.int64).reshape(-1, tile):
        key = hashlib.blake2b(key + tokens_of_tile.tobytes(), digest_size=16).digest()
        keys.append(key)
    return keys
