"""Tokens by which a chat model tells thoughts and calls of tools from what it says: Gemma 4's, looked up by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto


class Kind(Enum):
    """What a part of an answer is."""

    SAID = auto()
    THOUGHT = auto()
    CALL = auto()


@dataclass(frozen=True)
class Markers:
    """Token ids; None where a vocabulary has no such token.

    A thought is `<|channel>thought\\n...\\n<channel|>`. A call is `<|tool_call>call:name{key:value}<tool_call|>`, in
    which `<|"|>` stands on both sides of a text.
    """

    thought: int | None = None
    thought_end: int | None = None
    call: int | None = None
    call_end: int | None = None
    quote: int | None = None

    @classmethod
    def of(cls, id_of: Callable[[str], int | None]) -> Markers:
        """`id_of` gives the id of a token, or None."""
        names = ("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", '<|"|>')
        return cls(*map(id_of, names))

    def are_boundaries(self, id: int) -> bool:
        """Whether parts begin or end at this token."""
        return id in (self.thought, self.thought_end, self.call, self.call_end)

    def after(self, id: int, within: Kind) -> Kind | None:
        """The kind of part that begins at a token in a part of another; None where none does.

        A thought or a call that does not end ends where the next one begins. An end of what was not begun is nothing.
        """
        if id == self.thought:
            return Kind.THOUGHT
        if id == self.call:
            return Kind.CALL
        end = {Kind.THOUGHT: self.thought_end, Kind.CALL: self.call_end, Kind.SAID: None}[within]
        return Kind.SAID if id == end and end is not None else None

    def said(self, ids: Sequence[int]) -> list[list[int]]:
        """The tokens of an answer that are neither thoughts nor calls, in as many runs as there are between those."""
        runs: list[list[int]] = [[]]
        kind = Kind.SAID
        for id in ids:
            if (next_kind := self.after(id, kind)) is not None:
                kind = next_kind
                runs.append([])
            elif kind is Kind.SAID and not self.are_boundaries(id):
                runs[-1].append(id)
        return runs
