"""Calls of tools as Gemma's chat template writes them: `call:name{key:value,...}` -> a name, and arguments as JSON.

Values are texts between quote tokens, numbers, true, false, null, lists in [] and objects in {}; keys are bare. What
models write nearly right is read too: JSON's own strings, quoted keys, None, and bare words, which are texts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_NAME = re.compile(r"[\w.:/-]{1,256}")
_NUMBER = re.compile(r"-?(0|[1-9]\d{0,1000})(\.\d+)?([eE][+-]?\d+)?", re.ASCII)
_JSON_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_WORDS = {"true": True, "True": True, "false": False, "False": False, "null": None, "None": None, "none": None}
_DEEPEST = 64  # lists and objects in each other


class MalformedCall(ValueError):
    """This is no call in the template's syntax."""


@dataclass(frozen=True)
class Call:
    """`arguments` is the JSON text of an object."""

    name: str
    arguments: str


def calls_of(pieces: Sequence[str]) -> list[Call]:
    """The calls in what stands between two markers: one as a rule.

    `pieces` is that text, cut at each quote token: every second one is a text that was quoted. Raises `MalformedCall`.
    """
    if len(pieces) % 2 == 0:
        raise MalformedCall("a quoted text does not end")
    reader, calls = _Reader(pieces), []
    while not reader.is_at_end():
        calls.append(reader.call())
    if not calls:
        raise MalformedCall("there is nothing between the markers")
    return calls


class _Reader:
    """Reads from left to right; items are characters, and quoted texts as a whole."""

    def __init__(self, pieces: Sequence[str]) -> None:
        self._pieces, self._piece, self._at = pieces, 0, 0  # the piece that is read, and the place in it

    def is_at_end(self) -> bool:
        return self._peek() == "" and self._piece == len(self._pieces) - 1

    def call(self) -> Call:
        self._take("call:")
        name = self._until("{").strip()
        if not _NAME.fullmatch(name):
            raise MalformedCall(f"{name!r} is no name of a tool")
        try:
            arguments = json.dumps(self._object(0), ensure_ascii=False)
            arguments.encode("utf-8")
        except UnicodeEncodeError:
            raise MalformedCall("half of a surrogate pair") from None
        return Call(name, arguments)

    def _object(self, depth: int) -> dict[str, Any]:
        made: dict[str, Any] = {}
        self._take("{")
        if self._taken("}"):
            return made
        while True:
            key = self._text(":")
            self._take(":")
            made[key] = self._value(depth + 1)
            if self._taken("}"):
                return made
            self._take(",")

    def _list(self, depth: int) -> list[Any]:
        made: list[Any] = []
        self._take("[")
        if self._taken("]"):
            return made
        while True:
            made.append(self._value(depth + 1))
            if self._taken("]"):
                return made
            self._take(",")

    def _value(self, depth: int) -> Any:
        if depth > _DEEPEST:
            raise MalformedCall(f"more than {_DEEPEST} lists and objects in each other")
        first = self._peek()
        if first == "{":
            return self._object(depth)
        if first == "[":
            return self._list(depth)
        is_quoted = first in ("", '"')
        text = self._text(",}]")
        if is_quoted:
            return text
        if text in _WORDS:
            return _WORDS[text]
        if _NUMBER.fullmatch(text):
            number = json.loads(text)
            return number if abs(number) != float("inf") else text
        return text

    def _text(self, ends: str) -> str:
        """A text, quoted or up to one of `ends`."""
        first = self._peek()
        if first == "":
            return self._quoted()
        if first != '"':
            text = self._until(ends).strip()
            if not text:
                raise MalformedCall("a key or a value is missing")
            return text
        found = _JSON_STRING.match(self._pieces[self._piece], self._at)
        if found is None:
            raise MalformedCall("a string does not end")
        self._at = found.end()
        try:
            return str(json.loads(found[0], strict=False))
        except ValueError as error:
            raise MalformedCall(f"a string is none of JSON's: {error}") from None

    # -- items -----------------------------------------------------------------------------------------------------

    def _peek(self) -> str:
        """The next character that is no white space; empty before a quoted text, and at the end."""
        text = self._pieces[self._piece]
        while self._at < len(text) and text[self._at].isspace():
            self._at += 1
        return text[self._at : self._at + 1]

    def _quoted(self) -> str:
        if self._piece + 2 >= len(self._pieces):
            raise MalformedCall("it does not end")
        text = self._pieces[self._piece + 1]
        self._piece, self._at = self._piece + 2, 0
        return text

    def _taken(self, character: str) -> bool:
        is_next = self._peek() == character
        self._at += is_next
        return is_next

    def _take(self, text: str) -> None:
        self._peek()
        if not self._pieces[self._piece].startswith(text, self._at):
            raise MalformedCall(f"{text!r} is missing")
        self._at += len(text)

    def _until(self, ends: str) -> str:
        """Characters before one of `ends`; there is one before the next quoted text."""
        text, begin = self._pieces[self._piece], self._at
        while self._at < len(text) and text[self._at] not in ends:
            self._at += 1
        if self._at == len(text):
            raise MalformedCall(f"none of {ends!r} follows")
        return text[begin : self._at]
