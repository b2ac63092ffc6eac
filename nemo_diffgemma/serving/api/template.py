"""Text with holes: what stands locked in an answer, and where, for each length that its holes may have."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from nemo_diffgemma.serving.failures import InvalidRequest
from nemo_diffgemma.serving.text import ServedText

MOST_LENGTHS = 8  # of one hole
MOST_COMBINATIONS = 32  # of lengths of all holes: each is an answer of its own
MOST_TOKENS = 2**16  # of all these answers together
_ANCHOR = 4  # tokens before a hole that its text is read behind: some tokenizers drop a space where a text begins


@dataclass(frozen=True)
class Locked:
    """Tokens that stand as they are, and the text that they were given as."""

    ids: tuple[int, ...]
    text: str | None = None


@dataclass(frozen=True)
class Hole:
    """To be filled with `least` to `most` tokens."""

    least: int
    most: int


Part = Locked | Hole


@dataclass(frozen=True)
class Template:
    """Parts in their order; `lengths` are those of its holes."""

    parts: tuple[Part, ...]
    lengths: tuple[int, ...]

    @cached_property
    def spans(self) -> list[tuple[int, int]]:
        """Where the tokens of each part begin and end in the answer."""
        lengths = iter(self.lengths)
        ends = itertools.accumulate(next(lengths) if isinstance(part, Hole) else len(part.ids) for part in self.parts)
        return list(itertools.pairwise([0, *ends]))

    @property
    def length(self) -> int:
        """Tokens of the answer."""
        return self.spans[-1][1]

    @cached_property
    def locked(self) -> dict[int, int]:
        """Positions of the answer -> ids."""
        parts = [(part, begin) for part, (begin, _) in zip(self.parts, self.spans, strict=True)]
        return {
            begin + offset: id
            for part, begin in parts
            if isinstance(part, Locked)
            for offset, id in enumerate(part.ids)
        }

    def canvas_length(self, longest: int) -> int:
        """The answer in as few canvases as it needs, and these as short as they can be."""
        return -(-self.length // -(-self.length // longest))


def of_token_ids(ids: Iterable[int | None]) -> list[Part]:
    """Runs of ids, and of None where there are holes."""
    runs = [list(run) for _, run in itertools.groupby(ids, key=lambda id: id is None)]
    return [Hole(len(run), len(run)) if run[0] is None else Locked(tuple(id for id in run if id is not None))
            for run in runs]  # fmt: skip


def templates(parts: Sequence[Part]) -> list[Template]:
    """Each combination of lengths that is tried, the shortest first. Raises `InvalidRequest`."""
    holes = [part for part in parts if isinstance(part, Hole)]
    if not holes:
        raise InvalidRequest("there is no hole to fill", "invalid_value", "text")
    free = sum(hole.least < hole.most for hole in holes)
    longest = sum(part.most if isinstance(part, Hole) else len(part.ids) for part in parts)
    most = min(MOST_COMBINATIONS, MOST_TOKENS // longest)
    each = next((count for count in range(MOST_LENGTHS, 1, -1) if count**free <= most), 1)
    if free and each == 1:
        what = f"{free} holes of free length in a text of up to {longest} tokens; expected at most"
        raise InvalidRequest(
            f"{what} {max(0, most.bit_length() - 1)} of them, give the others a number", "invalid_value", "text"
        )
    choices = itertools.product(*(_spread(hole, each) for hole in holes))
    return [Template(tuple(parts), lengths) for lengths in choices]


def _spread(hole: Hole, count: int) -> list[int]:
    """At most `count` lengths from the least to the most, both among them."""
    steps = max(1, min(count - 1, hole.most - hole.least))
    return sorted({hole.least + round((hole.most - hole.least) * step / steps) for step in range(steps + 1)})


def written(text: ServedText, template: Template, tokens: Sequence[int]) -> list[str]:
    """The text of each part of an answer: what is locked is as it was given."""
    found = []
    for part, (begin, end) in zip(template.parts, template.spans, strict=True):
        if isinstance(part, Locked) and part.text is not None:
            found.append(part.text)
            continue
        anchor = list(tokens[max(0, begin - _ANCHOR) : begin])
        found.append(text.decode([*anchor, *tokens[begin:end]])[len(text.decode(anchor)) :])
    return found
