"""The command line before Hydra reads it: texts and paths arrive as they were typed.

    checkpoint=runs/step=100,[a] prompt='"Hi," he said.' cluster.account=012345 cluster.environment.NCCL_DEBUG=off

Hydra's grammar gives `=`, commas, brackets, quotes, backslashes and `${` a meaning. It never sees the values of text
keys (in the schema `str`, `str | None`, and what is in a `dict[str, str]`): it composes with placeholders, which
`Texts.restore` replaces. The word null means null where a key may be it, but not in a prompt. In a list of texts, which
may be without brackets (data.train=[a=1.jsonl,b.jsonl]), commas part the texts; one with quotes in it is Hydra's
grammar. With --multirun a value that holds a comma, or that looks like `choice(...)`, is Hydra's grammar: a sweep.
Values of other keys always are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from nemo_diffgemma.fields import is_text_list, text_kind

_PLACEHOLDER = "NEMO_DIFFGEMMA_TEXT_{}_"
_PLACEHOLDERS = re.compile(_PLACEHOLDER.format(r"(\d+)"))
_OVERRIDE = re.compile(r"(\+{0,2})([\w.@/-]+)=(.*)", re.DOTALL)
_SHOWS_ONLY = {"--help", "-h", "--hydra-help", "--cfg", "-c", "--info", "-i"}  # these print what Hydra has composed


class Texts:
    """Texts of one command line. `arguments` is what Hydra is to read instead."""

    def __init__(self, schema: type, arguments: Sequence[str]) -> None:
        self.values: list[str] = []
        self.sweeps = any(argument in ("-m", "--multirun") for argument in arguments)
        shows_only = any(argument.partition("=")[0] in _SHOWS_ONLY for argument in arguments)
        self.arguments = list(arguments) if shows_only else [self._hide(schema, argument) for argument in arguments]

    def _hide(self, schema: type, argument: str) -> str:
        override = _OVERRIDE.fullmatch(argument)
        if override is None:
            return argument
        adds, key, text = override.groups()
        if is_text_list(schema, key):
            return f"{adds}{key}={self._list(text)}"
        kind = text_kind(schema, key)
        is_null = kind is not None and kind.may_be_null and text == "null"
        is_sweep = self.sweeps and re.search(r",|^(choice|range|interval|glob|shuffle|sort|tag)\(", text)
        if kind is None or is_null or is_sweep:
            return argument
        return f"{adds}{key}={self._placeholder(text)}"

    def _placeholder(self, text: str) -> str:
        self.values.append(text)
        return _PLACEHOLDER.format(len(self.values) - 1)

    def _list(self, text: str) -> str:
        """A list of texts with a placeholder for each; as it is where Hydra must read it."""
        bracketed = text.startswith("[") and text.endswith("]")
        is_sweep = self.sweeps and re.search(r"^(choice|range|interval|glob|shuffle|sort|tag)\(|\],", text)
        parts = text[1:-1].split(",") if bracketed else [text]
        if re.search(r"[\"'\n]", text) or is_sweep or text == "null" or not text.strip("[] "):
            return text
        return f"[{','.join(self._placeholder(part.strip()) for part in parts)}]"

    def restore(self, value: Any) -> Any:
        """`value` (of dicts, lists and scalars) with the texts where their placeholders are."""
        if isinstance(value, str):
            return _PLACEHOLDERS.sub(self._text, value)
        if isinstance(value, dict):
            return {key: self.restore(part) for key, part in value.items()}
        return [self.restore(part) for part in value] if isinstance(value, list) else value

    def _text(self, placeholder: re.Match[str]) -> str:
        index = int(placeholder[1])
        return self.values[index] if index < len(self.values) else placeholder[0]
