"""The memory of contexts under one budget: blocks for each sequence, what sequences share, and what is moved out.

Every sequence holds blocks of two kinds of layers: global ones keep all positions, sliding ones give back the blocks
that lie before the last window. Blocks are taken before a pass writes into them. Where none are free, those that only
the prefix cache holds are given up; where that is not enough the caller moves another sequence out to the host, from
where it comes back bit by bit as it was.

Every rank keeps the same books for its own heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from nemo_diffgemma.config import GLOBAL, SLIDING
from nemo_diffgemma.errors import UserError
from nemo_diffgemma.model.cache import Cache
from nemo_diffgemma.model.network import Network
from nemo_diffgemma.model.paged import BLOCK_TOKENS, PagedLayer, PassRows, row_bytes
from nemo_diffgemma.model.segments import Span
from nemo_diffgemma.model.visibility import TILE
from nemo_diffgemma.parallel.groups import device
from nemo_diffgemma.serving.blocks import Blocks
from nemo_diffgemma.serving.prefix_cache import BLOCKS_OF_TILE, PrefixCache
from nemo_diffgemma.serving.prefix_keys import Key
from nemo_diffgemma.transfer import to_device


@dataclass
class _Table:
    """Blocks of a sequence in the layers of one kind, those before `dropped` given back."""

    blocks: list[int] = field(default_factory=list)
    dropped: int = 0

    def rows(self, begin: int, end: int) -> np.ndarray:
        """Rows of the positions from `begin` to `end`."""
        positions = np.arange(begin, end)
        blocks = np.asarray(self.blocks, dtype=np.int64)[positions // BLOCK_TOKENS - self.dropped]
        return blocks * BLOCK_TOKENS + positions % BLOCK_TOKENS


@dataclass
class Held:
    """What a sequence holds: keys and values of its positions below `end`, and the prefix it shares."""

    keys: list[Key]
    end: int = 0
    remembered: int = 0  # tiles of its prompt that the prefix cache was told of
    tables: dict[str, _Table] = field(default_factory=dict)
    outside: dict[str, list[tuple[Tensor, Tensor]]] | None = None  # where it was moved out: of each layer of a kind


class ContextMemory:
    """Blocks of all layers of a network. `gigabytes` (1e9) of one rank are shared by the two kinds of layers such that
    sequences of `typical_tokens` use both up together. Raises `UserError` where not one such sequence fits."""

    def __init__(self, network: Network, gigabytes: float, typical_tokens: int, longest_step: int) -> None:
        model = network.model_config
        self.kinds = [kind for kind in (GLOBAL, SLIDING) if kind in model.layer_types]
        self.window = model.sliding_window
        self._layers = {
            kind: [index for index in range(model.num_hidden_layers) if model.layer_kind(index) == kind]
            for kind in self.kinds
        }
        tensor_parallel, self._all_layers = network.groups.tp.size(), model.num_hidden_layers
        bytes_of = {kind: BLOCK_TOKENS * row_bytes(model, kind, tensor_parallel, network.dtype) for kind in self.kinds}
        typical = {kind: self._most_blocks(kind, typical_tokens, longest_step) for kind in self.kinds}
        each = sum(typical[kind] * bytes_of[kind] for kind in self.kinds)
        sequences = gigabytes * 1e9 / each
        if sequences < 1:
            raise UserError(
                f"context memory of {gigabytes:g} GB, but one sequence of {typical_tokens} tokens takes "
                f"{each / 1e9:.2g} GB; give more, or expect shorter ones"
            )
        self.blocks = {kind: Blocks(int(sequences * typical[kind])) for kind in self.kinds}
        self.prefixes = PrefixCache(self.blocks, self.window)
        self._longest_step = longest_step
        self._memory: list[tuple[Tensor, Tensor]] = []
        for layer in range(model.num_hidden_layers):
            head_dim, heads = model.heads_of_rank(layer, tensor_parallel)
            rows = self.blocks[model.layer_kind(layer)].count * BLOCK_TOKENS
            shape = (rows, heads, head_dim)
            make = lambda: torch.zeros(shape, dtype=network.dtype, device=device())  # noqa: B023  called at once
            self._memory.append((make(), make()))

    def _most_blocks(self, kind: str, tokens: int, longest_step: int) -> int:
        """The most blocks that a sequence of so many tokens holds at a time."""
        if kind == SLIDING:  # a window and what one pass adds, wherever block borders fall
            tokens = min(tokens, self.window - 1 + longest_step + BLOCK_TOKENS)
        return -(-tokens // BLOCK_TOKENS)

    def fits(self, tokens: int) -> bool:
        """Whether a sequence could ever have so many tokens of context."""
        return all(self._most_blocks(k, tokens, self._longest_step) <= self.blocks[k].count for k in self.kinds)

    # -- sequences -------------------------------------------------------------------------------------------------

    def open(self, keys: list[Key]) -> Held:
        """A sequence that is about to encode a prompt; what the prefix cache has of its tiles counts as encoded."""
        held = Held(keys)
        known = self.prefixes.longest(held.keys)
        shared = self.prefixes.share(held.keys[:known])
        held.end, held.remembered = known * TILE, known
        for kind in self.kinds:
            held.tables[kind] = _Table(shared[kind], known * BLOCKS_OF_TILE - len(shared[kind]))
        return held

    def has_room(self, held: Held, tokens: int) -> bool:
        """Whether a sequence of so many tokens in all would find its blocks now."""
        for kind, table in held.tables.items():
            wanted = self._most_blocks(kind, tokens, self._longest_step) - len(table.blocks)
            self.prefixes.give_up(kind, wanted)
            if self.blocks[kind].free < wanted:
                return False
        return True

    def reserve(self, held: Held, tokens: int) -> bool:
        """Blocks for `tokens` more context tokens; False, with nothing taken, where there are not so many."""
        wanted = {}
        for kind, table in held.tables.items():
            wanted[kind] = -(-(held.end + tokens) // BLOCK_TOKENS) - table.dropped - len(table.blocks)
            self.prefixes.give_up(kind, wanted[kind])
            if self.blocks[kind].free < wanted[kind]:
                return False
        for kind, count in wanted.items():
            held.tables[kind].blocks += self.blocks[kind].take(max(0, count))
        return True

    def extend(self, held: Held, tokens: int) -> None:
        """A pass has written `tokens` more into the blocks reserved for them."""
        held.end += tokens
        known = held.remembered
        while held.remembered < min(len(held.keys), held.end // TILE):
            for kind, table in held.tables.items():
                first = held.remembered * BLOCKS_OF_TILE - table.dropped
                self.prefixes.remember(held.keys, held.remembered, kind, table.blocks[first : first + BLOCKS_OF_TILE])
            held.remembered += 1
        if held.remembered > known:
            self.prefixes.touch(held.keys[: held.remembered])
        if SLIDING in held.tables:
            table = held.tables[SLIDING]
            useless = max(0, held.end - (self.window - 1)) // BLOCK_TOKENS - table.dropped
            if useless > 0:
                self.blocks[SLIDING].release(table.blocks[:useless])
                del table.blocks[:useless]
                table.dropped += useless

    def close(self, held: Held) -> None:
        """The sequence is over."""
        for kind, table in held.tables.items():
            self.blocks[kind].release(table.blocks)
        held.tables, held.outside = {}, None

    # -- passes ----------------------------------------------------------------------------------------------------

    def cache(self, sequences: Sequence[Held], new: Sequence[int]) -> Cache:
        """The context of some sequences for a pass that gives each so many new tokens; their blocks are reserved."""
        rows = {kind: self._rows(kind, sequences, new) for kind in self.kinds}
        layers: list[PagedLayer] = [None] * self._all_layers  # type: ignore[list-item]
        for kind, indices in self._layers.items():
            for index in indices:
                layers[index] = PagedLayer(*self._memory[index], rows[kind])
        return Cache(tuple(Span(0, held.end) for held in sequences), tuple(layers))  # type: ignore[arg-type]

    def _rows(self, kind: str, sequences: Sequence[Held], new: Sequence[int]) -> PassRows:
        fresh, seen, kept = [], [], []
        for held, tokens in zip(sequences, new, strict=True):
            first = 0 if kind == GLOBAL else max(0, held.end - (self.window - 1))
            table, end = held.tables[kind], held.end + tokens
            seen.append(table.rows(first, end))
            fresh.append(seen[-1][held.end - first :])
            kept.append(Span(first, end))
        new_n, seen_K = (to_device(torch.from_numpy(np.concatenate(parts)), device()) for parts in (fresh, seen))
        return PassRows(new_n, seen_K, tuple(kept))

    # -- moving out ------------------------------------------------------------------------------------------------

    def move_out(self, held: Held) -> None:
        """Copy what a sequence holds to the host and give its blocks back."""
        held.outside = {}
        for kind, table in held.tables.items():
            first = table.dropped * BLOCK_TOKENS
            rows = to_device(torch.from_numpy(table.rows(first, held.end)), device())
            held.outside[kind] = [
                (keys.index_select(0, rows).cpu(), values.index_select(0, rows).cpu())
                for keys, values in (self._memory[layer] for layer in self._layers[kind])
            ]
            self.blocks[kind].release(table.blocks)
            table.blocks = []

    def move_in(self, held: Held) -> bool:
        """Bring a sequence back; False, with nothing done, where there are not enough free blocks."""
        assert held.outside is not None
        if not self.reserve(held, 0):
            return False
        for kind, parts in held.outside.items():
            table = held.tables[kind]
            rows = to_device(torch.from_numpy(table.rows(table.dropped * BLOCK_TOKENS, held.end)), device())
            for layer, (keys, values) in zip(self._layers[kind], parts, strict=True):
                self._memory[layer][0].index_copy_(0, rows, to_device(keys, device()))
                self._memory[layer][1].index_copy_(0, rows, to_device(values, device()))
        held.outside = None
        return True
