"""Tools that a chat offers, and which of them its answer may or must call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from nemo_diffgemma.serving.api.body import Body
from nemo_diffgemma.serving.constraints import Language, tool_calls
from nemo_diffgemma.serving.failures import InvalidRequest

_ANYTHING = {"type": "object"}


class Function(Body):
    """What a tool is called, what it does, and a JSON schema of its arguments."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:/-]{1,64}$")]
    description: str = ""
    parameters: dict[str, Any] = Field(default={}, description="A schema of type object; none: no arguments.")
    strict: bool = Field(default=False, description="Arguments fit the schema in every call, not only in forced ones.")


class Tool(Body):
    """A tool that an answer may call."""

    type: Literal["function"]
    function: Function

    def for_template(self, parameters: dict[str, Any] | None = None) -> dict[str, Any]:
        """As chat templates and languages know it, with other parameters where they are given."""
        function = self.function.model_dump(exclude={"strict"})
        return {"type": "function", "function": function | ({"parameters": parameters} if parameters else {})}


class FunctionName(Body):
    name: str


class NamedChoice(Body):
    """The answer must call this tool."""

    type: Literal["function"]
    function: FunctionName


ToolChoice = Literal["none", "auto", "required"] | NamedChoice


@dataclass(frozen=True)
class Offer:
    """`tools` that an answer may call; one of them it must call where `is_forced`, several of them with `parallel`."""

    tools: tuple[Tool, ...] = ()
    is_forced: bool = False
    parallel: bool = True

    @classmethod
    def of(cls, tools: Sequence[Tool], choice: ToolChoice | None, parallel: bool) -> Offer:
        """Raises `InvalidRequest`."""
        names: dict[str, None] = {}
        for index, tool in enumerate(tools):
            name = tool.function.name
            if name in names:
                raise InvalidRequest(f"there are two tools {name!r}", "invalid_value", f"tools.{index}.function.name")
            names[name] = None
        if choice == "none":
            return cls()
        if isinstance(choice, NamedChoice):
            if choice.function.name not in names:
                what = f"tool_choice names {choice.function.name!r}; tools are {', '.join(names) or 'none'}"
                raise InvalidRequest(what, "invalid_value", "tool_choice")
            chosen = [tool for tool in tools if tool.function.name == choice.function.name]
            return cls(tuple(chosen), is_forced=True, parallel=parallel)
        if choice == "required" and not tools:
            raise InvalidRequest("tool_choice is 'required', and there are no tools", "invalid_value", "tool_choice")
        return cls(tuple(tools), choice == "required", parallel)

    @property
    def most_calls(self) -> int | None:
        """That an answer may have; None: any number."""
        return 0 if not self.tools else None if self.parallel else 1

    @property
    def may_hold(self) -> bool:
        """Whether it has a language."""
        return self.is_forced or any(tool.function.strict for tool in self.tools)

    @property
    def language(self) -> Language | None:
        """What an answer must be: calls, or anything, in which calls of strict tools fit their schemas.

        Raises `ConstraintError` for a schema that a constraint cannot express.
        """
        if self.is_forced:
            return tool_calls([tool.for_template() for tool in self.tools], self.parallel)
        if any(tool.function.strict for tool in self.tools):
            given = [tool.for_template(None if tool.function.strict else _ANYTHING) for tool in self.tools]
            return tool_calls(given, self.parallel, required=False)
        return None
