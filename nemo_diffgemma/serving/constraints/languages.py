"""What a text may be required to be: a regex's match, one of several texts, JSON, JSON of a schema, calls of tools.

A language has an expression, from which its automaton is made, and a check of a finished text that has nothing to do
with that automaton: Python's `re`, or `json` and `jsonschema`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NoReturn

from nemo_diffgemma.serving.constraints import characters, json_schema, patterns, tools
from nemo_diffgemma.serving.constraints.errors import ConstraintError, ConstraintViolation
from nemo_diffgemma.serving.constraints.token_bytes import MARK, marked

LONGEST_CHOICES = 200_000  # characters of all texts of a choice
_THOUGHT, _THOUGHT_END = f"{marked('<|channel>')}thought\n", marked("<channel|>")


@dataclass(frozen=True)
class Language:
    """`source` is the regex, or the choices, the schema or the tools as JSON; `expression` is in Rust's dialect.

    With `thought`, a text of the language may have a thought before it, in the channel of Gemma's template.
    """

    kind: Literal["regex", "choice", "json_schema", "tool_calls"]
    source: str
    expression: str
    thought: bool = False

    def check(self, text: str) -> None:
        """Raise `ConstraintViolation` unless `text` is of the language. A regex may take long: see `Compiler.check`.

        Special tokens stand in `text` as `token_bytes.marked` writes them.
        """
        rest = text
        if self.thought and text.startswith(_THOUGHT):
            _, _, rest = text.partition(_THOUGHT_END)
        if self.kind == "tool_calls":
            problem = tools.problem_of_calls(rest, json.loads(self.source))
        elif MARK in rest:
            problem = "it has special tokens"
        elif self.kind == "regex":
            problem = "" if re.fullmatch(self.source, rest) else "it does not match the regex"
        elif self.kind == "choice":
            problem = "" if rest in json.loads(self.source) else "it is none of the choices"
        else:
            problem = _problem_of_json(rest, json.loads(self.source))
        if problem:
            raise ConstraintViolation(f"{text[:200]!r} is not what its constraint ({self.kind}) allows: {problem}")


def regex(pattern: str) -> Language:
    """Texts that the whole pattern matches, as `re.fullmatch` does; see `patterns` for what is refused."""
    if not isinstance(pattern, str):
        raise ConstraintError(f"regex={pattern!r}; expected text")
    return Language("regex", pattern, patterns.translated(pattern))


def choice(texts: Sequence[str]) -> Language:
    """One of the texts."""
    if isinstance(texts, str) or not texts or not all(isinstance(text, str) for text in texts):
        raise ConstraintError(f"choice={texts!r}; expected a list of texts, at least one")
    if sum(map(len, texts)) > LONGEST_CHOICES:
        raise ConstraintError(
            f"choice has {len(texts)} texts of {sum(map(len, texts))} characters; expected at most {LONGEST_CHOICES}"
        )
    unwritable = [text for text in texts if not characters.is_text(text)]
    if unwritable:
        raise ConstraintError(
            f"choice {unwritable[0]!r} has NUL, U+0001 or half a surrogate pair; expected text without them"
        )
    expression = "|".join(f"(?:{characters.literal(text)})" for text in dict.fromkeys(texts))
    return Language("choice", json.dumps(list(texts)), expression)


def json_object() -> Language:
    """Any object of JSON, nested to a fixed depth."""
    return json_of_schema({"type": "object"})


def json_of_schema(schema: Mapping[str, Any] | bool) -> Language:
    """JSON that the schema accepts; see `json_schema` for what is refused. Arguments of a tool: its `parameters`."""
    return Language("json_schema", json.dumps(schema), json_schema.translated(schema))


def tool_calls(tools_given: Sequence[Mapping[str, Any]], parallel: bool, required: bool = True) -> Language:
    """Calls of tools, as Gemma's chat template writes them: one, or with `parallel` one or more.

    `tools_given` are OpenAI's: {"type": "function", "function": {"name": ..., "parameters": a schema}}. Unless
    `required`, there may be text before them, and none of them. Raises `ConstraintError` naming the tool.
    """
    source = tools.Tools.of(tools_given, parallel, required)
    return Language("tool_calls", source.as_json(), source.expression())


def after_thought(language: Language) -> Language:
    """The same texts, or a thought in its channel and then one of them: for a model that may think first."""
    anything = f"{characters.as_regex(characters.ALL)}*"
    thought = f"(?:{characters.literal(_THOUGHT)}{anything}{characters.literal(_THOUGHT_END)})?"
    return replace(language, expression=f"{thought}(?:{language.expression})", thought=True)


def _problem_of_json(text: str, schema: Any) -> str:
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except ValueError as error:
        return f"it is no JSON ({error})"
    return json_schema.problem_of(value, schema)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")
