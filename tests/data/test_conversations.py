"""Rows of every format are the same conversation; what is no conversation says why."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_diffgemma.data.bad_rows import RowError
from nemo_diffgemma.data.conversations import ROLES, conversation_of

texts = st.text(min_size=1, max_size=20).filter(str.strip).filter(lambda text: text.isprintable())


@st.composite
def messages(draw) -> list[dict]:
    made = [{"role": "system", "content": draw(texts)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        made += [{"role": "user", "content": draw(texts)}, {"role": "assistant", "content": draw(texts)}]
    return made


def in_parts(message: dict) -> dict:
    half = len(message["content"]) // 2
    parts = [{"type": "text", "text": message["content"][:half]}, {"type": "text", "text": message["content"][half:]}]
    return message | {"content": parts}


@given(messages())
def test_every_format_holds_the_same_conversation(made):
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    turns = [{"from": names[m["role"]], "value": m["content"]} for m in made]
    rows = [
        {"messages": made},
        {"messages": [in_parts(message) for message in made], "id": 7},
        {"prompt": made[:-1], "completion": made[-1:]},
        {"conversations": turns},
        {"conversations": made},
    ]
    if made[0]["role"] == "system":
        rows.append({"conversations": turns[1:], "system": made[0]["content"]})
    for row in rows:
        assert conversation_of(row).messages == made
    assert conversation_of(rows[0]).answers == [i for i, m in enumerate(made) if m["role"] == "assistant"]


@given(texts, texts)
def test_a_prompt_and_its_completion_are_a_turn_each(prompt, completion):
    assert conversation_of({"prompt": prompt, "completion": completion}).messages == [
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": completion},
    ]


def test_calls_of_tools_are_the_same_however_they_are_spelled():
    arguments = {"city": "Oslo"}
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    ask = {"role": "user", "content": "?"}
    for given_call in (
        call,
        {"name": "weather", "arguments": arguments},
        {"function": {"name": "weather", "arguments": json.dumps(arguments)}},
    ):
        row = {"messages": [ask, {"role": "assistant", "content": None, "tool_calls": [given_call]}]}
        assert conversation_of(row).messages[1] == {"role": "assistant", "content": "", "tool_calls": [call]}
    turns = [{"from": "human", "value": "?"}, {"from": "function_call", "value": json.dumps(call["function"])}]
    turns.append({"from": "observation", "value": "rain"})
    assert conversation_of({"conversations": turns}).messages[1]["tool_calls"] == [call]
    assert conversation_of({"conversations": turns}).messages[2] == {"role": "tool", "content": "rain"}
    tools = [{"type": "function", "function": {"name": "weather"}}]
    row = {"messages": [ask, {"role": "assistant", "content": "x"}]}
    assert conversation_of(row | {"tools": tools}).tools == conversation_of(row | {"tools": json.dumps(tools)}).tools
    assert conversation_of(row).tools is None and conversation_of(row | {"tools": []}).tools is None


def test_thoughts_and_names_come_along():
    thinks = {"role": "assistant", "content": "12", "reasoning_content": "7 + 5"}
    row = {"messages": [{"role": "user", "content": "?", "name": "Ann"}, thinks]}
    assert conversation_of(row).messages == row["messages"] and conversation_of(row).has_reasoning
    row["messages"][1] = {"role": "assistant", "content": "12", "reasoning": "7 + 5"}
    assert conversation_of(row).messages[1] == thinks


ASK, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (3, "not an object"),
        ({}, "unknown format"),
        ({"text": "a"}, "unknown format"),
        ({"messages": "a"}, "unknown format"),
        ({"messages": []}, "unknown format"),
        ({"messages": ["a"]}, "unknown format"),
        ({"prompt": "a"}, "unknown format"),
        ({"conversations": {}}, "unknown format"),
        ({"messages": [ASK, {"role": "boss", "content": "b"}]}, "unknown role"),
        ({"messages": [ASK, {"role": ["assistant"], "content": "b"}]}, "unknown role"),
        ({"conversations": [{"from": "narrator", "value": "b"}]}, "unknown role"),
        ({"messages": [ASK]}, "no answer"),
        ({"messages": [ASK, ANSWER | {"content": " \n"}]}, "empty answer"),
        ({"messages": [ASK, ANSWER | {"content": None}]}, "empty answer"),
        ({"messages": [ASK, ANSWER | {"content": []}]}, "empty answer"),
        ({"prompt": "a", "completion": ""}, "empty answer"),
        ({"messages": [ASK, ANSWER | {"content": 3}]}, "unknown content"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}, ANSWER]}, "unknown content"),
        ({"messages": [ASK, ANSWER | {"content": "\ud800"}]}, "broken text"),
        ({"messages": [ASK, ANSWER | {"tool_calls": 3}]}, "broken tool call"),
        ({"messages": [ASK, ANSWER | {"tool_calls": [{"id": 1}]}]}, "broken tool call"),
        ({"messages": [ASK, ANSWER | {"tool_calls": [{"name": "f", "arguments": "{"}]}]}, "broken tool call"),
        ({"messages": [ASK, ANSWER | {"tool_calls": [{"name": "f", "arguments": [1]}]}]}, "broken tool call"),
        ({"messages": [ASK, ANSWER], "tools": "{"}, "broken tools"),
        ({"messages": [ASK, ANSWER], "tools": 3}, "broken tools"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_conversation_says_why(row, reason):
    with pytest.raises(RowError) as raised:
        conversation_of(row)
    assert raised.value.reason == reason


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from([*ROLES, "human", "gpt"]),
    lambda part: st.lists(part, max_size=3) | st.dictionaries(
        st.sampled_from(["messages", "role", "content", "from", "value", "prompt", "completion", "conversations",
                         "tool_calls", "function", "name", "arguments", "tools", "text", "type", "system"]),
        part, max_size=4,
    ),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=400)
@given(json_values)
def test_no_row_whatsoever_ends_in_anything_but_a_reason(row):
    try:
        assert conversation_of(row).answers
    except RowError as error:
        assert error.reason
