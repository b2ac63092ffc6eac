"""Bodies of chats into prompts and languages, and answers into what clients read, without a server."""

from __future__ import annotations

import asyncio
import json
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from starlette.testclient import TestClient

from nemo_diffgemma.diffusion.sampler_config import SamplerConfig
from nemo_diffgemma.serving.api.answers import _events
from nemo_diffgemma.serving.api.app import create_app
from nemo_diffgemma.serving.api.chat import _Chat
from nemo_diffgemma.serving.api.conversation import Message, for_template
from nemo_diffgemma.serving.api.fields import ChatBody
from nemo_diffgemma.serving.api.replies import ChatReply
from nemo_diffgemma.serving.constraints import Language
from nemo_diffgemma.serving.failures import Failure, InvalidRequest
from nemo_diffgemma.serving.job import Job
from nemo_diffgemma.serving.metrics import Metrics
from nemo_diffgemma.serving.request import Finished, Reason, Request, Settled
from nemo_diffgemma.serving.settings import FrontSettings
from nemo_diffgemma.serving.text import ServedText, files_of
from nemo_diffgemma.tokenizer import Text
from tests.serving import cases, gemma

ASK = {"role": "user", "content": "Rain?"}
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Now.", "parameters": CITY}}
CLOCK = {"type": "function", "function": {"name": "clock"}}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    directory = tmp_path_factory.mktemp("gemma")
    gemma.tokenizer().save_pretrained(directory)
    return ServedText(files_of(Text(directory)))


def body(**given: Any) -> ChatBody:
    return ChatBody.model_validate({"model": "tiny", "messages": [ASK], **given})


def prompt(text: ServedText, asked: ChatBody) -> str:
    """What the model reads, markers included."""
    ids = text.encode_chat(for_template(asked.messages), asked.template_variables)
    return gemma.tokenizer().decode(ids)


# -- prompts -----------------------------------------------------------------------------------------------------------


def test_tools_calls_and_results_are_written_as_the_template_has_them(text):
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    answered = {"role": "assistant", "content": None, "tool_calls": [call], "reasoning": "hm"}
    result = {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "wet"}]}
    asked = body(messages=[ASK, answered, result], tools=[WEATHER])
    assert prompt(text, asked).endswith(
        '<|turn>user\nRain?<turn|>\n<|turn>model\n<|channel>thought\nhm\n<channel|><|tool_call>call:weather{city:<|"|>Rome'
        '<|"|>}<tool_call|><|tool_response>response:weather{value:<|"|>wet<|"|>}<tool_response|>'
    )
    assert '<|tool>declaration:weather{description:<|"|>Now.<|"|>,' in prompt(text, asked)
    assert "<|tool>" not in prompt(text, body(tools=[WEATHER], tool_choice="none"))


@pytest.mark.parametrize(
    "given, thinks",
    [
        ({}, False),
        ({"reasoning_effort": "none"}, False),
        ({"reasoning_effort": "low"}, True),
        ({"chat_template_kwargs": {"enable_thinking": True}}, True),
        ({"chat_template_kwargs": {"enable_thinking": False}, "reasoning_effort": "high"}, False),
    ],
)
def test_thinking_is_asked_for_in_two_ways(text, given, thinks):
    asked = body(**given, response_format={"type": "json_object"})
    assert ("<|think|>" in prompt(text, asked)) == thinks
    assert prompt(text, asked).endswith("<|turn>model\n" + ("" if thinks else "<|channel>thought\n<channel|>"))
    assert asked.language.thought == thinks


@pytest.mark.parametrize(
    "messages, parameter",
    [
        ([ASK, {"role": "tool", "content": "wet", "tool_call_id": "x"}], "messages.1.tool_call_id"),
        ([ASK, {"role": "tool", "content": "wet"}], "messages.1.tool_call_id"),
        ([ASK | {"tool_calls": []}, ASK | {"tool_calls": [{"id": "a", "function": {"name": "f"}}]}],
         "messages.1.tool_calls"),
        ([ASK | {"tool_call_id": "a"}], "messages.0.tool_call_id"),
        ([ASK, {"role": "system", "content": "a", "reasoning_content": "b"}], "messages.1.reasoning_content"),
        ([{"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "{"}}]}],
         "messages.0.tool_calls.0.function.arguments"),
        ([{"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "[" * 9999}}]}],
         "messages.0.tool_calls.0.function.arguments"),
        ([{"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "[1]"}}]}],
         "messages.0.tool_calls.0.function.arguments"),
    ],
)  # fmt: skip
def test_messages_that_do_not_fit_each_other_are_refused(messages, parameter):
    with pytest.raises(InvalidRequest) as refused:
        for_template([Message.model_validate(message) for message in messages])
    assert refused.value.parameter == parameter


def test_an_answer_of_nothing_but_calls_or_thoughts_may_be_sent_back():
    for message in ({"role": "assistant"}, {"role": "assistant", "content": None, "refusal": None, "annotations": []}):
        assert for_template([Message.model_validate(message)]) == [{"role": "assistant", "content": ""}]


# -- languages ---------------------------------------------------------------------------------------------------------

SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "schema": CITY}}
STRICT = {"type": "function", "function": {**WEATHER["function"], "strict": True}}


@pytest.mark.parametrize(
    "given, kind",
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, "json_schema"),
        ({"response_format": SCHEMA}, "json_schema"),
        ({"diffusion": {"regex": "a|b"}}, "regex"),
        ({"diffusion": {"choice": ["a", "b"]}}, "choice"),
        ({"diffusion": {"json_schema": CITY}}, "json_schema"),
        ({"tools": [WEATHER, CLOCK]}, None),
        ({"tools": [WEATHER, CLOCK], "tool_choice": "none", "response_format": SCHEMA}, "json_schema"),
        ({"tools": [WEATHER, CLOCK], "tool_choice": "required", "response_format": SCHEMA}, "tool_calls"),
        ({"tools": [STRICT, CLOCK]}, "tool_calls"),
    ],
)
def test_what_an_answer_must_be_is_a_language(given, kind):
    language = body(**given).language
    assert (language.kind if isinstance(language, Language) else None) == kind


def calls(*names: str) -> str:
    """As a check of an answer reads them."""

    def one(name):
        arguments = '{city:\x01<|"|>\x01a\x01<|"|>\x01}' if name == "weather" else "{}"
        return f"\x01<|tool_call>\x01call:{name}{arguments}\x01<tool_call|>\x01"

    return "".join(map(one, names))


@pytest.mark.parametrize(
    "given, fine, wrong",
    [
        ({"tool_choice": "required"}, [calls("weather"), calls("clock", "weather")], ["", "a", "a" + calls("clock")]),
        ({"tool_choice": "required", "parallel_tool_calls": False}, [calls("weather")], [calls("clock", "clock")]),
        ({"tool_choice": {"type": "function", "function": {"name": "clock"}}}, [calls("clock")], [calls("weather")]),
        ({"tools": [STRICT, CLOCK]}, ["", "a", "a" + calls("weather")], [calls("weather") + "a", calls("other")]),
    ],
)  # fmt: skip
def test_which_calls_an_answer_must_have(given, fine, wrong):
    language = body(**{"tools": [WEATHER, CLOCK], **given}).language
    for answer in fine:
        language.check(answer)
    for answer in wrong:
        with pytest.raises(Exception, match="is not what its constraint"):
            language.check(answer)


@pytest.mark.parametrize(
    "given, parameter, what",
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}},
         "response_format.json_schema.schema", "'not'"),
        ({"diffusion": {"regex": "(?=a)"}}, "diffusion.regex", "look-around"),
        ({"diffusion": {"choice": []}}, "diffusion.choice", "at least one"),
        ({"diffusion": {"json_schema": {"if": {}}}}, "diffusion.json_schema", "'if'"),
        ({"diffusion": {"regex": "a", "choice": ["a"]}}, "diffusion.choice", "at once"),
        ({"diffusion": {"regex": "a"}, "response_format": SCHEMA}, "response_format", "both"),
        ({"tools": [WEATHER], "response_format": SCHEMA}, "response_format", "tool_choice"),
        ({"tools": [WEATHER], "diffusion": {"regex": "a"}}, "diffusion", "tool_choice"),
        ({"tools": [WEATHER, WEATHER]}, "tools.1.function.name", "two tools"),
        ({"tool_choice": "required"}, "tool_choice", "no tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}, "tools": [CLOCK]}, "tool_choice", "clock"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "not": {}}}}],
          "tool_choice": "required"}, "tools", "'not'"),
    ],
)  # fmt: skip
def test_what_no_answer_can_be_held_to_is_refused_by_name(given, parameter, what):
    with pytest.raises(InvalidRequest, match=what) as refused:
        body(**given).language  # noqa: B018
    assert (refused.value.status, refused.value.parameter) == (400, parameter)


def test_a_language_can_be_made_elsewhere():
    """Of what is sent to where it is made, nothing that it needs is missing; and what it needs not is not sent."""
    for more in ({"response_format": SCHEMA}, {"tools": [STRICT]}, {"diffusion": {"regex": "a"}},
                 {"tools": [WEATHER], "tool_choice": "required", "reasoning_effort": "low"}):  # fmt: skip
        asked = body(**more)
        assert asked.may_be_held and b"Where" not in pickle.dumps(asked.without_content())
        language = pickle.loads(pickle.dumps(asked.without_content())).language
        assert language == asked.language
        other = body(messages=[ASK])
        other.know(language)
        assert other.language == language
    assert not body().may_be_held and not body(tools=[WEATHER]).may_be_held


@pytest.mark.parametrize(
    "given, named",
    [({}, []), ({"store": True, "temperature": 0.5}, ["temperature", "store"]), ({"store": False}, []),
     ({"stream_options": {"include_obfuscation": True}}, ["stream_options.include_obfuscation"]),
     ({"max_tokens": 3, "max_completion_tokens": 4}, ["max_tokens"]), ({"max_tokens": 3}, [])],
)  # fmt: skip
def test_what_changes_nothing_is_said(given, named):
    assert body(**given).ignored == named


# -- answers -----------------------------------------------------------------------------------------------------------


def desk_of(text: ServedText, violated: bool = False) -> Any:
    async def check(job: Job, tokens: list[int]) -> None:
        if violated:
            raise Failure("not what was asked for", "constraint_violated")

    return SimpleNamespace(text=text, router=SimpleNamespace(text=text), check=check, leave=lambda jobs: None)


def job_of(canvases: list[list[int]], reason: Reason) -> Job:
    job = Job(Request("a", (2,), 100, 32, chat=True), [], 0.0)
    for number, canvas in enumerate(canvases):
        job.tell(Settled("a", number, 3, canvas))
    job.tell(Finished("a", reason, 1, 0))
    return job


def whole_and_streamed(text: ServedText, ids: list[int], cuts: list[int], reason: Reason) -> tuple[Any, list[Any]]:
    """An answer as one reply, and as the chunks of a stream."""
    asked = body(tools=[CLOCK], stream=True, stream_options={"include_usage": True})
    ends = sorted({min(cut, len(ids)) for cut in cuts} | {len(ids)})
    canvases = [ids[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]

    async def stream() -> list[Any]:
        format = _Chat(desk_of(text), asked)
        events = [event async for event in _events(desk_of(text), [job_of(canvases, reason)], format)]
        assert events[-1] == b"data: [DONE]\n\n"
        return [json.loads(event.removeprefix(b"data: ")) for event in events[:-1]]

    format = _Chat(desk_of(text), asked)
    (answer,) = format.begin([job_of([ids], reason)])
    for event in (Settled("a", 0, 3, ids), Finished("a", reason, 1, 0)):
        answer.take(event)
    return format.whole([answer]), asyncio.run(stream())


TOKENS = st.lists(
    st.sampled_from([3, 4, 5, 6, 8]) | st.integers(0, cases.IDS - 1) | st.sampled_from(gemma.ids("call:f{a1,}")),
    max_size=40,
)
CALL = st.sampled_from([gemma.ids('<|tool_call>call:f{a:<|"|>b<|"|>}<tool_call|>'), gemma.ids("<|channel>thought\n")])
ANSWERS = st.lists(TOKENS | CALL, max_size=4).map(lambda parts: [id for part in parts for id in part])


@given(ANSWERS, st.lists(st.integers(0, 80), max_size=5), st.sampled_from([Reason.STOP, Reason.LENGTH]))
def test_a_stream_put_together_by_openais_package_is_the_whole_answer(text, ids, cuts, reason):
    reply, chunks = whole_and_streamed(text, ids, cuts, reason)
    ChatReply.model_validate(reply, extra="forbid")
    whole, state = ChatCompletion.model_validate(reply).choices[0], ChatCompletionStreamState()
    for chunk in chunks:
        state.handle_chunk(ChatCompletionChunk.model_validate(chunk))
    final = state.current_completion_snapshot  # the final one is an error where max_tokens have cut it
    streamed = final.choices[0]
    assert (streamed.message.content or "") == (whole.message.content or "")
    assert getattr(streamed.message, "reasoning_content", None) == getattr(whole.message, "reasoning_content", None)
    called = [[(call.function.name, call.function.arguments) for call in one.message.tool_calls or []]
              for one in (streamed, whole)]  # fmt: skip
    assert called[0] == called[1]
    assert streamed.finish_reason == whole.finish_reason
    assert (whole.finish_reason == "tool_calls") == (bool(called[0]) and reason is Reason.STOP)
    assert final.usage.model_dump() == ChatCompletion.model_validate(reply).usage.model_dump()
    told = [
        id for chunk in chunks for choice in chunk["choices"] for id in choice.get("diffusion", {}).get("token_ids", [])
    ]
    assert told == ids


def test_a_chunk_has_one_thing(text):
    answer = gemma.ids("<|channel>thought\nhm\n<channel|>so<|tool_call>call:clock{}<tool_call|><|tool_response>")
    _, chunks = whole_and_streamed(text, answer, [], Reason.STOP)
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    assert [list(delta) for delta in deltas] == [
        ["role", "content"], ["reasoning_content"], ["content"], ["tool_calls"], []
    ]  # fmt: skip
    assert deltas[3]["tool_calls"][0]["id"].startswith("call_")


def test_an_answer_that_is_not_what_it_must_be_is_an_error_and_never_whole(text):
    async def told() -> list[bytes]:
        desk = desk_of(text, violated=True)
        return [event async for event in _events(desk, [job_of([[20]], Reason.STOP)], _Chat(desk, body()))]

    last = json.loads(asyncio.run(told())[-1].removeprefix(b"data: "))
    assert last["error"]["code"] == "constraint_violated"


def app_of(**settings: Any) -> Any:
    return create_app(
        None, FrontSettings(host="", port=0, names=["a"], replicas=[], environments=[], **settings), Metrics()
    )


@pytest.mark.parametrize("origins, allowed", [([], None), (["http://b"], None), (["http://a"], "http://a")])
def test_pages_of_other_hosts_may_ask_where_they_are_named(origins, allowed):
    wish = {
        "Origin": "http://a",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    answer = TestClient(app_of(cors_origins=origins, api_keys=["k"])).options("/v1/chat/completions", headers=wish)
    assert answer.headers.get("Access-Control-Allow-Origin") == allowed
    assert (answer.status_code == 200) == (allowed is not None)


def test_the_openapi_schema_documents_every_field_of_diffusion():
    described = app_of().openapi()["components"]["schemas"]["Diffusion"]["properties"]
    of_sampler = {name for name in vars(SamplerConfig()) if not name.endswith("token_id")}
    assert set(described) == of_sampler | {"canvas_length", "regex", "choice", "json_schema"}
    assert all(field["description"] for field in described.values())
