"""Values of JSON as regular expressions in Rust's dialect, with whitespace wherever JSON allows it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from typing import Any

from nemo_diffgemma.serving.constraints import characters, numbers

DEPTH = 3  # of arrays and objects in a value of which nothing is known
SPACE = "[ \\n\\r\\t]*"
COMMA = f"{SPACE},{SPACE}"

_HEX = "[0-9a-fA-F]"
_DIRECT = characters.as_regex(characters.outside(((0x00, 0x1F), (0x22, 0x22), (0x5C, 0x5C))))
_SHORT_ESCAPE = r'\\["\\/bfnrt]'
_CODE_ESCAPE = rf"\\u(?:[0-9abcefABCEF]{_HEX}{{3}}|[dD][0-7]{_HEX}{{2}})"
_PAIR = rf"\\u[dD][89abAB]{_HEX}{{2}}\\u[dD][c-fC-F]{_HEX}{{2}}"  # surrogates, of a character beyond U+FFFF


def string(shortest: int = 0, longest: int | None = None) -> str:
    """Strings by their number of characters; those of a string with bounds are not written as \\uXXXX."""
    if longest is None and shortest == 0:
        return f'"(?:{_DIRECT}|{_SHORT_ESCAPE}|{_CODE_ESCAPE}|{_PAIR})*"'
    return f'"(?:{_DIRECT}|{_SHORT_ESCAPE}){{{shortest},{"" if longest is None else longest}}}"'


def bracketed(opening: str, content: str, closing: str) -> str:
    return f"(?:{opening}{SPACE}{content}{SPACE}{closing})"


def array(item: str, fewest: int = 0, most: int | None = None) -> str:
    """From `fewest` to `most` items; `most`, where given, is 1 or more."""
    return bracketed(r"\[", _separated(f"(?:{item})", fewest, most), r"\]")


def member(name: str, value: str) -> str:
    return f"(?:{name}{SPACE}:{SPACE}(?:{value}))"


def object_of(value: str, fewest: int = 0, most: int | None = None) -> str:
    """Members of any names."""
    return bracketed(r"\{", _separated(member(string(), value), fewest, most), r"\}")


def _separated(item: str, fewest: int, most: int | None) -> str:
    # the last item behind the others: a deterministic automaton then has the states of an item once
    others = f"{{{max(0, fewest - 1)},{'' if most is None else most - 1}}}"
    items = f"(?:{item}{COMMA}){others}{item}"
    return items if fewest else f"(?:{items})?"


def record(members: Sequence[tuple[str, bool]]) -> str:
    """Members (as `member` writes them, whether required) in their order; the others may be left out."""

    def behind(index: int) -> str:
        return "".join(f"(?:{COMMA}{text}){'' if required else '?'}" for text, required in members[index:])

    first = next((index for index, (_, required) in enumerate(members) if required), None)
    if first is None:
        choices = [text + behind(index + 1) for index, (text, _) in enumerate(members)]
        return bracketed(r"\{", f"(?:{'|'.join(choices)})?" if choices else "", r"\}")
    before = "".join(f"(?:{text}{COMMA})?" for text, _ in members[:first])
    return bracketed(r"\{", before + members[first][0] + behind(first + 1), r"\}")


def exactly(value: Any) -> str:
    """One value; characters beyond ASCII stand as they are or escaped, as Python's json writes them."""
    if isinstance(value, dict):
        return record([(member(exactly(name), exactly(item)), True) for name, item in value.items()])
    if isinstance(value, list):
        return bracketed(r"\[", COMMA.join(exactly(item) for item in value), r"\]")
    ways = dict.fromkeys(json.dumps(value, ensure_ascii=ascii) for ascii in (False, True))
    return f"(?:{'|'.join(characters.literal(way) for way in ways)})"


@cache
def anything(depth: int = DEPTH) -> str:
    """Any value of JSON, arrays and objects nested `depth` deep."""
    scalar = f"{string()}|{numbers.NUMBER}|true|false|null"
    if depth == 0:
        return f"(?:{scalar})"
    inner = anything(depth - 1)
    return f"(?:{scalar}|{array(inner)}|{object_of(inner)})"
