"""The key/value cache: keys and values that each sequence's context leaves in each layer for later passes.

Global layers keep every position, sliding layers the last `window - 1`: all that a later canvas can see, and with the
token itself all that a later context token can see. Nothing is written in place: a cache stays valid whatever is
made of it, and may be continued more than once. With gradient enabled it carries gradient.

A server adds a sequence with `add`, lets any of them take part in a pass, and drops those that are done with `select`.

Shapes: K kept positions of all sequences, one sequence after the other, G key/value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nemo_diffgemma.config import SLIDING, ModelConfig
from nemo_diffgemma.model.segments import Span, Stream


class KeyValue(NamedTuple):
    """Keys (normed, rotated) and values of one layer, [K, G, D]; `kept` are the positions of each sequence."""

    keys: Tensor
    values: Tensor
    kept: tuple[Span, ...]

    def of(self, sequence: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one sequence."""
        begin = sum(span.length for span in self.kept[:sequence])
        rows = slice(begin, begin + self.kept[sequence].length)
        return self.keys[rows], self.values[rows]

    def select(self, sequences: Sequence[int]) -> KeyValue:
        """The cache of the given sequences, in that order."""
        lengths = [span.length for span in self.kept]
        keys, values = (_pick(x.split(lengths), sequences) for x in (self.keys, self.values))
        return KeyValue(keys, values, tuple(self.kept[index] for index in sequences))

    def last(self, most: int) -> KeyValue:
        """At most the last `most` positions of each sequence. Copied: a view would keep the whole context alive."""
        lengths = [span.length for span in self.kept]
        if max(lengths, default=0) <= most:
            return self
        kept = tuple(Span(max(first, end - most), end) for first, end in self.kept)
        return KeyValue(_last(self.keys, lengths, most), _last(self.values, lengths, most), kept)


def extended(past: KeyValue | None, keys_TGD: Tensor, values_TGD: Tensor, stream: Stream) -> KeyValue:
    """`past` with the keys and values of a stream's new context."""
    new = {segment.sequence: segment.length for segment in stream.contexts}
    if past is None:
        keys, values = keys_TGD[: stream.context_tokens], values_TGD[: stream.context_tokens]
        return KeyValue(keys, values, stream.sequences_after)
    if not new:
        return past
    old = [span.length for span in past.kept]
    fresh = [new.get(index, 0) for index in range(len(old))]
    keys, values = (
        _interleaved(x, old, y[: stream.context_tokens], fresh)
        for x, y in ((past.keys, keys_TGD), (past.values, values_TGD))
    )
    kept = tuple(Span(first, end + more) for (first, end), more in zip(past.kept, fresh, strict=True))
    return KeyValue(keys, values, kept)


def _interleaved(old: Tensor, old_lengths: list[int], new: Tensor, new_lengths: list[int]) -> Tensor:
    """The old rows of each sequence, and behind them its new ones."""
    count, rest = len(old_lengths), old.shape[1:]
    if len(set(old_lengths)) == len(set(new_lengths)) == 1:
        joined = torch.cat([old.view(count, -1, *rest), new.reshape(count, -1, *rest)], dim=1)
        return joined.flatten(0, 1)
    pairs = zip(old.split(old_lengths), new.split(new_lengths), strict=True)
    return torch.cat([part for pair in pairs for part in pair])


def _last(x: Tensor, lengths: list[int], most: int) -> Tensor:
    if len(set(lengths)) == 1:
        rows = x.view(len(lengths), lengths[0], *x.shape[1:])
        return rows[:, lengths[0] - most :].flatten(0, 1).clone()
    return torch.cat([part[max(0, len(part) - most) :] for part in x.split(lengths)])


def _pick(parts: Sequence[Tensor], indices: Sequence[int]) -> Tensor:
    return torch.cat([parts[index] for index in indices]) if indices else parts[0][:0]


@dataclass(frozen=True)
class Cache:
    """Context of some sequences: `sequences` are their positions so far, `layers` their keys and values.

    `layers` is empty as long as no sequence has any context.
    """

    sequences: tuple[Span, ...]
    layers: tuple[KeyValue, ...] = ()

    @classmethod
    def empty(cls, first_positions: Iterable[int]) -> Cache:
        """Sequences without context, whose first tokens will have these positions."""
        return cls(tuple(Span(first, first) for first in first_positions))

    @property
    def tensors(self) -> list[Tensor]:
        """Keys and values of all layers."""
        return [tensor for layer in self.layers for tensor in (layer.keys, layer.values)]

    def cut_off(self) -> Cache:
        """The same keys and values as leaves: a backward pass ends in their `grad`, and the context's is another."""
        layers = tuple(
            layer._replace(keys=layer.keys.detach().requires_grad_(), values=layer.values.detach().requires_grad_())
            for layer in self.layers
        )
        return Cache(self.sequences, layers)

    def add(self, first_positions: Iterable[int]) -> Cache:
        """With more sequences behind, which have no context yet."""
        new = self.empty(first_positions).sequences
        layers = tuple(layer._replace(kept=layer.kept + new) for layer in self.layers)
        return Cache(self.sequences + new, layers)

    def select(self, sequences: Sequence[int]) -> Cache:
        """Some of the sequences, in that order."""
        layers = tuple(layer.select(sequences) for layer in self.layers)
        return Cache(tuple(self.sequences[index] for index in sequences), layers)

    def trimmed(self, config: ModelConfig) -> Cache:
        """Without what no later token sees."""
        layers = tuple(
            layer.last(config.sliding_window - 1) if config.layer_kind(index) == SLIDING else layer
            for index, layer in enumerate(self.layers)
        )
        return Cache(self.sequences, layers)
