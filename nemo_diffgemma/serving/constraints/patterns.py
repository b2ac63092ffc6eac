"""Regular expressions as Python writes them -> the Rust dialect of `outlines-core`, with a fixed meaning.

A pattern is parsed by Python's own parser and written again from characters, groups, `|` and `{m,n}` alone. So `\\d`,
`\\w` and `\\s` are ASCII (Rust's take Arabic digits), anchors disappear, lazy repetition is repetition, and whatever is
no regular language is refused by name. What the result matches, Python's `re` matches too.

In a JSON string (`pattern` of a schema) each character stands as JSON escapes it, and the pattern is searched for, as
JSON Schema says: without anchors anything may stand around it.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from re import _constants as op  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any

from nemo_diffgemma.serving.constraints import characters
from nemo_diffgemma.serving.constraints.characters import Ranges
from nemo_diffgemma.serving.constraints.errors import ConstraintError

warnings.filterwarnings("ignore", "Possible (nested set|set [a-z ]*) at position", FutureWarning)  # of a client's regex

LONGEST = 65536  # characters of a pattern
LONGEST_WRITTEN = 2_000_000  # and of what it becomes: a class such as \W is thousands of them

_NAMES = {
    "ASSERT": "look-around (?=...) or (?<=...)",
    "ASSERT_NOT": "negative look-around (?!...) or (?<!...)",
    "GROUPREF": "a back-reference",
    "GROUPREF_EXISTS": "a conditional group (?(1)...)",
    "ATOMIC_GROUP": "an atomic group (?>...)",
    "POSSESSIVE_REPEAT": "possessive repetition",
}
_NARROW = {"DIGIT": characters.DIGITS, "WORD": characters.WORD, "SPACE": characters.SPACE}


def translated(pattern: str) -> str:
    """The language of `re.fullmatch(pattern, text)` in Rust's dialect. Raises `ConstraintError`."""
    return _Writer(pattern, characters.as_regex, around="").written()


def translated_in_text(pattern: str) -> str:
    """The texts in which `re.search(pattern, text)` finds something, as they are."""
    return _Writer(pattern, characters.as_regex, around=f"{characters.as_regex(characters.ALL)}*").written()


def translated_in_json(pattern: str) -> str:
    """The strings in which `re.search(pattern, string)` finds something, as JSON without its quotes."""
    anything = characters.as_json_regex(characters.ALL)
    return _Writer(pattern, characters.as_json_regex, around=f"{anything}*").written()


class _Writer:
    """Writes a parsed pattern; `around` may stand where a pattern has no anchor."""

    def __init__(self, pattern: str, character: Callable[[Ranges], str], around: str) -> None:
        self._pattern, self._write, self._around = pattern, character, around
        self._written = 0

    def written(self) -> str:
        if len(self._pattern) > LONGEST:
            raise ConstraintError(f"a pattern of {len(self._pattern)} characters; expected at most {LONGEST}")
        try:
            tree = _parser.parse(self._pattern)
            if tree.state.flags & ~re.UNICODE.value:
                raise self._refusal("an inline flag such as (?i)")
            return self._whole(list(tree))
        except re.error as error:
            raise ConstraintError(f"pattern {self._shown()} is no regular expression: {error}") from None
        except (RecursionError, OverflowError):
            raise self._refusal("groups within groups by the hundred, or a repetition without measure") from None

    def _shown(self) -> str:
        return repr(self._pattern if len(self._pattern) <= 80 else self._pattern[:77] + "...")

    def _refusal(self, what: str) -> ConstraintError:
        return ConstraintError(
            f"pattern {self._shown()} has {what}; expected characters, sets, groups, | and repetition, with ^ and $ "
            "only at its ends"
        )

    def _whole(self, items: list[Any]) -> str:
        """The whole pattern, or one of its alternatives: anchors may stand at its ends."""
        if len(items) == 1 and items[0][0] is op.BRANCH:
            return "|".join(f"(?:{self._whole(list(branch))})" for branch in items[0][1][1])
        if len(items) == 1 and items[0][0] is op.SUBPATTERN and self._is_plain(items[0][1]):
            return self._whole(list(items[0][1][3]))
        before = after = self._around
        while items and items[0] in ((op.AT, op.AT_BEGINNING), (op.AT, op.AT_BEGINNING_STRING)):
            items, before = items[1:], ""
        while items and items[-1] in ((op.AT, op.AT_END), (op.AT, op.AT_END_STRING)):
            items, after = items[:-1], ""
        if len(items) == 1 and items[0][0] in (op.BRANCH, op.SUBPATTERN) and not (before or after):
            return self._sequence(items)
        return before + self._sequence(items) + after

    def _is_plain(self, group: tuple[Any, ...]) -> bool:
        _, added, removed, _ = group
        return not (added or removed)

    def _character(self, ranges: Ranges) -> str:
        written = self._write(ranges)
        self._written += len(written)
        if self._written > LONGEST_WRITTEN:
            raise ConstraintError(f"pattern {self._shown()} has too many classes of characters; make it shorter")
        return written

    def _sequence(self, items: Any) -> str:
        return "".join(self._item(*item) for item in items)

    def _item(self, kind: Any, value: Any) -> str:
        if kind is op.LITERAL:
            return self._character(characters.intersection(((value, value),), characters.ALL))
        if kind is op.NOT_LITERAL:
            return self._character(characters.outside(((value, value),)))
        if kind is op.ANY:
            return self._character(characters.outside(characters.NEWLINE))
        if kind is op.IN:
            return self._character(_set(value))
        if kind is op.BRANCH:
            return f"(?:{'|'.join(self._sequence(branch) for branch in value[1])})"
        if kind is op.SUBPATTERN and self._is_plain(value):
            return f"(?:{self._sequence(value[3])})"
        if kind in (op.MAX_REPEAT, op.MIN_REPEAT):
            low, high, body = value
            most = None if high is op.MAXREPEAT else high
            return f"(?:{self._sequence(body)}){characters.times(low, most)}"
        if kind is op.AT:
            raise self._refusal(r"an anchor (^, $, \b, \A or \Z) within it")
        raise self._refusal("a group with flags" if kind is op.SUBPATTERN else _NAMES.get(str(kind), str(kind)))


def _set(items: list[Any]) -> Ranges:
    """The characters of [...]. A class is ASCII where it stands, and what Python takes for it where it is negated."""
    negated = items[0][0] is op.NEGATE
    parts: list[Ranges] = []
    names = {str(value).removeprefix("CATEGORY_") for kind, value in items[negated:] if kind is op.CATEGORY}
    if not negated and any(f"NOT_{name}" in names for name in names):
        return characters.ALL  # [\s\S], whatever its two halves are here
    for kind, value in items[negated:]:
        if kind is op.LITERAL:
            parts.append(((value, value),))
        elif kind is op.RANGE:
            parts.append((value,))
        else:
            parts.append(_category(str(value).removeprefix("CATEGORY_"), negated))
    chosen = characters.union(*parts)
    return characters.outside(chosen) if negated else characters.intersection(chosen, characters.ALL)


def _category(name: str, negated: bool) -> Ranges:
    complement, kind = name.startswith("NOT_"), name.removeprefix("NOT_")
    chosen = characters.unicode_class(kind.lower()) if complement != negated else _NARROW[kind]
    return characters.outside(chosen) if complement else chosen
