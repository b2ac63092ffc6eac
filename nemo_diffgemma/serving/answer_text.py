"""The text of an answer, canvas by canvas: no character is split, and nothing of a stop string is shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_BROKEN = "\ufffd"  # what a character becomes of which bytes are missing


class AnswerText:
    """Collects the tokens of one answer. What `push` has returned so far is the beginning of the final text."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self.tokens: list[int] = []
        self.is_stopped = False  # by a string of `stop`
        self._decode, self._stop, self._shown = decode, stop, 0

    def push(self, tokens: Sequence[int], is_last: bool) -> str:
        """The text that `tokens` add. What may still change is held back until `is_last`."""
        self.tokens += tokens
        text = self._decode(self.tokens)
        ends = [index for string in self._stop if (index := text.find(string)) >= 0]
        if ends:
            text, self.is_stopped = text[: min(ends)], True
        elif not is_last:
            text = text.rstrip(_BROKEN)
            text = text[: len(text) - _beginning_of_any(self._stop, text)]
        new = text[self._shown :]
        self._shown = max(self._shown, len(text))
        return new


def _beginning_of_any(strings: Sequence[str], text: str) -> int:
    """How many characters at the end of `text` may be the beginning of one of `strings`."""
    longest = max(map(len, strings), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(string.startswith(text[-length:]) for string in strings):
            return length
    return 0
