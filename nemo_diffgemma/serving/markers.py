"""Tokens by which a chat model tells thoughts and calls of tools from what it says: Gemma 4's, looked up by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


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
