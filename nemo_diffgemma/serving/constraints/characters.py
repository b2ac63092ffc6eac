"""Sets of characters as ranges of code points, and as pieces of a regular expression.

Text never has NUL (the automaton's own mark, see byte_automaton.py), U+0001 (which marks special tokens, see
token_bytes.py) or surrogates (they are no characters).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from itertools import pairwise

from nemo_diffgemma.serving.constraints.errors import ConstraintError

Ranges = tuple[tuple[int, int], ...]  # sorted, apart from each other, both ends included

ALL: Ranges = ((0x02, 0xD7FF), (0xE000, 0x10FFFF))
DIGITS: Ranges = ((0x30, 0x39),)
WORD: Ranges = ((0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A))
SPACE: Ranges = ((0x09, 0x0D), (0x20, 0x20))
NEWLINE: Ranges = ((0x0A, 0x0A),)


def union(*sets: Iterable[tuple[int, int]]) -> Ranges:
    """All characters of the sets."""
    joined: list[tuple[int, int]] = []
    for low, high in sorted(part for ranges in sets for part in ranges):
        if joined and low <= joined[-1][1] + 1:
            joined[-1] = (joined[-1][0], max(joined[-1][1], high))
        else:
            joined.append((low, high))
    return tuple(joined)


def outside(ranges: Ranges) -> Ranges:
    """All characters but these."""
    edges = [(0, 0), *ranges, (0x110000, 0x110000)]
    gaps = union((a + 1, b - 1) for (_, a), (b, _) in pairwise(edges) if a + 1 <= b - 1)
    return intersection(gaps, ALL)


def intersection(one: Ranges, other: Ranges) -> Ranges:
    """The characters of both sets."""
    both = ((max(a, c), min(b, d)) for a, b in one for c, d in other)
    return tuple(sorted(part for part in both if part[0] <= part[1]))


def is_text(text: str) -> bool:
    """Whether all characters are of those that text may have."""
    return all(any(low <= ord(c) <= high for low, high in ALL) for c in text)


def members(ranges: Ranges) -> Iterable[int]:
    """The code points one by one."""
    return (point for low, high in ranges for point in range(low, high + 1))


@cache
def unicode_class(name: str) -> Ranges:
    """What Python's `re` means by `digit`, `word` or `space`; it takes more than ASCII."""
    test = {"digit": str.isdecimal, "word": lambda c: c.isalnum() or c == "_", "space": str.isspace}[name]
    return union((point, point) for point in members(ALL) if test(chr(point)))


def as_regex(ranges: Ranges) -> str:
    """A piece of Rust regex that matches one character of the set. Raises `ConstraintError` for an empty set."""
    if not ranges:
        raise ConstraintError("the pattern asks for a character of an empty set; expected sets that text can have")
    if ranges[0][0] == ranges[-1][1]:
        return literal(chr(ranges[0][0]))
    parts = (rf"\x{{{low:X}}}" + (rf"-\x{{{high:X}}}" if high > low else "") for low, high in ranges)
    return f"[{''.join(parts)}]"


def times(fewest: int, most: int | None) -> str:
    """What stands behind a piece of regex that is repeated; None is no bound."""
    return f"{{{fewest},{'' if most is None else most}}}"


def literal(text: str) -> str:
    """A piece of Rust regex that matches the text itself."""
    return "".join(c if c.isascii() and (c.isalnum() or c in " \"_,:;=<>!%@`'") else rf"\x{{{ord(c):X}}}" for c in text)


# -- inside a JSON string --------------------------------------------------------------------------------------------

_ESCAPED = {0x22: r'"', 0x5C: r"\\", 0x08: "b", 0x0C: "f", 0x0A: "n", 0x0D: "r", 0x09: "t"}
DIRECT = outside(((0x00, 0x1F), (0x22, 0x22), (0x5C, 0x5C)))


def as_json_regex(ranges: Ranges) -> str:
    """A character of the set as it stands in a JSON string: itself, or its escape where JSON demands one."""
    direct = intersection(ranges, DIRECT)
    parts = [as_regex(direct)] if direct else []
    for point in members(intersection(ranges, outside(DIRECT))):
        parts.append(rf"\\{_ESCAPED[point]}" if point in _ESCAPED else rf"\\u{point:04x}")
    if not parts:
        return as_regex(())
    return parts[0] if len(parts) == 1 else f"(?:{'|'.join(parts)})"
