"""Lists, objects and values of which nothing is known, as regular expressions, in a notation that a subclass gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache
from typing import Any

from nemo_diffgemma.serving.constraints import characters, numbers

DEPTH = 3  # of arrays and objects in a value of which nothing is known


class Values(ABC):
    """How values are written. `space` may stand between the parts of a value, `quote` around a text."""

    space, quote = "", ""

    @abstractmethod
    def string(self, shortest: int = 0, longest: int | None = None) -> str:
        """Texts by their number of characters."""

    @abstractmethod
    def matching(self, pattern: str) -> str:
        """Texts in which `re.search(pattern, text)` finds something."""

    @abstractmethod
    def name(self, name: str) -> str:
        """The name of a member. Raises `ConstraintError` where it cannot be written."""

    @abstractmethod
    def any_name(self) -> str:
        """Names of members of which nothing is known."""

    @abstractmethod
    def text(self, value: str) -> str:
        """One text."""

    def quoted(self, expression: str) -> str:
        """Texts whose characters need no escape."""
        return f"{self.quote}{expression}{self.quote}"

    @property
    def comma(self) -> str:
        return f"{self.space},{self.space}"

    def bracketed(self, opening: str, content: str, closing: str) -> str:
        return f"(?:{opening}{self.space}{content}{self.space}{closing})"

    def array(self, item: str, fewest: int = 0, most: int | None = None) -> str:
        """From `fewest` to `most` items; `most`, where given, is 1 or more."""
        return self.bracketed(r"\[", self._separated(f"(?:{item})", fewest, most), r"\]")

    def member(self, name: str, value: str) -> str:
        """A member of an object; `name` is an expression."""
        return f"(?:{name}{self.space}:{self.space}(?:{value}))"

    def object_of(self, value: str, fewest: int = 0, most: int | None = None) -> str:
        """Members of any names."""
        return self.bracketed(r"\{", self._separated(self.member(self.any_name(), value), fewest, most), r"\}")

    def _separated(self, item: str, fewest: int, most: int | None) -> str:
        # the last item behind the others: a deterministic automaton then has the states of an item once
        others = characters.times(max(0, fewest - 1), None if most is None else most - 1)
        items = f"(?:{item}{self.comma}){others}{item}"
        return items if fewest else f"(?:{items})?"

    def record(self, members: Sequence[tuple[str, bool]]) -> str:
        """Members (as `member` writes them, whether required) in their order; the others may be left out."""

        def behind(index: int) -> str:
            return "".join(f"(?:{self.comma}{text}){'' if required else '?'}" for text, required in members[index:])

        first = next((index for index, (_, required) in enumerate(members) if required), None)
        if first is None:
            choices = [text + behind(index + 1) for index, (text, _) in enumerate(members)]
            return self.bracketed(r"\{", f"(?:{'|'.join(choices)})?" if choices else "", r"\}")
        before = "".join(f"(?:{text}{self.comma})?" for text, _ in members[:first])
        return self.bracketed(r"\{", before + members[first][0] + behind(first + 1), r"\}")

    def in_order(self, names: Sequence[str]) -> Sequence[str]:
        """The order in which members of these names are written."""
        return names

    def exactly(self, value: Any) -> str:
        """One value."""
        if isinstance(value, dict):
            names = self.in_order(list(value))
            return self.record([(self.member(self.name(name), self.exactly(value[name])), True) for name in names])
        if isinstance(value, list):
            return self.bracketed(r"\[", self.comma.join(self.exactly(item) for item in value), r"\]")
        if isinstance(value, str):
            return self.text(value)
        return numbers.literal(value)

    @cache  # noqa: B019  notations are few, and live as long as the process
    def anything(self, depth: int = DEPTH) -> str:
        """Any value, arrays and objects nested `depth` deep."""
        scalar = f"{self.string()}|{numbers.NUMBER}|true|false|null"
        if depth == 0:
            return f"(?:{scalar})"
        inner = self.anything(depth - 1)
        return f"(?:{scalar}|{self.array(inner)}|{self.object_of(inner)})"
