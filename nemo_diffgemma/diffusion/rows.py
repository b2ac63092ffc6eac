"""The rows of a batch as training reads them: one flat tensor of tokens without padding, and lists of the host.

    <bos> question | answer <end> | question | answer <end>        a row; spans of answers are (start, end) in it

Each answer is cut into canvases of its own. A canvas is to become the answer and, behind its end, `fill_id`: what
generation sees there. The context of a canvas is the tokens before its start; it goes on with the next turn.

Shapes: T tokens of all rows, one row behind the other.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nemo_diffgemma.errors import UserError
from nemo_diffgemma.transfer import to_device


@dataclass(frozen=True, eq=False)
class Rows:
    """Clean rows and where their answers are.

    What decides on shapes (lengths, keys of the noise) stays on the host: nobody waits for a device to learn it.
    """

    tokens_T: Tensor
    answers: Sequence[Sequence[tuple[int, int]]]  # of each row: (start, end) in the row, in order
    lengths: Sequence[int]  # whole rows
    samples: Sequence[int]  # keys of the noise
    fill_id: int  # behind the end of an answer in its last canvas
    passes: Sequence[int] = ()  # rows of each pass, where the batch is packed

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def offsets(self) -> list[int]:
        """Where each row begins."""
        return list(itertools.accumulate(self.lengths[:-1], initial=0))

    def to(self, device: torch.device | str) -> Rows:
        """The same rows with their tokens on `device`."""
        return replace(self, tokens_T=to_device(self.tokens_T, torch.device(device)))

    def split(self, size: int | Sequence[int]) -> list[Rows]:
        """`size` rows at a time, or as many each time as it lists, in their order."""
        sizes = [size] * -(-len(self) // size) if isinstance(size, int) else size
        ends = list(itertools.accumulate(sizes))
        cuts = [slice(end - count, end) for end, count in zip(ends, sizes, strict=True)]
        parts = self.tokens_T.split([sum(self.lengths[cut]) for cut in cuts])
        return [
            Rows(tokens, self.answers[cut], self.lengths[cut], self.samples[cut], self.fill_id)
            for tokens, cut in zip(parts, cuts, strict=True)
        ]

    def prefixes(self, lengths: Sequence[int]) -> Tensor:
        """The first tokens of each row, as many as `lengths` says, one row behind the other."""
        if list(lengths) == list(self.lengths):
            return self.tokens_T
        rows = self.tokens_T.split(list(self.lengths))
        return torch.cat([row[:length] for row, length in zip(rows, lengths, strict=True)])


def check_answers(answers: Sequence[tuple[int, int]], length: int) -> None:
    """Raise `UserError` unless a row of `length` has an answer, and each has context before it and tokens in it."""
    edges = [edge for answer in answers for edge in answer]
    if not edges or edges[0] < 1 or edges[-1] > length or any(start >= end for start, end in answers):
        raise UserError(
            f"a row of {length} tokens has its answers at {list(answers)}; expected at least one, none empty, none at "
            f"position 0 (it needs a token of context, at least <bos>) and none beyond the row"
        )
    if edges != sorted(edges):
        raise UserError(f"answers at {list(answers)}; expected them in order and apart from each other")
