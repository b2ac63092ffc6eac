"""Calls of tools in the syntax of Gemma's chat template: the language they are, and whether a text is of it.

    <|tool_call>call:weather{city:<|"|>Genoa<|"|>,days:3}<tool_call|>

One call behind the other; `<|tool_call>`, `<tool_call|>` and `<|"|>` are tokens. See `call_values` for the arguments.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from nemo_diffgemma.serving.constraints import characters, json_schema
from nemo_diffgemma.serving.constraints.call_values import CALLS, QUOTE
from nemo_diffgemma.serving.constraints.errors import ConstraintError
from nemo_diffgemma.serving.constraints.patterns import LONGEST_WRITTEN
from nemo_diffgemma.serving.constraints.token_bytes import MARK, marked

_NAME = re.compile(r"[\w.:/-]{1,256}")
_BEGIN, _END = marked("<|tool_call>"), marked("<tool_call|>")
_CALL = re.compile(f"{re.escape(_BEGIN)}(.*?){re.escape(_END)}", re.DOTALL)
_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True)
class Tools:
    """`parameters` of each tool by its name. Several may be called with `parallel`, none unless `required`."""

    parameters: Mapping[str, Mapping[str, Any]]
    parallel: bool
    required: bool

    @classmethod
    def of(cls, given: Sequence[Mapping[str, Any]], parallel: bool, required: bool) -> Self:
        """From OpenAI's tools. Raises `ConstraintError`."""
        parameters: dict[str, Mapping[str, Any]] = {}
        for tool in given:
            function = tool.get("function") if isinstance(tool, Mapping) else None
            if not isinstance(function, Mapping) or not _NAME.fullmatch(str(function.get("name", ""))):
                raise ConstraintError(
                    f"tool {json.dumps(tool, default=str)[:200]}; expected "
                    '{"type": "function", "function": {"name": ..., "parameters": {...}}}, a name of letters and digits'
                )
            name = str(function["name"])
            if name in parameters:
                raise ConstraintError(f"there are two tools {name!r}; expected one of each name")
            schema = _NO_PARAMETERS if function.get("parameters") is None else function["parameters"]
            if not isinstance(schema, Mapping) or (schema and schema.get("type") != "object"):
                raise ConstraintError(
                    f"tool {name!r} has parameters that are no object; expected a schema of type object"
                )
            parameters[name] = schema or _NO_PARAMETERS
        if not parameters:
            raise ConstraintError("there is no tool to call; give at least one")
        return cls(parameters, parallel, required)

    def as_json(self) -> str:
        return json.dumps(vars(self))

    def expression(self) -> str:
        """The regular expression of the calls. Raises `ConstraintError` naming the tool."""
        written: list[str] = []
        for name, schema in self.parameters.items():
            written.append(f"(?:{self._call(name, schema)})")
            if sum(map(len, written)) > LONGEST_WRITTEN:
                raise ConstraintError(f"tool {name!r} and those before it are too much for a constraint; offer fewer")
        calls = "|".join(written)
        one = f"(?:{characters.literal(_BEGIN)}call:(?:{calls}){characters.literal(_END)})"
        many = f"{one}+" if self.parallel else one
        return many if self.required else f"{characters.as_regex(characters.ALL)}*(?:{many})?"

    def _call(self, name: str, schema: Mapping[str, Any]) -> str:
        try:
            return characters.literal(name) + json_schema.translated(schema, CALLS)
        except ConstraintError as error:
            raise ConstraintError(f"tool {name!r}: {error}") from None


def problem_of_calls(text: str, given: Mapping[str, Any]) -> str:
    """What is wrong with a text that should be calls of the tools that `Tools.as_json` has written, or nothing."""
    tools = Tools(**given)
    said, begin, rest = text.partition(_BEGIN)
    bodies = _CALL.findall(begin + rest)
    if MARK in said or "".join(f"{_BEGIN}{body}{_END}" for body in bodies) != begin + rest:
        return "there is something between calls of tools, or a call that does not end"
    if tools.required and (said or not bodies):
        return "there is no call of a tool, or text before it"
    if len(bodies) > 1 and not tools.parallel:
        return f"there are {len(bodies)} calls of tools, one is allowed"
    return next(filter(None, (_problem_of_call(body, tools) for body in bodies)), "")


def _problem_of_call(body: str, tools: Tools) -> str:
    from nemo_diffgemma.serving.tool_syntax import MalformedCall, calls_of

    try:
        (call,) = calls_of(body.split(marked(QUOTE)))
    except (MalformedCall, ValueError) as error:
        return f"a call is not in the template's syntax ({error})"
    if call.name not in tools.parameters:
        return f"there is no tool {call.name!r}"
    return json_schema.problem_of(json.loads(call.arguments), tools.parameters[call.name])
