"""The tokens of one pass as a list of segments, which say who sees whom.

A pass carries one flat stream of tokens: the new context of some sequences, then any number of canvases, then padding
up to a multiple of the tensor-parallel size (`row_products.multiple_of_tokens`). Sequences are independent:
each has its own first position, its own cached context, its own new context and its own canvases, of any number.
Context tokens are causal. A canvas sees the context of its sequence before its start and every token of itself; two
canvases never see each other, so any number of them can be scored in one pass.

A sliding layer sees `window` keys for a context token, itself included, and for a whole canvas the last `window - 1`
keys before its start (transformers' DynamicCache + sdpa; the window is anchored at the canvas, not at its tokens).
What a token sees is therefore one range of its sequence's context keys and, in a canvas, the canvas's own keys. A block
of context tokens that see each other both ways, as those of an image do, would be a third kind of segment between two
causal ones of its sequence: the range of each of its tokens ends where the block ends.

Positions are rotary positions. Left padding is no token: a prompt behind 3 columns of padding is a sequence whose first
position is 3 (transformers does not subtract padding from positions).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nemo_diffgemma.errors import UserError
from nemo_diffgemma.transfer import to_device


class Kind(Enum):
    """What a segment's tokens are."""

    CONTEXT = "context"  # causal; writes keys and values
    CANVAS = "canvas"  # bidirectional; sees the context before it and itself


class Span(NamedTuple):
    """Consecutive positions of a sequence, `end` excluded: its context so far, or those whose keys are kept."""

    first: int
    end: int

    @property
    def length(self) -> int:
        return self.end - self.first


class Segment(NamedTuple):
    """Consecutive tokens of one sequence; `start` is the position of the first."""

    sequence: int
    kind: Kind
    start: int
    length: int


def left_padding(input_ids: Tensor, attention_mask: Tensor | None) -> tuple[int, ...]:
    """Number of padding columns at the left of each row. Raises `UserError` for any other kind of mask."""
    if attention_mask is None:
        return (0,) * input_ids.shape[0]
    if attention_mask.shape != input_ids.shape:
        raise UserError(
            f"attention_mask has shape {list(attention_mask.shape)} but input_ids has {list(input_ids.shape)}; give "
            "one mask entry for each token"
        )
    mask = attention_mask.cpu()
    padding = (mask == 0).sum(1)
    columns = torch.arange(mask.shape[1])
    # the mask's own values are compared: a 2, or the 0 and -inf of an additive mask, is no mask of ours
    if not torch.equal(mask, (columns >= padding[:, None]).to(mask.dtype)) or bool((padding == mask.shape[1]).any()):
        raise UserError(
            "attention_mask must be zeros at the left of a row and then ones, at least one of them; pad prompts on "
            "the left (tokenizer.padding_side='left')"
        )
    return tuple(padding.tolist())


def without_padding(ids_BS: Tensor, padding: Sequence[int]) -> tuple[Tensor, ...]:
    """The tokens of each left-padded row."""
    return tuple(row[columns:] for row, columns in zip(ids_BS.unbind(), padding, strict=True))


@dataclass(frozen=True, eq=False)
class Stream:
    """The tokens of one pass: `segments` of `sequences`, whose spans are their contexts before the pass.

    Context segments come first, at most one of a sequence, in the order of the sequences; then the canvases. A sequence
    without segments is left as it is. What the device needs of it is made once and kept.
    """

    sequences: tuple[Span, ...]
    segments: tuple[Segment, ...]
    multiple: int = 1  # padding makes the tokens a multiple of it

    def __post_init__(self) -> None:
        object.__setattr__(self, "_tables", {})
        contexts = self.contexts
        if self.segments[: len(contexts)] != contexts or any(
            a.sequence >= b.sequence for a, b in itertools.pairwise(contexts)
        ):
            raise ValueError("context segments come before canvases, one of a sequence, in the order of the sequences")
        for segment in contexts:
            if segment.start != self.sequences[segment.sequence].end:
                raise ValueError(f"{segment} does not begin where {self.sequences[segment.sequence]} ends")
        for sequence, _, start, _ in self.canvases:
            first, end = self.sequences_after[sequence]
            if not first < start <= end:
                raise ValueError(
                    f"canvas of sequence {sequence} starts at position {start}, outside of its context ({first} to "
                    f"{end}); a canvas needs at least one context token before it"
                )

    @cached_property
    def contexts(self) -> tuple[Segment, ...]:
        return tuple(segment for segment in self.segments if segment.kind is Kind.CONTEXT)

    @cached_property
    def canvases(self) -> tuple[Segment, ...]:
        return tuple(segment for segment in self.segments if segment.kind is Kind.CANVAS)

    @cached_property
    def sequences_after(self) -> tuple[Span, ...]:
        """The sequences with the new context of this pass."""
        new = {segment.sequence: segment.length for segment in self.contexts}
        return tuple(Span(first, end + new.get(index, 0)) for index, (first, end) in enumerate(self.sequences))

    @cached_property
    def context_tokens(self) -> int:
        return sum(segment.length for segment in self.contexts)

    @cached_property
    def canvas_tokens(self) -> int:
        return sum(segment.length for segment in self.canvases)

    @property
    def padding(self) -> int:
        return -(self.context_tokens + self.canvas_tokens) % self.multiple

    @cached_property
    def tokens(self) -> int:
        return self.context_tokens + self.canvas_tokens + self.padding

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each segment begins in the stream."""
        return tuple(itertools.accumulate((segment.length for segment in self.segments[:-1]), initial=0))

    def positions(self, device: torch.device) -> Tensor:
        """Rotary position of every token, [T]; 0 for padding."""

        def make() -> Tensor:
            parts = [torch.arange(segment.start, segment.start + segment.length) for segment in self.segments]
            return torch.cat([*parts, torch.zeros(self.padding, dtype=torch.long)])

        return self.table("positions", device, make)

    def canvas_mask(self, device: torch.device) -> Tensor:
        """Which tokens are canvas tokens, [T] bool."""

        def make() -> Tensor:
            tokens = torch.arange(self.tokens)
            return (tokens >= self.context_tokens) & (tokens < self.context_tokens + self.canvas_tokens)

        return self.table("canvas_mask", device, make)

    def table(self, name: str, device: torch.device, make: Callable[[], Tensor]) -> Tensor:
        """What `make` gives, on the device: one transfer a stream, none in a layer."""
        tables: dict[Any, Tensor] = self.__dict__["_tables"]
        if (name, device) not in tables:
            with torch.inference_mode(False):  # a stream is kept, and its next pass may have gradient
                tables[name, device] = to_device(make(), device)
        return tables[name, device]


@dataclass(frozen=True, eq=False, kw_only=True)
class FixedStream(Stream):
    """One canvas of each sequence behind contexts in buffers of fixed columns (`model.fixed_step`).

    Where the canvases stand, and which columns they see, is not in the segments but on the device: rotary positions
    [T], and for each window an additive mask [B, 1, 1, columns], or None where canvases see all columns.
    """

    positions_T: Tensor
    masks: Mapping[int | None, Tensor | None]

    def positions(self, device: torch.device) -> Tensor:
        return self.positions_T


@functools.lru_cache(maxsize=4)
def stream_of(
    sequences: tuple[Span, ...],
    contexts: tuple[int, ...],
    canvases: tuple[tuple[int, int], ...],
    lengths: int | tuple[int, ...],
    multiple: int,
) -> Stream:
    """The stream of `contexts` (new tokens of each sequence, may be none) and `canvases` (sequence, start).

    `lengths` are those of the canvases, or one of all.

    The last few are kept: every denoising step of a canvas runs the same one.
    """
    new = [
        Segment(index, Kind.CONTEXT, sequences[index].end, length) for index, length in enumerate(contexts) if length
    ]
    each = lengths if isinstance(lengths, tuple) else (lengths,) * len(canvases)
    new += [
        Segment(sequence, Kind.CANVAS, start, length) for (sequence, start), length in zip(canvases, each, strict=True)
    ]
    return Stream(sequences, tuple(new), multiple)


class Slices:
    """`length` rows from each of `starts` on, of tensors of `total` rows: a view where they are evenly spaced."""

    def __init__(self, starts: Sequence[int], length: int, total: int) -> None:
        self.starts, self.length, self.count = starts, length, len(starts)
        self._view = self._evenly_spaced(total)
        self._indices: dict[torch.device, Tensor] = {}

    def _evenly_spaced(self, total: int) -> tuple[int, int, int] | None:
        """(first row, rows from one slice to the next, rows before each slice), where a view can be taken."""
        start = self.starts[0]
        if self.count == 1:
            return start, self.length, 0
        step = self.starts[1] - start
        before = max(0, start + self.count * step - total)  # no rows behind the last slice: take those before the first
        even = all(b - a == step for a, b in itertools.pairwise(self.starts))
        fits = 0 < before + self.length <= step and before <= start
        return (start - before, step, before) if even and fits else None

    def of(self, x: Tensor) -> Tensor:
        """[count, length, ...] of x [total, ...]."""
        shape = (self.count, self.length, *x.shape[1:])
        if self._view is None:
            return x.index_select(0, self._rows(x.device)).view(shape)
        return self._window(x, *self._view)

    def add_to(self, x: Tensor, values: Tensor) -> None:
        """x += values where `of` reads them."""
        if self._view is None:
            x.index_add_(0, self._rows(x.device), values.flatten(0, 1))
        else:
            self._window(x, *self._view).add_(values)

    def _rows(self, device: torch.device) -> Tensor:
        if device not in self._indices:
            with torch.inference_mode(False):  # kept for passes with gradient
                rows = torch.tensor(self.starts)[:, None] + torch.arange(self.length)
                self._indices[device] = to_device(rows.flatten(), device)
        return self._indices[device]

    def _window(self, x: Tensor, first: int, step: int, before: int) -> Tensor:
        rows = x[first : first + self.count * step].view(self.count, step, *x.shape[1:])
        return rows[:, before : before + self.length]


def parts(x: Tensor, slices: Sequence[Slices]) -> Sequence[Tensor]:
    """Each of the slices of x."""
    if len(slices) <= 2 or not x.requires_grad:
        return [part.of(x) for part in slices]
    return _Parts.apply(x, slices)


class _Parts(torch.autograd.Function):
    """One gradient for all slices. Each of torch's own would be of the size of x: cost by slices times tokens."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slices: Sequence[Slices]) -> tuple[Tensor, ...]:
        ctx.shape, ctx.slices = x.shape, slices
        return tuple(part.of(x) for part in slices)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].new_zeros(ctx.shape)
        for part, gradient in zip(ctx.slices, gradients, strict=True):
            part.add_to(total, gradient)
        return total, None
