"""Messages of a conversation, and what chat templates get of them: calls of tools and their results among them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from nemo_diffgemma.json_files import brief
from nemo_diffgemma.serving.api.body import Body, ListOf
from nemo_diffgemma.serving.failures import InvalidRequest


class TextPart(Body):
    """A part of a message."""

    type: Literal["text"]
    text: str


class CalledFunction(Body):
    """`arguments` is the JSON text of an object."""

    name: str
    arguments: str = ""
    parsed_arguments: Any = Field(default=None, description="What the openai package adds. Not read.")


class CalledTool(Body):
    """A call that an answer has made."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = Field(default=None, description="Of a call in a stream. Not read.")


class Message(Body):
    """A turn of a conversation. Calls are the assistant's, and results of a role of their own, `tool`."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | ListOf[TextPart]
    name: str | None = None
    tool_calls: ListOf[CalledTool] | None = Field(default=None, description="Calls that an answer has made.")
    tool_call_id: str | None = Field(default=None, description="Which call this is the result of.")
    reasoning_content: str | None = Field(default=None, description="What an answer's thoughts were.")
    reasoning: str | None = Field(default=None, description="The same by another name.")
    refusal: str | None = None
    annotations: list[Any] | None = None
    parsed: Any = Field(default=None, description="What the openai package adds. Not read.")

    @model_validator(mode="before")
    @classmethod
    def _answers_may_say_nothing(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("role") == "assistant" and values.get("content") is None:
            return {**values, "content": ""}
        return values

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)

    def for_template(self) -> dict[str, Any]:
        """As chat templates know it."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.text}


def for_template(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """A conversation as chat templates know it. Raises `InvalidRequest` for calls and results that do not fit."""
    made, called = [], set()
    for index, message in enumerate(messages):
        at, turn = f"messages.{index}", message.for_template()
        if message.role == "assistant":
            thought = message.reasoning_content or message.reasoning
            turn |= {"reasoning_content": thought} if thought else {}
            calls = [_call(call, f"{at}.tool_calls.{n}") for n, call in enumerate(message.tool_calls or [])]
            turn |= {"tool_calls": calls} if calls else {}
            called |= {call["id"] for call in calls}
        else:
            _check_is_no_answer(message, at)
        if message.role == "tool":
            if message.tool_call_id not in called:
                what = f"{brief(message.tool_call_id)} is no call of an assistant's message before"
                raise _refusal(f"{at}.tool_call_id", what)
            turn["tool_call_id"] = message.tool_call_id
        elif message.tool_call_id is not None:
            raise _refusal(f"{at}.tool_call_id", f"a message of role {message.role} is no result of a call")
        if message.name is not None:
            turn["name"] = message.name
        made.append(turn)
    return made


def _check_is_no_answer(message: Message, at: str) -> None:
    of_answers = {
        "tool_calls": message.tool_calls,
        "reasoning_content": message.reasoning_content,
        "reasoning": message.reasoning,
    }
    for name, given in of_answers.items():
        if given:
            raise _refusal(f"{at}.{name}", f"a message of role {message.role} has none; expected it of the assistant's")


def _call(call: CalledTool, at: str) -> dict[str, Any]:
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError) as error:
        raise _refusal(f"{at}.function.arguments", f"{brief(call.function.arguments)} is no JSON ({error})") from None
    if not isinstance(arguments, dict):
        raise _refusal(f"{at}.function.arguments", f"{brief(arguments)} is no object of JSON")
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}


def _refusal(parameter: str, what: str) -> InvalidRequest:
    return InvalidRequest(f"{parameter}: {what}", "invalid_value", parameter)
