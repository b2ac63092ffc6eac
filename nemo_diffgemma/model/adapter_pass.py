"""What adapters know of the tokens of a pass: which are canvas tokens, and whose adapter each of them has.

A network that serves has several adapters of everything, by key. A pass uses those that its sequences ask for, each on
the rows of its own sequences; where nobody asks it has no `AdapterPass` at all, and nothing is computed for adapters.

Shapes: T tokens of a stream, R rows of this rank's experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from nemo_diffgemma.model.segments import Stream
from nemo_diffgemma.transfer import to_device


class AdapterRows(NamedTuple):
    """Where an adapter applies: indices of its tokens among all, and among this rank's; None is everywhere.

    `number` tells its tokens in `AdapterPass.number_T1`.
    """

    number: int
    all: Tensor | None = None
    mine: Tensor | None = None


@dataclass(frozen=True)
class RowKinds:
    """What adapters of experts know of rows, or of tokens: [R, 1] each, or what holds for all.

    `numbers` are those of the adapters by key, `number` that of each row; None: every adapter is every row's.
    """

    is_canvas: Tensor | bool = False
    number: Tensor | None = None
    numbers: Mapping[str, int] | None = None

    def each(self, function: Callable[[Tensor], Tensor]) -> RowKinds:
        """The same of other rows: what `function` makes of [R, 1]."""
        is_canvas = function(self.is_canvas) if isinstance(self.is_canvas, Tensor) else self.is_canvas
        return replace(self, is_canvas=is_canvas, number=None if self.number is None else function(self.number))

    def rows_of(self, key: str) -> Tensor | None:
        """Which rows are an adapter's, [R, 1] bool; None: all."""
        return None if self.number is None or self.numbers is None else self.number == self.numbers[key]


EVERY_ROW = RowKinds()


@dataclass(frozen=True)
class AdapterPass:
    """The tokens of a pass, and keys of dropout's noise.

    `is_canvas` is [T, 1] of all tokens, or one bool; `noise_T` int64, None without dropout. `first` and `mine` say
    which part of them are this rank's. `chosen` are the adapters in use by key, None: all there are, everywhere;
    `number_T1` which of them each token has.
    """

    is_canvas: Tensor | bool
    noise_T: Tensor | None
    first: int
    mine: int
    chosen: Mapping[str, AdapterRows] | None = None
    number_T1: Tensor | None = None

    @staticmethod
    def of(stream: Stream, noise_T: Tensor | None, group: ProcessGroup, device: torch.device) -> AdapterPass:
        """Of the tokens of a stream, which the ranks of a tensor-parallel group share; noise may be on the host."""
        is_canvas: Tensor | bool = bool(stream.canvases)
        if stream.canvases and stream.contexts:
            is_canvas = stream.canvas_mask(device)[:, None]
        mine = stream.tokens // group.size()
        return AdapterPass(
            is_canvas, None if noise_T is None else to_device(noise_T, device), mine * group.rank(), mine
        )

    def canvas_of(self, x: Tensor) -> Tensor | bool:
        """Which rows of `x`, all tokens or this rank's, are canvas tokens."""
        return self.is_canvas if isinstance(self.is_canvas, bool) else self._of(self.is_canvas, x)

    def noise_of(self, x: Tensor) -> Tensor | None:
        """Keys of the rows of `x`."""
        return None if self.noise_T is None else self._of(self.noise_T, x)

    def rows_of(self, key: str, x: Tensor) -> Tensor | None:
        """Indices of the rows of `x`, all tokens or this rank's, that are an adapter's; None: all."""
        if self.chosen is None:
            return None
        rows = self.chosen[key]
        return rows.mine if x.shape[0] == self.mine else rows.all

    def kinds_of(self, x: Tensor, with_canvas: bool) -> RowKinds:
        """Of the rows of `x`, all tokens or this rank's; canvas tokens where asked for."""
        number = None if self.number_T1 is None else self._of(self.number_T1, x)
        numbers = None if self.chosen is None else {key: rows.number for key, rows in self.chosen.items()}
        return RowKinds(self.canvas_of(x) if with_canvas else False, number, numbers)

    def _of(self, values_T: Tensor, x: Tensor) -> Tensor:
        return values_T if x.shape[0] == values_T.shape[0] else values_T[self.first : self.first + self.mine]

    def with_chosen(self, keys: Sequence[str | None], stream: Stream, device: torch.device) -> AdapterPass:
        """The same, with the adapter of each sequence of the stream; None is none. One transfer."""
        numbers = {key: index + 1 for index, key in enumerate(sorted({key for key in keys if key is not None}))}
        of_segments = [numbers.get(keys[segment.sequence] or "", 0) for segment in stream.segments]
        if len(numbers) == 1 and 0 not in of_segments:
            return replace(self, chosen={key: AdapterRows(number) for key, number in numbers.items()})
        lengths = torch.tensor([*(segment.length for segment in stream.segments), stream.padding])
        number_T = torch.tensor([*of_segments, 0]).repeat_interleave(lengths)
        parts = [number_T]
        for number in numbers.values():
            rows = (number_T == number).nonzero()[:, 0]
            parts += [rows, rows[(rows >= self.first) & (rows < self.first + self.mine)] - self.first]
        number_T, *rows = to_device(torch.cat(parts), device).split([len(part) for part in parts])
        chosen = {key: AdapterRows(n, rows[2 * n - 2], rows[2 * n - 1]) for key, n in numbers.items()}
        return replace(self, chosen=chosen, number_T1=number_T[:, None])
