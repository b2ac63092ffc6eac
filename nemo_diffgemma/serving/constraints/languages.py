"""What a text may be required to be: a match of a regex, one of several texts, JSON, JSON of a schema.

A language has an expression, from which its automaton is made, and a check of a finished text that has nothing to do
with that automaton: Python's `re`, or `json` and `jsonschema`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from nemo_diffgemma.serving.constraints import characters, json_schema, patterns
from nemo_diffgemma.serving.constraints.errors import ConstraintError, ConstraintViolation
from nemo_diffgemma.serving.constraints.token_bytes import MARK


@dataclass(frozen=True)
class Language:
    """`source` is the regex, or the choices or the schema as JSON; `expression` is in Rust's dialect."""

    kind: Literal["regex", "choice", "json_schema"]
    source: str
    expression: str

    def check(self, text: str) -> None:
        """Raise `ConstraintViolation` unless `text` is of the language. A regex may take long: see `Compiler.check`.

        Special tokens stand in `text` as `token_bytes.marked` writes them.
        """
        if MARK in text:
            problem = "it has special tokens"
        elif self.kind == "regex":
            problem = "" if re.fullmatch(self.source, text) else "it does not match the regex"
        elif self.kind == "choice":
            problem = "" if text in json.loads(self.source) else "it is none of the choices"
        else:
            problem = _problem_of_json(text, json.loads(self.source))
        if problem:
            raise ConstraintViolation(f"{text!r} is not what its constraint ({self.kind}) allows: {problem}")


def regex(pattern: str) -> Language:
    """Texts that the whole pattern matches, as `re.fullmatch` does; see `patterns` for what is refused."""
    if not isinstance(pattern, str):
        raise ConstraintError(f"regex={pattern!r}; expected text")
    return Language("regex", pattern, patterns.translated(pattern))


def choice(texts: Sequence[str]) -> Language:
    """One of the texts."""
    if isinstance(texts, str) or not texts or not all(isinstance(text, str) for text in texts):
        raise ConstraintError(f"choice={texts!r}; expected a list of texts, at least one")
    unwritable = [text for text in texts if not _is_text(text)]
    if unwritable:
        raise ConstraintError(
            f"choice {unwritable[0]!r} has NUL, U+0001 or half a surrogate pair; expected text without them"
        )
    return Language("choice", json.dumps(list(texts)), "|".join(f"(?:{characters.literal(text)})" for text in texts))


def json_object() -> Language:
    """Any object of JSON, nested to a fixed depth."""
    return json_of_schema({"type": "object"})


def json_of_schema(schema: Mapping[str, Any] | bool) -> Language:
    """JSON that the schema accepts; see `json_schema` for what is refused. Arguments of a tool: its `parameters`."""
    import jsonschema

    expression = json_schema.translated(schema)
    try:
        jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator).check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ConstraintError(f"schema at {error.json_path} is no JSON schema: {error.message[:300]}") from None
    return Language("json_schema", json.dumps(schema), expression)


def _is_text(text: str) -> bool:
    return all(any(low <= ord(c) <= high for low, high in characters.ALL) for c in text)


def _problem_of_json(text: str, schema: Any) -> str:
    import jsonschema

    try:
        value = json.loads(text, parse_constant=_no_constant)
    except ValueError as error:
        return f"it is no JSON ({error})"
    kind = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
    worst = jsonschema.exceptions.best_match(kind(schema, format_checker=kind.FORMAT_CHECKER).iter_errors(value))
    return "" if worst is None else f"{worst.json_path}: {worst.message[:300]}"


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")
