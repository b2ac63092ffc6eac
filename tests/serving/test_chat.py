"""Chats with tools, thoughts and formats through the openai package: a random model fulfils what it is held to."""

from __future__ import annotations

import enum
import json
import re
from typing import Any

import jsonschema
import openai
import pydantic
import pytest

from nemo_diffgemma.serving.answer_parts import AnswerParts, Said, Thought
from nemo_diffgemma.serving.api.replies import ChatReply
from nemo_diffgemma.serving.text import ServedText, files_of
from nemo_diffgemma.tokenizer import Text
from tests.serving import gemma, served

ASK = [{"role": "user", "content": "Rain?"}]
QUICK = {"diffusion": {"max_denoising_steps": 2, "entropy_bound": 50.0}}
PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "days": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 30}, "maxItems": 3},
        "unit": {"enum": ["C", "F"]},
    },
    "required": ["city", "days", "unit"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {}}}


@pytest.fixture(scope="module")
def server(tmp_path_factory, single):
    checkpoint = served.write_checkpoint(tmp_path_factory.mktemp("served") / "model", gemma.tokenizer())
    made = served.Split(checkpoint, 1, dict(context_gb=0.02, typical_tokens=700, max_running=3, tokens_per_pass=600))
    yield made.ready(1)
    made.close()


@pytest.fixture(scope="module")
def client(server):
    return server.openai()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    directory = tmp_path_factory.mktemp("gemma")
    gemma.tokenizer().save_pretrained(directory)
    return ServedText(files_of(Text(directory)))


def asked(**given: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": ASK, "max_tokens": 160, "seed": 7, "extra_body": QUICK, **given}


def is_call(call: Any) -> bool:
    jsonschema.validate(json.loads(call.function.arguments), PARAMETERS)
    return call.function.name == "weather" and call.id.startswith("call_")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}], ids=str)
def test_a_call_that_is_forced_fits_its_schema_and_its_result_is_taken(client, choice):
    answer = client.chat.completions.create(**asked(tools=[WEATHER], tool_choice=choice, parallel_tool_calls=False))
    ChatReply.model_validate(answer.model_dump(exclude_unset=True), extra="forbid")
    (only,) = answer.choices
    assert only.finish_reason == "tool_calls" and only.message.content is None
    (call,) = only.message.tool_calls
    assert is_call(call)
    result = {"role": "tool", "tool_call_id": call.id, "content": "wet"}
    after = client.chat.completions.create(**asked(messages=[*ASK, only.message, result], tools=[WEATHER]))
    assert after.usage.prompt_tokens > answer.usage.prompt_tokens + len("wet")


def test_a_stream_with_tools_and_drafts_is_the_whole_answer(client):
    given = asked(tools=[WEATHER, CLOCK], tool_choice="required")
    whole = client.chat.completions.create(**given).choices[0]
    drafts, deltas, reasons = 0, [], []
    given["extra_body"] = {**QUICK, "stream_options": {"drafts": True}}
    for chunk in client.chat.completions.create(**given, stream=True):
        drafts += not chunk.choices
        for choice in chunk.choices:
            deltas += choice.delta.tool_calls or []
            reasons += [choice.finish_reason] if choice.finish_reason else []
            assert not choice.delta.content
    assert drafts and reasons == ["tool_calls"]
    assert [delta.index for delta in deltas] == list(range(len(whole.message.tool_calls)))
    assert len({delta.id for delta in deltas}) == len(deltas)
    told = [(delta.function.name, delta.function.arguments) for delta in deltas]
    assert told == [(call.function.name, call.function.arguments) for call in whole.message.tool_calls]


class Unit(enum.Enum):
    C = "C"
    F = "F"


class Report(pydantic.BaseModel):
    days: list[int] = pydantic.Field(max_length=3)
    rain: bool
    unit: Unit


def test_the_parse_helper_gives_a_model_of_pydantics(client):
    answer = client.chat.completions.parse(**asked(response_format=Report))
    assert isinstance(answer.choices[0].message.parsed, Report)
    assert answer.choices[0].finish_reason == "stop"


def test_the_parse_helper_gives_arguments_of_strict_tools(client):
    tool = openai.pydantic_function_tool(Report, name="report")
    answer = client.chat.completions.parse(**asked(tools=[tool], tool_choice="required", parallel_tool_calls=False))
    assert isinstance(answer.choices[0].message.tool_calls[0].function.parsed_arguments, Report)


def test_the_stream_helper_gives_the_same(client):
    with client.chat.completions.stream(**asked(response_format=Report)) as stream:
        streamed = stream.get_final_completion().choices[0].message.parsed
    assert streamed == client.chat.completions.parse(**asked(response_format=Report)).choices[0].message.parsed


@pytest.mark.parametrize("thinks", [False, True])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_format_is_that_of_what_is_said(client, thinks, stream):
    given = asked(response_format={"type": "json_object"}, stream=stream)
    given["extra_body"] = {**QUICK, "chat_template_kwargs": {"enable_thinking": thinks}}
    answer = client.chat.completions.create(**given)
    if stream:
        said = "".join(choice.delta.content or "" for chunk in answer for choice in chunk.choices)
    else:
        said = answer.choices[0].message.content
    assert isinstance(json.loads(said), dict)


def test_regexes_and_choices_in_chats_and_completions(client):
    fields = {**QUICK["diffusion"], "regex": r"\d{3}-[a-f]+"}
    said = client.chat.completions.create(**asked(extra_body={"diffusion": fields})).choices[0].message.content
    assert re.fullmatch(fields["regex"], said)
    given = dict(model="tiny", prompt="ab", max_tokens=40, seed=3)
    assert re.fullmatch(
        fields["regex"], client.completions.create(**given, extra_body={"diffusion": fields}).choices[0].text
    )
    fields = {**QUICK["diffusion"], "choice": ["rain", "sunshine"]}
    found = client.completions.create(**given, n=2, extra_body={"diffusion": fields})
    assert {choice.text for choice in found.choices} <= set(fields["choice"])
    fields = {**QUICK["diffusion"], "json_schema": PARAMETERS}
    found = client.completions.create(**{**given, "max_tokens": 160}, extra_body={"diffusion": fields})
    jsonschema.validate(json.loads(found.choices[0].text), PARAMETERS)


def test_no_marker_of_a_free_answer_is_shown(client, text):
    """A random model writes markers anywhere."""
    seen = set()
    for seed in range(6):
        answer = client.chat.completions.create(**asked(seed=seed, max_tokens=320)).choices[0]
        seen |= set(answer.diffusion["token_ids"]) & {3, 4, 5, 6, 8}
        parts = AnswerParts(text.decode, text.part_markers).push(answer.diffusion["token_ids"], is_last=True)
        assert answer.message.content == "".join(part.text for part in parts if isinstance(part, Said))
        thought = "".join(part.text for part in parts if isinstance(part, Thought))
        assert getattr(answer.message, "reasoning_content", "") == thought
        assert not any(marker in answer.message.content + thought for marker in gemma.SPECIAL)
    assert seen, "a model that writes no marker shows nothing"


@pytest.mark.parametrize(
    "change, parameter, code",
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {}}}}},
         "response_format.json_schema.schema", "invalid_value"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "invalid_value"),
        ({"response_format": {"type": "json_object"}, "stop": ["a"]}, "stop", "invalid_value"),
        ({"response_format": {"type": "json_object"}, "max_tokens": 1}, None, None),
        ({"tools": [{}]}, "tools.0.type", "missing_parameter"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name", "invalid_value"),
        ({"tools": [WEATHER], "tool_choice": "any"}, "tool_choice", "invalid_value"),
        ({"functions": []}, "functions", "unknown_parameter"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs.tools", "invalid_value"),
        ({"messages": [*ASK, {"role": "tool", "content": "a"}]}, "messages.1.tool_call_id", "invalid_value"),
    ],
)  # fmt: skip
def test_what_cannot_be_had_is_refused(server, change, parameter, code):
    answer = server.http.post("/v1/chat/completions", json={"model": "tiny", "messages": ASK, **change})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, parameter, code), error


def test_what_the_template_does_not_know_is_named(server):
    body = {"model": "tiny", "messages": ASK, "max_tokens": 4, "chat_template_kwargs": {"documents": []}}
    assert server.http.post("/v1/chat/completions", json=body).json()["diffusion"] == {
        "ignored": ["chat_template_kwargs.documents"]
    }
