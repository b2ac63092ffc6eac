"""Attention visibility: what each token of a stream sees, in the two forms that attention kernels take.

The context keys of a layer lie in one tensor, sequence after sequence. As groups: segments of equal geometry, which run
as one batch without a mask or with one small band. As ranges: for each token one range of those keys and one of the
canvas keys behind them, which is a mask for FlexAttention that needs no `[T, keys]` tensor.
"""

from __future__ import annotations

import itertools
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from nemo_diffgemma.model.segments import Kind, Segment, Slices, Span, Stream
from nemo_diffgemma.transfer import to_device

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128  # queries and keys of a block of FlexAttention's mask
# Context tokens are computed in tiles of so many positions, counted from the first of their sequence, where that may
# show in the last bits: a tile is the same whether its prompt runs whole or in pieces that end with a tile.
TILE = BLOCK


class Group(NamedTuple):
    """Segments of as many queries and as many context keys; `ahead` of these lie before the first query.

    The first query of a context stands `in_tile` places behind the beginning of a tile.
    """

    kind: Kind
    ahead: int
    in_tile: int
    queries: Slices  # of the stream
    keys: Slices  # of the context keys; those of the queries themselves are among them where these are context


class Visibility:
    """Visibility of keys in the layers whose window is `window` (None: all before it).

    `kept` are the positions of each sequence whose keys the layer has, those of new context included. Raises ValueError
    for a segment that would see a key that was dropped.
    """

    def __init__(self, stream: Stream, window: int | None, kept: tuple[Span, ...]) -> None:
        self.stream, self.window, self.kept = stream, window, kept
        self._rows = tuple(itertools.accumulate((span.length for span in kept), initial=0))
        self._first_keys = [self._first_key(segment) for segment in stream.segments]

    @staticmethod
    def of(stream: Stream, window: int | None, kept: tuple[Span, ...]) -> Visibility:
        """The visibility of a layer, made for the first layer of a kind and kept with the stream."""
        made: dict[int | None, Visibility] = stream.__dict__.setdefault("_visibilities", {})
        if window not in made or made[window].kept != kept:
            made[window] = Visibility(stream, window, kept)
        return made[window]

    def _first_key(self, segment: Segment) -> int:
        """Position of the first key that the segment's first token sees."""
        first, kept = self.stream.sequences[segment.sequence].first, self.kept[segment.sequence].first
        seen = first if self.window is None else max(first, segment.start - (self.window - 1))
        if seen < kept:
            raise ValueError(f"{segment} sees keys from position {seen} on, but those before {kept} were dropped")
        return seen

    @property
    def context_keys(self) -> int:
        return self._rows[-1]

    def _row(self, sequence: int, position: int) -> int:
        """Where the key of a position lies among the context keys."""
        return self._rows[sequence] + position - self.kept[sequence].first

    # -- as groups -----------------------------------------------------------------------------------------------

    @cached_property
    def _members(self) -> dict[tuple[Kind, int, int, int], list[int]]:
        """Indices of segments by kind, queries, keys before the first query, and its place in a tile."""
        members: dict[tuple[Kind, int, int, int], list[int]] = {}
        for index, (segment, first_key) in enumerate(zip(self.stream.segments, self._first_keys, strict=True)):
            sequence, kind, start, length = segment
            in_tile = 0 if kind is Kind.CANVAS else (start - self.stream.sequences[sequence].first) % TILE
            members.setdefault((kind, length, start - first_key, in_tile), []).append(index)
        return members

    @cached_property
    def groups(self) -> list[Group]:
        stream, groups = self.stream, []
        for (kind, length, ahead, in_tile), members in self._members.items():
            rows = [self._row(stream.segments[index].sequence, self._first_keys[index]) for index in members]
            groups.append(
                Group(
                    kind,
                    ahead,
                    in_tile,
                    Slices([stream.offsets[index] for index in members], length, stream.tokens),
                    Slices(rows, ahead + length if kind is Kind.CONTEXT else ahead, self.context_keys),
                )
            )
        return groups

    def order(self, device: torch.device) -> Tensor | None:
        """Where each token of the stream lies in the outputs of all groups; None where these are in its order."""
        members = [index for group in self._members.values() for index in group]
        if members == sorted(members):
            return None

        def make() -> Tensor:
            offsets, segments = self.stream.offsets, self.stream.segments
            tokens = [torch.arange(offsets[index], offsets[index] + segments[index].length) for index in members]
            return torch.cat(tokens).argsort()

        return self.stream.table(f"order {self.window}", device, make)

    def needs_mask(self, group: Group) -> bool:
        """Whether its queries see neither all of the keys nor, being as many, all up to themselves."""
        narrow = self.window is not None and group.keys.length > self.window
        return group.kind is Kind.CONTEXT and (narrow or group.ahead > 0)

    @cached_property
    def is_uniform(self) -> bool:
        """Whether context and canvases are one group each that needs no mask."""
        kinds = [group.kind for group in self.groups]
        return len(kinds) == len(set(kinds)) and not any(map(self.needs_mask, self.groups))

    # -- as ranges -----------------------------------------------------------------------------------------------

    @cached_property
    def ranges(self) -> Tensor:
        """[T, 4] int32: each token sees keys [low, high) of the context, and [low, high) of context and canvas keys."""
        parts = []
        for segment, offset, first_key in zip(self.stream.segments, self.stream.offsets, self._first_keys, strict=True):
            own = self._row(segment.sequence, segment.start) + torch.arange(segment.length)
            low = torch.full_like(own, self._row(segment.sequence, first_key))
            if segment.kind is Kind.CANVAS:
                begin = self.context_keys + offset - self.stream.context_tokens
                high, canvas = torch.full_like(own, int(own[0])), torch.tensor([begin, begin + segment.length])
            else:
                high, canvas = own + 1, torch.zeros(2, dtype=torch.long)
                low = low if self.window is None else torch.maximum(low, high - self.window)
            parts.append(torch.stack([low, high, *canvas[:, None].expand(2, segment.length)], dim=1))
        parts.append(torch.zeros(self.stream.padding, 4, dtype=torch.long))
        return torch.cat(parts).int()

    def block_mask(self, device: torch.device) -> BlockMask:
        """The ranges as FlexAttention takes them, made once a stream and kind of layer."""
        masks: dict[torch.device, BlockMask] = self.__dict__.setdefault("_block_masks", {})
        if device not in masks:
            with torch.inference_mode(False):  # kept for passes with gradient
                masks[device] = self._block_mask(device)
        return masks[device]

    def _block_mask(self, device: torch.device) -> BlockMask:
        from torch.nn.attention.flex_attention import BlockMask  # loads torch's compiler

        low, high, canvas_low, canvas_high = to_device(self.ranges.t().contiguous(), device)

        def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            in_context = (key >= low[query]) & (key < high[query])
            return in_context | ((key >= canvas_low[query]) & (key < canvas_high[query]))

        keys = self.context_keys + self.stream.canvas_tokens
        touched = self._blocks(-(-keys // BLOCK), whole=False) > 0
        whole = self._blocks(-(-keys // BLOCK), whole=True) == BLOCK  # every query sees every key: no mask is evaluated
        return BlockMask.from_kv_blocks(
            *_block_lists(to_device(touched & ~whole, device)),
            *_block_lists(to_device(whole, device)),
            BLOCK_SIZE=BLOCK,
            mask_mod=sees,
            seq_lengths=(self.stream.tokens, keys),
        )

    def _blocks(self, columns: int, whole: bool) -> Tensor:
        """How many queries of each block see some key, or the whole, of each block of keys: [blocks, `columns`]."""
        rows = -(-self.stream.tokens // BLOCK)
        query = torch.arange(self.stream.tokens) // BLOCK
        steps = torch.zeros(rows, columns + 1, dtype=torch.long)
        for low, high in (self.ranges[:, :2].long().unbind(1), self.ranges[:, 2:].long().unbind(1)):
            begin, end = (-(-low // BLOCK), high // BLOCK) if whole else (low // BLOCK, -(-high // BLOCK))
            some = (end > begin) & (high > low)
            steps.index_put_((query[some], begin[some]), torch.tensor(1), accumulate=True)
            steps.index_put_((query[some], end[some]), torch.tensor(-1), accumulate=True)
        return steps.cumsum(1)[:, :columns]


def _block_lists(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """[rows, columns] bool -> number of blocks of each row, and the columns with those first: [1, 1, ...] int32."""
    columns = blocks.int().argsort(dim=1, descending=True, stable=True)
    return blocks.sum(1).int()[None, None], columns.int()[None, None]
