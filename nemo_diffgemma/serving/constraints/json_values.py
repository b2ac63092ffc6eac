"""Values of JSON as regular expressions in Rust's dialect, with whitespace wherever JSON allows it."""

from __future__ import annotations

import json

from nemo_diffgemma.serving.constraints import characters
from nemo_diffgemma.serving.constraints.patterns import translated_in_json
from nemo_diffgemma.serving.constraints.values import Values

_HEX = "[0-9a-fA-F]"
_DIRECT = characters.as_regex(characters.DIRECT)
_SHORT_ESCAPE = r'\\["\\/bfnrt]'
_CODE_ESCAPE = rf"\\u(?:[0-9abcefABCEF]{_HEX}{{3}}|[dD][0-7]{_HEX}{{2}})"
_PAIR = rf"\\u[dD][89abAB]{_HEX}{{2}}\\u[dD][c-fC-F]{_HEX}{{2}}"  # surrogates, of a character beyond U+FFFF


class JsonValues(Values):
    """RFC 8259."""

    space, quote = "[ \\n\\r\\t]*", '"'

    def string(self, shortest: int = 0, longest: int | None = None) -> str:
        """Strings by their number of characters; those of a string with bounds are not written as \\uXXXX."""
        if longest is None and shortest == 0:
            return self.quoted(f"(?:{_DIRECT}|{_SHORT_ESCAPE}|{_CODE_ESCAPE}|{_PAIR})*")
        return self.quoted(f"(?:{_DIRECT}|{_SHORT_ESCAPE}){characters.times(shortest, longest)}")

    def matching(self, pattern: str) -> str:
        return self.quoted(f"(?:{translated_in_json(pattern)})")

    def name(self, name: str) -> str:
        return self.text(name)

    def any_name(self) -> str:
        return self.string()

    def text(self, value: str) -> str:
        """Characters beyond ASCII stand as they are or escaped, as Python's json writes them."""
        ways = dict.fromkeys(json.dumps(value, ensure_ascii=ascii) for ascii in (False, True))
        return f"(?:{'|'.join(characters.literal(way) for way in ways)})"


JSON = JsonValues()
