"""A row of chat data as a conversation, in any of the formats that people have.

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}], "tools": [...]}
    {"prompt": "...", "completion": "..."}                   # texts, or lists of messages
    {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}], "system": "..."}

Messages have the roles system, user, assistant and tool; content is text or a list of text parts; an assistant may have
`tool_calls` (their arguments as an object or as JSON text) and `reasoning_content`. What is wrong raises `RowError`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemo_diffgemma.data.bad_rows import RowError
from nemo_diffgemma.json_files import brief

ROLES = ("system", "user", "assistant", "tool")
_SHAREGPT = {
    **{"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"},
    **{"model": "assistant", "chatgpt": "assistant", "tool": "tool", "observation": "tool"},
    **{"function_response": "tool", "function_call": "assistant"},
}
_CARRIED = ("name", "tool_call_id")  # what a template may want to know of a message besides


@dataclass(frozen=True)
class Conversation:
    """Messages as chat templates take them, contents as text, and the tools that were offered."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None

    @property
    def answers(self) -> list[int]:
        """Which messages are the assistant's."""
        return [index for index, message in enumerate(self.messages) if message["role"] == "assistant"]

    @property
    def has_reasoning(self) -> bool:
        return any("reasoning_content" in message for message in self.messages)


def conversation_of(row: Any) -> Conversation:
    """The conversation in a row."""
    if not isinstance(row, Mapping):
        raise RowError("not an object", brief(row))
    if row.get("messages") is not None:
        messages = _messages(row["messages"], "messages")
    elif row.get("conversations") is not None:
        messages = _sharegpt(row)
    elif row.get("prompt") is not None and row.get("completion") is not None:
        messages = _side(row["prompt"], "prompt", "user") + _side(row["completion"], "completion", "assistant")
    else:
        raise RowError("unknown format", f"it has {', '.join(map(str, row)) or 'no keys'}; expected messages, prompt "
                       "and completion, or conversations")  # fmt: skip
    if all(message["role"] != "assistant" for message in messages):
        raise RowError("no answer", "no message is the assistant's")
    return Conversation(messages, _tools(row.get("tools")))


def _side(value: Any, name: str, role: str) -> list[dict[str, Any]]:
    return _messages([{"role": role, "content": value}] if isinstance(value, str) else value, name)


def _messages(value: Any, name: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise RowError("unknown format", f"{name} is {brief(value)}; expected a list of messages")
    return [_message(message) for message in value]


def _message(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping) or "role" not in value:
        raise RowError("unknown format", f"the message {brief(value)} has no role")
    role = value["role"]
    if role not in ROLES:
        raise RowError("unknown role", f"{brief(role)}; use one of {', '.join(ROLES)}")
    message = {"role": role, "content": _text(value.get("content"))}
    message |= {key: value[key] for key in _CARRIED if value.get(key) is not None}
    if role == "assistant":
        message |= _of_assistant(value, message["content"])
    return message


def _of_assistant(value: Mapping[str, Any], content: str) -> dict[str, Any]:
    """What an assistant's message has besides its content."""
    more: dict[str, Any] = {}
    reasoning = value.get("reasoning_content", value.get("reasoning"))
    if reasoning:
        more["reasoning_content"] = _text(reasoning)
    if value.get("tool_calls"):
        if not isinstance(value["tool_calls"], list):
            raise RowError("broken tool call", f"tool_calls is {brief(value['tool_calls'])}; expected a list")
        more["tool_calls"] = [_tool_call(call) for call in value["tool_calls"]]
    if not content.strip() and "tool_calls" not in more:
        raise RowError("empty answer")
    return more


def _text(content: Any) -> str:
    """Content as text, that of its parts put together."""
    if content is None:
        return ""
    if isinstance(content, str):
        return _unicode(content)
    if not isinstance(content, list):
        raise RowError("unknown content", f"{brief(content)}; expected text or a list of parts")
    texts = []
    for part in content:
        if isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
            texts.append(_unicode(part["text"]))
        elif isinstance(part, str):
            texts.append(_unicode(part))
        else:
            raise RowError("unknown content", f"the part {brief(part)} is no text; images and sounds are not read")
    return "".join(texts)


def _unicode(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON may hold half of a surrogate pair
        raise RowError("broken text", str(error)) from None
    return text


def _tool_call(call: Any) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RowError("broken tool call", f"{brief(call)}; expected a function with a name and arguments")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            raise RowError("broken tool call", f"the arguments of {function['name']} are no JSON ({error})") from None
    if not isinstance(arguments, Mapping | None):
        raise RowError("broken tool call", f"the arguments of {function['name']} are {brief(arguments)}, no object")
    made: dict[str, Any] = {"type": "function", "function": {"name": function["name"], "arguments": arguments or {}}}
    if call.get("id") is not None:
        made["id"] = call["id"]
    return made


def _tools(value: Any) -> list[dict[str, Any]] | None:
    """The tools offered, as objects, or as the JSON text that tables hold."""
    try:
        value = json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise RowError("broken tools", f"no JSON ({error})") from None
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise RowError("broken tools", f"{brief(value)}; expected a list of objects")
    return [dict(tool) for tool in value]


def _sharegpt(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    turns = row["conversations"]
    if not isinstance(turns, list) or not turns:
        raise RowError("unknown format", f"conversations is {brief(turns)}; expected a list of turns")
    messages = [_turn(turn) for turn in turns]
    if row.get("system"):
        messages.insert(0, {"role": "system", "content": _text(row["system"])})
    return messages


def _turn(turn: Any) -> dict[str, Any]:
    if not isinstance(turn, Mapping) or "from" not in turn:
        return _message(turn)  # many files of this name hold messages
    speaker = turn["from"]
    if not isinstance(speaker, str) or speaker not in _SHAREGPT:
        raise RowError("unknown role", f"{brief(speaker)}; use one of {', '.join(_SHAREGPT)}")
    message: dict[str, Any] = {"role": _SHAREGPT[speaker], "content": turn.get("value")}
    if speaker == "function_call":
        try:
            calls = json.loads(message["content"])
        except (ValueError, TypeError) as error:
            raise RowError("broken tool call", f"no JSON ({error})") from None
        message |= {"content": "", "tool_calls": calls if isinstance(calls, list) else [calls]}
    return _message(message)
