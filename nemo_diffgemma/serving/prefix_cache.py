"""Beginnings of prompts whose keys and values are still there, so that a shared system prompt is encoded once.

Prompts are encoded in tiles (`model.visibility.TILE`), which are the same whatever comes behind them or runs beside
them. A tile is known by everything up to its end: its key is a hash of its tokens and of the key of the tile before.
Global layers need the blocks of all tiles of a prefix, sliding layers those of its last window alone; so the two are
kept and given up apart, the longest unused first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from nemo_diffgemma.config import GLOBAL, SLIDING
from nemo_diffgemma.model.paged import BLOCK_TOKENS
from nemo_diffgemma.model.visibility import TILE
from nemo_diffgemma.serving.blocks import Blocks
from nemo_diffgemma.serving.prefix_keys import Key

BLOCKS_OF_TILE = TILE // BLOCK_TOKENS


class PrefixCache:
    """Tiles by key; holds a share of their blocks."""

    def __init__(self, blocks: dict[str, Blocks], window: int) -> None:
        self._blocks = blocks
        # blocks of each tile in the layers of each kind that still has them, the longest unused first
        self._tiles: OrderedDict[Key, dict[str, list[int]]] = OrderedDict()
        self._window_tiles = -(-(window - 1) // TILE) if SLIDING in blocks else 0

    def __len__(self) -> int:
        return len(self._tiles)

    def longest(self, keys: Sequence[Key]) -> int:
        """How many of a prompt's first tiles can be taken from here."""
        known = 0
        while known < len(keys) and GLOBAL in self._blocks_of(keys[known]):
            known += 1
        while known and not all(SLIDING in self._blocks_of(key) for key in self._in_window(keys[:known])):
            known -= 1
        return known

    def _blocks_of(self, key: Key) -> dict[str, list[int]]:
        return self._tiles.get(key, {})

    def _in_window(self, keys: Sequence[Key]) -> Sequence[Key]:
        """The tiles that sliding layers see from behind the last of `keys`."""
        return keys[max(0, len(keys) - self._window_tiles) :] if self._window_tiles else []

    def share(self, keys: Sequence[Key]) -> dict[str, list[int]]:
        """The blocks of a prefix as `longest` found it, for one more holder: of sliding layers the last ones."""
        shared = {}
        for kind, held in self._blocks.items():
            of_kind = keys if kind == GLOBAL else self._in_window(keys)
            shared[kind] = [block for key in of_kind for block in self._tiles[key][kind]]
            held.share(shared[kind])
        self.touch(keys)
        return shared

    def touch(self, keys: Sequence[Key]) -> None:
        """These first tiles of a prompt are in use. One is always more recent than those behind it, which are of no
        use without it."""
        for key in reversed(keys):
            if key in self._tiles:
                self._tiles.move_to_end(key)

    def remember(self, keys: Sequence[Key], index: int, kind: str, blocks: list[int]) -> None:
        """Tile `index` of a prompt with these `keys` has been encoded into these blocks of the layers of a kind."""
        if kind == GLOBAL and index and GLOBAL not in self._blocks_of(keys[index - 1]):
            return  # nobody could reach it
        tile = self._tiles.setdefault(keys[index], {})
        if kind not in tile:
            tile[kind] = blocks
            self._blocks[kind].share(blocks)

    def give_up(self, kind: str, wanted: int) -> None:
        """Let blocks of a kind go, the longest unused first, until `wanted` are free or none is left to let go."""
        blocks = self._blocks[kind]
        for key in list(self._tiles) if blocks.free < wanted else ():
            tile = self._tiles[key]
            if kind in tile and not any(map(blocks.is_shared, tile[kind])):
                blocks.release(tile.pop(kind))
                if not tile:
                    del self._tiles[key]
            if blocks.free >= wanted:
                return
