"""Who sees whom: the tokens of one pass, and attention over them without any `[S, S]` tensor.

One pass carries a flat stream of tokens: the context columns of all rows, then the canvases, then padding up to a
multiple of the tensor-parallel size. Context tokens are causal. A canvas sees the context keys before its start and
every token of itself; two canvases never see each other, so any number of them can be scored in one pass.

Shapes: B rows, S context columns of this pass, P cached columns before them, M canvases of C tokens each,
T = B*S + M*C + padding, N query heads, G key/value heads, D head width (heads of this rank).

Rows and canvases of equal geometry (same left padding, same start) run as one batch, which needs no key mask.
A sliding layer sees `window` keys for a context token, itself included, and for a whole canvas the last `window - 1`
keys before its start (transformers' DynamicCache + sdpa; the window is anchored at the canvas, not at its tokens).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_QUERY_BLOCK = 512  # rows of a causal mask at a time, where a mask is needed at all


def left_padding(input_ids: Tensor, attention_mask: Tensor | None) -> tuple[int, ...]:
    """Number of padding columns at the left of each row. Raises ValueError for any other kind of mask."""
    if attention_mask is None:
        return (0,) * input_ids.shape[0]
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {list(attention_mask.shape)} but input_ids has {list(input_ids.shape)}; give "
            "one mask entry for each token"
        )
    mask = attention_mask.bool().cpu()
    first = (~mask).sum(1)
    columns = torch.arange(mask.shape[1])
    if not torch.equal(mask, columns >= first[:, None]) or bool((first == mask.shape[1]).any()):
        raise ValueError(
            "attention_mask must be zeros at the left of a row and then ones, at least one of them; pad prompts on "
            "the left (tokenizer.padding_side='left')"
        )
    return tuple(first.tolist())


class Canvas(NamedTuple):
    """A canvas of one row; `start` counts the context columns before it, cached ones included."""

    row: int
    start: int


@dataclass(frozen=True)
class Stream:
    """The tokens of one pass. `first` holds each row's first real column, that is its left padding."""

    first: tuple[int, ...]
    context: int = 0
    cached: int = 0
    canvases: tuple[Canvas, ...] = ()
    canvas_length: int = 0
    multiple: int = 1

    def __post_init__(self) -> None:
        for canvas in self.canvases:
            if not self.first[canvas.row] < canvas.start <= self.cached + self.context:
                raise ValueError(
                    f"canvas of row {canvas.row} starts at column {canvas.start}, outside of its context "
                    f"({self.first[canvas.row]} to {self.cached + self.context}); a canvas needs at least one context "
                    "token before it"
                )

    @property
    def rows(self) -> int:
        return len(self.first)

    @property
    def context_tokens(self) -> int:
        return self.rows * self.context

    @property
    def canvas_tokens(self) -> int:
        return len(self.canvases) * self.canvas_length

    @property
    def padding(self) -> int:
        return -(self.context_tokens + self.canvas_tokens) % self.multiple

    @property
    def tokens(self) -> int:
        return self.context_tokens + self.canvas_tokens + self.padding

    def positions(self, device: torch.device) -> Tensor:
        """Rotary position of every token, [T]: its column (left padding is not subtracted, as in transformers)."""
        columns = torch.arange(self.cached, self.cached + self.context, device=device).repeat(self.rows)
        starts = torch.tensor([canvas.start for canvas in self.canvases], device=device, dtype=columns.dtype)
        inside = torch.arange(self.canvas_length, device=device)
        return torch.cat([columns, (starts[:, None] + inside).flatten(), columns.new_zeros(self.padding)])

    def canvas_mask(self, device: torch.device) -> Tensor:
        """Which tokens are canvas tokens, [T] bool."""
        mask = torch.zeros(self.tokens, dtype=torch.bool, device=device)
        mask[self.context_tokens : self.context_tokens + self.canvas_tokens] = True
        return mask

    def restoring_order(self, device: torch.device) -> Tensor | None:
        """Where each token lies in the outputs of all groups, one after the other; None where they are in order.

        Made once a stream: it is the same in every layer.
        """
        if "_order" not in self.__dict__:
            self.__dict__["_order"] = self._restoring_order(device)
        return self.__dict__["_order"]

    def _restoring_order(self, device: torch.device) -> Tensor | None:
        groups = [(rows, 0, self.context, self.rows) for _, rows in self.context_groups] if self.context else []
        offset, length, total = self.context_tokens, self.canvas_length, len(self.canvases)
        groups += [(members, offset, length, total) for _, _, members, _ in self.canvas_groups]
        if all(members.indices is None for members, *_ in groups):
            return None
        tokens = []
        for members, offset, length, total in groups:
            chosen = torch.tensor(members.indices or range(total))
            tokens.append((offset + chosen[:, None] * length + torch.arange(length)).flatten())
        return torch.cat(tokens).argsort().to(device)

    @cached_property
    def context_groups(self) -> list[tuple[int, Members]]:
        """Rows by left padding."""
        groups: dict[int, list[int]] = {}
        for row, first in enumerate(self.first):
            groups.setdefault(first, []).append(row)
        return [(first, Members.of(rows, self.rows)) for first, rows in groups.items()]

    @cached_property
    def canvas_groups(self) -> list[tuple[int, int, Members, Members]]:
        """(first column, start, canvases, their rows) for canvases of equal geometry."""
        groups: dict[tuple[int, int], list[int]] = {}
        for index, canvas in enumerate(self.canvases):
            groups.setdefault((self.first[canvas.row], canvas.start), []).append(index)
        return [
            (
                first,
                start,
                Members.of(members, len(self.canvases)),
                Members.of([self.canvases[i].row for i in members], self.rows),
            )
            for (first, start), members in groups.items()
        ]


class Members(NamedTuple):
    """Some entries of a leading axis; None stands for all of them in order, which then needs no copy."""

    indices: tuple[int, ...] | None

    @staticmethod
    def of(indices: list[int], total: int) -> Members:
        return Members(None if indices == list(range(total)) else tuple(indices))

    def select(self, x: Tensor) -> Tensor:
        return x if self.indices is None else x[_index(self.indices, x.device)]


@functools.lru_cache(maxsize=256)
def _index(indices: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(indices, device=device)


class KeyValue(NamedTuple):
    """Keys (normed, rotated) and values of one layer, [B, G, columns, D]; `offset` columns before them were dropped."""

    keys: Tensor
    values: Tensor
    offset: int = 0

    @property
    def end(self) -> int:
        """Number of context columns seen so far."""
        return self.offset + self.keys.shape[2]

    def columns(self, members: Members, start: int, end: int) -> tuple[Tensor, Tensor]:
        start = max(start, self.offset)
        cut = slice(start - self.offset, end - self.offset)
        return members.select(self.keys[:, :, cut]), members.select(self.values[:, :, cut])


def attend(
    q_TND: Tensor, k_TGD: Tensor, v_TGD: Tensor, stream: Stream, window: int | None, past: KeyValue | None
) -> tuple[Tensor, KeyValue | None]:
    """Attention of every token of the stream, scale 1. Returns `[T, N*D]` and the keys of cached plus new context."""
    context = past
    if stream.context:
        fresh = KeyValue(_rows(k_TGD, stream), _rows(v_TGD, stream))
        context = fresh if past is None else _append(past, fresh)
    pieces: list[Tensor] = []
    if stream.context:
        assert context is not None
        pieces += _attend_context(_rows(q_TND, stream), stream, window, context)
    if stream.canvases:
        assert context is not None
        pieces += _attend_canvases(q_TND, k_TGD, v_TGD, stream, window, context)
    out = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    order = stream.restoring_order(out.device)
    if order is not None:
        out = out[order]
    if stream.padding:
        out = F.pad(out, (0, 0, 0, stream.padding))
    return out, context


def _rows(x: Tensor, stream: Stream) -> Tensor:
    """Context part of a stream tensor as [B, heads, S, D]."""
    x = x[: stream.context_tokens]
    return x.view(stream.rows, stream.context, *x.shape[1:]).transpose(1, 2)


def _append(past: KeyValue, fresh: KeyValue) -> KeyValue:
    return KeyValue(
        torch.cat([past.keys, fresh.keys], dim=2), torch.cat([past.values, fresh.values], dim=2), past.offset
    )


def _attend_context(q_BNSD: Tensor, stream: Stream, window: int | None, context: KeyValue) -> list[Tensor]:
    pieces = []
    for first, rows in stream.context_groups:
        q_start, end = max(first, stream.cached), stream.cached + stream.context
        q = rows.select(q_BNSD)[:, :, q_start - stream.cached :]
        k_start = max(first, context.offset)
        keys, values = context.columns(rows, k_start, end)
        out = _causal(q, keys, values, q_start - k_start, window)
        out = F.pad(out, (0, 0, q_start - stream.cached, 0))  # nobody reads what padding sees: nothing
        pieces.append(out.transpose(1, 2).flatten(2).flatten(0, 1))
    return pieces


def _attend_canvases(
    q_TND: Tensor, k_TGD: Tensor, v_TGD: Tensor, stream: Stream, window: int | None, context: KeyValue
) -> list[Tensor]:
    def canvases(x: Tensor) -> Tensor:
        x = x[stream.context_tokens : stream.context_tokens + stream.canvas_tokens]
        return x.view(len(stream.canvases), stream.canvas_length, *x.shape[1:]).transpose(1, 2)

    q_MNCD, k_MGCD, v_MGCD = canvases(q_TND), canvases(k_TGD), canvases(v_TGD)
    pieces = []
    for first, start, members, rows in stream.canvas_groups:
        seen = first if window is None else max(first, start - (window - 1))
        keys, values = context.columns(rows, seen, start)
        keys = torch.cat([keys, members.select(k_MGCD)], dim=2)
        values = torch.cat([values, members.select(v_MGCD)], dim=2)
        q = members.select(q_MNCD)
        m, heads, length, width = q.shape
        # every query of a canvas sees the same keys, so the query heads of one key head are just more queries
        q = q.reshape(m, keys.shape[1], -1, width)
        out = F.scaled_dot_product_attention(q, keys, values, scale=1.0).view(m, heads, length, width)
        pieces.append(out.transpose(1, 2).flatten(2).flatten(0, 1))
    return pieces


def _causal(q: Tensor, k: Tensor, v: Tensor, ahead: int, window: int | None) -> Tensor:
    """Causal attention of [b, N, Q, D] queries whose first one stands `ahead` columns after the first key."""
    if q.is_cuda and k.shape[1] < q.shape[1] and (q.shape[3] > 256 or q.dtype == torch.float32):
        # flash attention takes neither, and only it knows grouped heads on CUDA: the fallback holds [heads, S, S]
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    queries, keys = q.shape[2], k.shape[2]
    narrow = window is not None and keys > window
    if not narrow and ahead == 0:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0, enable_gqa=True)
    block = max(window, 64) if narrow and window is not None else _QUERY_BLOCK
    outs = []
    for start in range(0, queries, block):
        end = min(start + block, queries)
        low = max(0, ahead + start - window + 1) if narrow and window is not None else 0
        mask = _band(end - start, ahead + start - low, window if narrow else None, q.device)
        high = ahead + end
        outs.append(
            F.scaled_dot_product_attention(
                q[:, :, start:end], k[:, :, low:high], v[:, :, low:high], attn_mask=mask, scale=1.0, enable_gqa=True
            )
        )
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)


@functools.lru_cache(maxsize=64)
def _band(queries: int, ahead: int, window: int | None, device: torch.device) -> Tensor:
    """[queries, ahead + queries] bool: key not after the query and, with a window, among its last `window` keys."""
    distance = torch.arange(ahead, ahead + queries, device=device)[:, None] - torch.arange(
        ahead + queries, device=device
    )
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)
