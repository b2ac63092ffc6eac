"""The rows of a batch as training reads them: one flat tensor of tokens without padding, and lists of the host.

Shapes: T tokens of all rows, one row behind the other.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nemo_diffgemma.transfer import to_device


@dataclass(frozen=True, eq=False)
class Rows:
    """Clean rows: prompt, response and EOS fill up to whole canvases.

    What decides on shapes (lengths, keys of the noise) stays on the host: nobody waits for a device to learn it.
    """

    tokens_T: Tensor
    prompt_lengths: Sequence[int]
    lengths: Sequence[int]  # whole rows
    samples: Sequence[int]  # keys of the noise

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def offsets(self) -> list[int]:
        """Where each row begins."""
        return list(itertools.accumulate(self.lengths[:-1], initial=0))

    def to(self, device: torch.device | str) -> Rows:
        """The same rows with their tokens on `device`."""
        return replace(self, tokens_T=to_device(self.tokens_T, torch.device(device)))

    def split(self, size: int) -> list[Rows]:
        """`size` rows at a time, in their order."""
        cuts = [slice(start, start + size) for start in range(0, len(self), size)]
        parts = self.tokens_T.split([sum(self.lengths[cut]) for cut in cuts])
        return [
            Rows(tokens, self.prompt_lengths[cut], self.lengths[cut], self.samples[cut])
            for tokens, cut in zip(parts, cuts, strict=True)
        ]

    def prefixes(self, lengths: Sequence[int]) -> Tensor:
        """The first tokens of each row, as many as `lengths` says, one row behind the other."""
        if list(lengths) == list(self.lengths):
            return self.tokens_T
        rows = self.tokens_T.split(list(self.lengths))
        return torch.cat([row[:length] for row, length in zip(rows, lengths, strict=True)])
