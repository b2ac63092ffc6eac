"""Values as Gemma's chat template writes them in a call of a tool, as regular expressions in Rust's dialect.

    call:weather{city:<|"|>Genoa<|"|>,days:3,units:[<|"|>C<|"|>],wind:true}

Texts stand as they are between two tokens `<|"|>`; names stand bare, sorted as Jinja's `dictsort` does it; there is no
white space. Source: `format_argument` of the released template (vllm: examples/tool_chat_template_gemma4.jinja).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from nemo_diffgemma.serving.constraints import characters
from nemo_diffgemma.serving.constraints.errors import ConstraintError
from nemo_diffgemma.serving.constraints.patterns import translated_in_text
from nemo_diffgemma.serving.constraints.token_bytes import marked
from nemo_diffgemma.serving.constraints.values import Values

QUOTE = '<|"|>'
_NAME = re.compile(r"[\w.$/@+-]+(?: [\w.$/@+-]+)*")  # nothing by which a name would end
_ANY_NAME = "[A-Za-z_][A-Za-z0-9_]{0,63}"


class CallValues(Values):
    """The template's own notation."""

    space, quote = "", characters.literal(marked(QUOTE))

    def string(self, shortest: int = 0, longest: int | None = None) -> str:
        many = "*" if longest is None and shortest == 0 else characters.times(shortest, longest)
        return self.quoted(f"{characters.as_regex(characters.ALL)}{many}")

    def matching(self, pattern: str) -> str:
        return self.quoted(f"(?:{translated_in_text(pattern)})")

    def name(self, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise ConstraintError(
                f"a tool has an argument named {name!r}, which the chat template's calls cannot write; expected "
                "letters, digits and . $ / @ + - _"
            )
        return characters.literal(name)

    def any_name(self) -> str:
        return _ANY_NAME

    def text(self, value: str) -> str:
        if not characters.is_text(value):
            raise ConstraintError(f"a tool's argument is {value[:80]!r}; expected text without NUL and U+0001")
        return self.quoted(characters.literal(value))

    def in_order(self, names: Sequence[str]) -> Sequence[str]:
        return sorted(names, key=str.lower)


CALLS = CallValues()
