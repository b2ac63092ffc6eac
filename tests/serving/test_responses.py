"""/v1/responses and log-probabilities through the openai package; `DiffusionGemma.chat` beside the server."""

from __future__ import annotations

import itertools
import json
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai._models import construct_type
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import ResponseStreamEvent
from pydantic import BaseModel

from nemo_diffgemma import DiffusionGemma
from nemo_diffgemma.errors import UserError
from nemo_diffgemma.serving.answer_parts import Said, Thought, ToolCall
from nemo_diffgemma.serving.api.replies import ChatReply, CompletionReply, ResponseReply
from nemo_diffgemma.serving.api.response_items import Items
from nemo_diffgemma.serving.api.responses_body import ResponsesBody
from nemo_diffgemma.serving.constraints import json_of_schema, tool_calls
from tests.serving import cases, gemma, served

ENGINE = dict(context_gb=0.02, typical_tokens=700, max_running=4, tokens_per_pass=600)
DIFFUSION = {"max_denoising_steps": 3, "entropy_bound": 20.0, "canvas_length": 16}
QUICK = {"diffusion": DIFFUSION, "seed": 7}
TOOL = {
    "type": "function",
    "name": "weather",
    "description": "The weather of a place.",
    "parameters": {
        "type": "object",
        "properties": {"place": {"type": "string", "maxLength": 6}, "days": {"type": "integer", "minimum": 1}},
        "required": ["place"],
        "additionalProperties": False,
    },
}


class Point(BaseModel):
    x: bool
    name: str | None


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, single):
    return served.write_checkpoint(tmp_path_factory.mktemp("responses") / "model", gemma.tokenizer())


@pytest.fixture(scope="module")
def client(checkpoint):
    made = served.Split(checkpoint, 1, ENGINE)
    yield made.ready(1).openai()
    made.close()


@pytest.fixture(scope="module")
def model(checkpoint):
    return DiffusionGemma.from_checkpoint(checkpoint)


# -- responses ---------------------------------------------------------------------------------------------------------


def test_a_response_is_the_chat_with_the_same_settings(client):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Grüße, 世界!"}]
    chat = client.chat.completions.create(model="tiny", messages=messages, max_tokens=90, extra_body=QUICK)
    response = client.responses.create(
        model="tiny", instructions="Be brief.", input="Grüße, 世界!", max_output_tokens=90, extra_body=QUICK
    )
    ResponseReply.model_validate(response.model_dump(exclude_unset=True))
    (choice,) = chat.choices
    assert response.diffusion["token_ids"] == choice.diffusion["token_ids"]
    assert response.output_text == (choice.message.content or "")
    ended = choice.finish_reason != "length"
    assert response.status == ("completed" if ended else "incomplete")
    assert ended or response.incomplete_details.reason == "max_output_tokens"
    assert response.usage.input_tokens == chat.usage.prompt_tokens
    assert response.usage.output_tokens == chat.usage.completion_tokens
    items = client.responses.create(
        model="tiny",
        input=[
            {"role": "developer", "content": "Be brief."},
            {
                "role": "user",
                "content": [{"type": "input_text", "text": "Grüße, "}, {"type": "input_text", "text": "世界!"}],
            },
        ],
        max_output_tokens=90,
        temperature=0.5,
        text={"verbosity": "low"},
        extra_body=QUICK,
    )
    assert items.diffusion["token_ids"] == response.diffusion["token_ids"]
    assert (response.diffusion["ignored"], items.diffusion["ignored"]) == ([], ["temperature", "text.verbosity"])


def test_a_stream_of_events_makes_the_response_again(client):
    given_ = dict(model="tiny", input="Hi", max_output_tokens=90, extra_body=QUICK)
    whole = client.responses.create(**given_)
    events = list(client.responses.create(**given_, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    last = events[-1]
    assert last.type == f"response.{whole.status}"
    assert _without_ids(last.response.to_dict()) == _without_ids(whole.to_dict())
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == whole.output_text
    assert [event.item.to_dict() for event in events if event.type == "response.output_item.done"] == [
        item.to_dict() for item in last.response.output
    ]


def test_drafts_are_events_beside_the_others(client):
    body = {**QUICK, "stream_options": {"drafts": True}}
    events = list(client.responses.create(model="tiny", input="Hi", max_output_tokens=32, extra_body=body, stream=True))
    drafts = [event for event in events if event.type == "diffusion.draft"]
    assert len(drafts) == events[-1].response.diffusion["steps"]
    assert all(len(draft.draft["entropy"]) == 16 for draft in drafts)


def _without_ids(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_ids(one) for key, one in value.items() if key not in ("id", "created_at", "call_id")}
    return [_without_ids(one) for one in value] if isinstance(value, list) else value


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_structured_output_is_parsed_by_the_client(client, stream):
    asked = dict(model="tiny", input="Where?", text_format=Point, max_output_tokens=96, extra_body=QUICK)
    if stream:
        with client.responses.stream(**asked) as events:
            parsed = events.get_final_response().output_parsed
    else:
        parsed = client.responses.parse(**asked).output_parsed
    assert isinstance(parsed, Point)


def test_json_mode(client):
    answer = client.responses.create(
        model="tiny", input="Where?", text={"format": {"type": "json_object"}}, max_output_tokens=64, extra_body=QUICK
    )
    assert isinstance(json.loads(answer.output_text), dict) and answer.status == "completed"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "weather"}], ids=["required", "named"])
def test_a_tool_is_called_and_its_result_taken(client, choice):
    asked = dict(model="tiny", tools=[TOOL], parallel_tool_calls=False, max_output_tokens=96, extra_body=QUICK)
    question = {"role": "user", "content": "Oslo?"}
    first = client.responses.create(input=[question], tool_choice=choice, **asked)
    (call,) = first.output
    assert (call.type, call.name, first.status) == ("function_call", "weather", "completed")
    arguments = json.loads(call.arguments)
    assert set(arguments) <= {"place", "days"} and len(arguments["place"]) <= 6
    with client.responses.stream(input=[question], tool_choice=choice, **asked) as events:
        (streamed,) = events.get_final_response().output
    assert (streamed.name, streamed.arguments) == (call.name, call.arguments)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    second = client.responses.create(input=[question, call, result], **{**asked, "max_output_tokens": 16})
    other = {**result, "call_id": streamed.call_id, "output": "sun"}
    third = client.responses.create(input=[question, streamed, other], **{**asked, "max_output_tokens": 16})
    assert second.usage.input_tokens == third.usage.input_tokens + 1 > first.usage.input_tokens
    assert second.diffusion["token_ids"] != third.diffusion["token_ids"], "the result counts"


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # of the client's own type
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_what_the_client_has_parsed_may_be_sent_back(client, stream):
    """Its helpers add fields to answers: a conversation goes on with them."""
    given_ = dict(model="tiny", max_tokens=64, extra_body=QUICK)
    tool = openai.pydantic_function_tool(Point)
    forced = {"tools": [tool], "tool_choice": "required", "parallel_tool_calls": False}
    for more in ({"response_format": Point}, forced):
        messages: list[Any] = [{"role": "user", "content": "Where?"}]
        for _ in range(2):
            if stream:
                with client.chat.completions.stream(messages=messages, **more, **given_) as events:
                    message = events.get_final_completion().choices[0].message
            else:
                message = client.chat.completions.parse(messages=messages, **more, **given_).choices[0].message
            assert message.parsed or message.tool_calls[0].function.parsed_arguments
            messages.append(message)
            for call in message.tool_calls or []:
                messages.append({"role": "tool", "tool_call_id": call.id, "content": "there"})
            messages.append({"role": "user", "content": "And now?"})
    items: list[Any] = [{"role": "user", "content": "Where?"}]
    asked = dict(model="tiny", max_output_tokens=64, extra_body=QUICK, text_format=Point)
    for _ in range(2):
        if stream:
            with client.responses.stream(input=items, **asked) as events:
                response = events.get_final_response()
        else:
            response = client.responses.parse(input=items, **asked)
        assert response.output_parsed is not None
        items += [*response.output, {"role": "user", "content": "And now?"}]


@pytest.mark.parametrize(
    "items, expected",
    [
        ("R1 user assistant", ["assistant:R1:", "user::u", "assistant::a"]),
        ("user R1 assistant", ["user::u", "assistant:R1:a"]),
        ("user R1 R2 call result assistant", ["user::u", "assistant:R1R2:", "tool::r", "assistant::a"]),
        ("user call R1 result", ["user::u", "assistant::", "assistant:R1:", "tool::r"]),
        ("user R1", ["user::u", "assistant:R1:"]),
    ],
)
def test_thoughts_are_of_the_turn_that_they_stand_in(items, expected):
    made = {
        "user": {"role": "user", "content": "u"},
        "assistant": {"role": "assistant", "content": "a"},
        "call": {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        "result": {"type": "function_call_output", "call_id": "c", "output": "r"},
    }
    for name in ("R1", "R2"):
        made[name] = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": name}]}
    messages = ResponsesBody(model="m", input=[made[name] for name in items.split()]).chat().messages
    assert [f"{one.role}:{one.reasoning_content or ''}:{one.text}" for one in messages] == expected


@pytest.mark.parametrize(
    "change, parameter",
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"store": True}, "store"),
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"input": []}, "input"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "a"}]}]},
            "input.0.content.0.type",
        ),
        ({"input": [{"type": "function_call_output", "call_id": "a", "output": "b"}]}, "input.0.call_id"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "a"}}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema", "name": "a", "schema": {"not": {}}}}}, "text.format"),
        ({"max_output_tokens": 10**9}, "max_output_tokens"),
        ({"truncation": "auto"}, "truncation"),
        ({"include": ["message.output_text.logprobs"]}, "include.0"),
    ],
)
def test_what_this_server_cannot_do_is_refused_by_name(client, change, parameter):
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model="tiny", **{"input": "a", **change})
    assert refused.value.param == parameter, refused.value


@given(st.lists(st.one_of(st.text(max_size=3).map(Said), st.text(max_size=3).map(Thought),
                          st.just(ToolCall(0, "a", '{"b": 1}'))), max_size=8), st.data())  # fmt: skip
def test_whatever_the_parts_the_client_makes_the_items_again(parts, data):
    """The state machine of the openai package raises for events out of order, and for items that change."""
    parts = [ToolCall(index, part.name, part.arguments) if isinstance(part, ToolCall) else part
             for index, part in enumerate(parts)]  # fmt: skip
    items, events = Items(), [{"type": "response.created", "response": {"id": "a", "object": "response", "output": []}}]
    while parts:
        count = data.draw(st.integers(1, len(parts)))
        events += items.take(parts[:count])
        parts = parts[count:]
    events += items.close()
    events.append({"type": "response.completed", "response": {"id": "a", "object": "response", "output": items.output}})
    state: Any = ResponseStreamState(input_tools=openai.omit, text_format=openai.omit)
    for number, event in enumerate(json.loads(json.dumps(events))):
        state.handle_event(construct_type(type_=ResponseStreamEvent, value={**event, "sequence_number": number}))
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == items.output
    kinds = [item["type"] for item in items.output]
    assert all(kind == "function_call" or kind != after for kind, after in itertools.pairwise(kinds))


# -- log-probabilities -------------------------------------------------------------------------------------------------


def test_log_probabilities_of_a_chat(client):
    asked = dict(model="tiny", messages=[{"role": "user", "content": "世界"}], max_tokens=60, extra_body=QUICK)
    asked |= dict(logprobs=True, top_logprobs=3)
    whole = client.chat.completions.create(**asked)
    ChatReply.model_validate(whole.model_dump(exclude_unset=True), extra="forbid")
    (choice,) = whole.choices
    entries = choice.logprobs.content
    ids = choice.diffusion["token_ids"]
    assert len(entries) == len(ids)
    for entry, id in zip(entries, ids, strict=True):
        assert entry.token == _name(id)
        assert (entry.top_logprobs[0].token, entry.top_logprobs[0].logprob) == (entry.token, entry.logprob)
        assert entry.logprob <= 0 and [one.logprob for one in entry.top_logprobs] == sorted(
            (one.logprob for one in entry.top_logprobs), reverse=True
        )
        assert len(entry.top_logprobs) == 3
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**asked, stream=True)]
    streamed = [entry for chunk in chunks if chunk.logprobs for entry in chunk.logprobs.content]
    assert streamed == entries
    plain = client.chat.completions.create(**{**asked, "logprobs": False, "top_logprobs": None})
    assert plain.choices[0].diffusion["token_ids"] == ids and plain.choices[0].logprobs is None


def _name(id: int) -> str:
    """As vocabularies of bytes have it."""
    read = gemma.tokenizer()
    if id < len(gemma.SPECIAL):
        return read.convert_ids_to_tokens(id)
    text = read.decode([id])
    return text if "\ufffd" not in text else f"bytes:\\x{gemma_bytes()[id]:02x}"


def gemma_bytes() -> dict[int, int]:
    from nemo_diffgemma.serving.constraints import bytes_of_tokens

    return {id: content[0] for id, content in bytes_of_tokens(gemma.tokenizer()).items() if len(content) == 1}


def test_log_probabilities_of_a_completion(client):
    asked = dict(model="tiny", prompt=[3, 40, 50], max_tokens=60, logprobs=2, extra_body=QUICK)
    whole = client.completions.create(**asked)
    CompletionReply.model_validate(whole.model_dump(exclude_unset=True), extra="forbid")
    (choice,) = whole.choices
    told = choice.logprobs
    assert told.tokens == [_name(id) for id in choice.diffusion["token_ids"]]
    assert len(told.token_logprobs) == len(told.top_logprobs) == len(told.text_offset) == len(told.tokens)
    for token, offset, value, top in zip(
        told.tokens, told.text_offset, told.token_logprobs, told.top_logprobs, strict=True
    ):
        assert top[token] == value == max(top.values()) and len(top) == 2
        if not token.startswith(("<", "bytes:")):
            assert choice.text[offset : offset + len(token)] == token
    chunks = [chunk.choices[0].logprobs for chunk in client.completions.create(**asked, stream=True)]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [one for chunk in chunks if chunk for one in getattr(chunk, name)] == getattr(told, name)


def test_bytes_of_tokens_joined_are_the_text(client):
    asked = dict(model="tiny", messages=[{"role": "user", "content": "a"}], max_tokens=48, logprobs=True)
    schema = {"diffusion": {**DIFFUSION, "choice": ["世界, Grüße", "é"]}, "seed": 1}
    (choice,) = client.chat.completions.create(**asked, extra_body=schema).choices
    joined = b"".join(bytes(entry.bytes or []) for entry in choice.logprobs.content)
    assert joined.decode() == choice.message.content and not joined.isascii()


# -- in Python ---------------------------------------------------------------------------------------------------------


def test_a_chat_in_python_has_the_tokens_of_the_servers(client, model):
    for messages in (
        [{"role": "user", "content": "Hi"}],
        [{"role": "system", "content": "b"}, {"role": "user", "content": "c"}],
    ):
        body = {"diffusion": {**DIFFUSION, "canvas_length": 32}, "seed": 11}
        (choice,) = client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=70, extra_body=body
        ).choices
        sampler = model.sampler_defaults.with_overrides({"max_denoising_steps": 3, "entropy_bound": 20.0})
        drafts: list[Any] = []
        given_ = messages[0]["content"] if len(messages) == 1 else messages
        answer = model.chat(given_, seed=11, max_tokens=70, sampler=sampler, on_draft=drafts.append)
        assert answer.token_ids == choice.diffusion["token_ids"]
        assert (answer.steps, answer.canvases) == (choice.diffusion["steps"], choice.diffusion["canvases"])
        assert answer.text == (choice.message.content or "") and answer.finish_reason == choice.finish_reason
        assert answer.thoughts == (choice.message.model_extra.get("reasoning_content") or "")
        assert len(drafts) == answer.steps and drafts[-1].token_ids[0] in answer.token_ids
        assert [draft.canvas for draft in drafts] == sorted(draft.canvas for draft in drafts)
        assert all(0 <= draft.remaining < 3 for draft in drafts)


def test_an_answer_in_python_is_of_a_language(client, model):
    messages = [{"role": "user", "content": "Oslo?"}]
    format = {"type": "json_schema", "json_schema": {"name": "a", "schema": TOOL["parameters"]}}
    body = {"diffusion": {**DIFFUSION, "canvas_length": 32}, "seed": 2, "response_format": format}
    (choice,) = client.chat.completions.create(model="tiny", messages=messages, max_tokens=70, extra_body=body).choices
    sampler = model.sampler_defaults.with_overrides({"max_denoising_steps": 3, "entropy_bound": 20.0})
    language = json_of_schema(TOOL["parameters"])
    answer = model.chat("Oslo?", seed=2, max_tokens=70, sampler=sampler, language=language)
    assert answer.token_ids == choice.diffusion["token_ids"] and answer.text == choice.message.content
    assert set(json.loads(answer.text)) <= {"place", "days"} and answer.finish_reason == choice.finish_reason == "stop"


def test_a_chat_in_python_calls_tools(model):
    tool = {"type": "function", "function": {key: value for key, value in TOOL.items() if key != "type"}}
    sampler = model.sampler_defaults.with_overrides({"max_denoising_steps": 3, "entropy_bound": 20.0})
    asked = dict(max_tokens=96, sampler=sampler, language=tool_calls([tool], parallel=False))
    (call,) = model.chat("Oslo?", tools=[tool], **asked).tool_calls
    assert call.name == "weather" and set(json.loads(call.arguments)) <= {"place", "days"}
    assert model.chat("Oslo?", **asked).tool_calls == [], "where no tools are given, a call is text"


def test_a_chat_in_python_works_on_every_rank_of_a_layout(checkpoint, pool):
    found = pool(4).run(
        "tests.serving.served:chat_in_layout", layout=dict(tensor=2, expert=2), checkpoint=str(checkpoint)
    )
    tokens, generated, missed = found[0]
    assert found == [found[0]] * 4 and missed == 0
    assert 0 < len(tokens) <= 60 and tokens == generated[: len(tokens)]


def test_a_model_without_a_tokenizer_cannot_chat(single):
    with pytest.raises(UserError, match="has no tokenizer.json, so it cannot chat"):
        cases.network().chat("Hi")
