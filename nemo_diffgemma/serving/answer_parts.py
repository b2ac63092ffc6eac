"""What a chat model's answer is made of: what it says, what it thinks, and calls of tools. Canvas by canvas.

The parts are told apart by tokens, never by text: a marker is one token, so no canvas can cut it, and a text that
spells a marker is a text. Rules for what models write otherwise than they should:

- A thought that does not end is a thought to its end. A call of a tool ends it, too.
- A call ends at its marker, at the marker of another call, or where the answer ends. One that is not in the template's
  syntax, or that may not be made, is part of what the model says: its text, without markers.
- Markers that end nothing say nothing.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from nemo_diffgemma.serving.answer_text import AnswerText
from nemo_diffgemma.serving.markers import Kind, Markers
from nemo_diffgemma.serving.tool_syntax import MalformedCall, calls_of

_LABEL = "thought\n"  # the name of the channel, in front of a thought


@dataclass(frozen=True)
class Said:
    """More of what the model says."""

    text: str


@dataclass(frozen=True)
class Thought:
    """More of what it thinks."""

    text: str


@dataclass(frozen=True)
class ToolCall:
    """A whole call, number `index` of its answer. `arguments` is a JSON object."""

    index: int
    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")


Part = Said | Thought | ToolCall


class AnswerParts:
    """Collects the tokens of one answer: what `push` returns is the same in the end, however tokens come.

    Strings of `stop` end the answer where they stand in what the model says. `most_calls` may be made; None: any
    number.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        markers: Markers,
        stop: Sequence[str] = (),
        most_calls: int | None = 0,
    ) -> None:
        self.tokens: list[int] = []
        self.thought_tokens = 0
        self.calls = 0
        self._decode, self._markers, self._stop, self._most_calls = decode, markers, stop, most_calls
        self._kind, self._open = Kind.SAID, self._opened(Kind.SAID)
        self._newline = ""  # at the end of the thought before: shown if there is another one
        self._is_stopped = False

    def push(self, tokens: Sequence[int], is_last: bool) -> list[Part]:
        """What `tokens` add. What may still change is held back until `is_last`."""
        self.tokens += tokens
        parts: list[Part] = []
        start = 0
        for place, id in enumerate(tokens):
            if self._markers.are_boundaries(id):
                kind = self._markers.after(id, self._kind)
                parts += self._add(tokens[start:place], ends=kind is not None)
                start = place + 1
                if kind is not None:
                    self._kind, self._open = kind, self._opened(kind)
        parts += self._add(tokens[start:], ends=is_last)
        return _joined(parts)

    def _opened(self, kind: Kind) -> AnswerText | _Thinking | _Calling:
        if kind is Kind.THOUGHT:
            return _Thinking(self._decode, self._newline)
        return _Calling() if kind is Kind.CALL else AnswerText(self._decode, self._stop)

    def _add(self, tokens: Sequence[int], ends: bool) -> list[Part]:
        if self._is_stopped:
            return []
        part = self._open
        if isinstance(part, AnswerText):
            text = part.push(tokens, ends)
            self._is_stopped = part.is_stopped
            return [Said(text)]
        if isinstance(part, _Thinking):
            self.thought_tokens += len(tokens)
            text = part.push(tokens, ends)
            self._newline = part.newline
            return [Thought(text)]
        part.tokens += tokens
        return self._called(part.tokens) if ends else []

    def _called(self, tokens: Sequence[int]) -> list[Part]:
        """What was written between two markers."""
        pieces, start = [], 0
        for place in [*(place for place, id in enumerate(tokens) if id == self._markers.quote), len(tokens)]:
            pieces.append(self._decode(tokens[start:place]))
            start = place + 1
        try:
            calls = calls_of(pieces)
        except MalformedCall:
            calls = []
        if not calls or (self._most_calls is not None and self.calls + len(calls) > self._most_calls):
            return [Said('"'.join(pieces))]
        self.calls += len(calls)
        return [ToolCall(self.calls - len(calls) + n, call.name, call.arguments) for n, call in enumerate(calls)]


# -- a part while it is written ----------------------------------------------------------------------------------------


class _Thinking:
    """A thought, without the channel's name and without the line break that the template has at its end.

    `newline` is one that the thought before ended with, then that of this one.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], newline: str) -> None:
        self.newline = newline
        self._text, self._head = AnswerText(decode), ""
        self._has_head = False

    def push(self, tokens: Sequence[int], is_last: bool) -> str:
        text = self._text.push(tokens, is_last)
        if not self._has_head:
            self._head += text
            if _LABEL.startswith(self._head) and self._head != _LABEL and not is_last:
                return ""
            head, self._has_head = self._head, True
            text = "" if head == _LABEL.strip() else head.removeprefix(_LABEL)
        if not text:
            return ""
        text = self.newline + text
        self.newline = "\n" if text.endswith("\n") else ""
        return text.removesuffix("\n")


class _Calling:
    def __init__(self) -> None:
        self.tokens: list[int] = []


def _joined(parts: Sequence[Part]) -> list[Part]:
    """Neighbours of a kind as one; none is empty."""
    joined: list[Part] = []
    for part in parts:
        last = joined[-1] if joined else None
        if isinstance(part, Said) and isinstance(last, Said):
            joined[-1] = Said(last.text + part.text)
        elif isinstance(part, Thought) and isinstance(last, Thought):
            joined[-1] = Thought(last.text + part.text)
        elif isinstance(part, ToolCall) or part.text:
            joined.append(part)
    return joined
