"""The server as its clients meet it: a front end and two replicas in processes of their own, and the openai package."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from nemo_diffgemma.serving.api.replies import ChatReply, CompletionReply, DraftReply
from nemo_diffgemma.serving.request import Request
from tests.serving import cases, served

ENGINE = dict(context_gb=0.02, typical_tokens=700, max_running=3, tokens_per_pass=600)
QUEUE = 4
ROOM = 2 * ENGINE["max_running"] + QUEUE  # requests that two replicas take
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Grüße, 世界!"}]
QUICK = {"diffusion": {"max_denoising_steps": 3, "entropy_bound": 20.0, "canvas_length": 16}}


@pytest.fixture(scope="module")
def network(single):
    return cases.network()


@pytest.fixture(scope="module")
def tokenizer():
    return served.tokenizer()


@pytest.fixture(scope="module")
def split(tmp_path_factory, network):
    checkpoint = served.write_checkpoint(tmp_path_factory.mktemp("served") / "model")
    made = served.Split(checkpoint, 2, ENGINE, queue_limit=QUEUE, max_body_mb=2.0)
    made.ready(2)
    yield made
    made.close()


@pytest.fixture(scope="module")
def server(split):
    return split.server


@pytest.fixture(scope="module")
def client(server):
    return server.openai()


def alone(network: Any, prompt: list[int], seed: int, max_tokens: int, quick: bool = True) -> list[int]:
    """What `DiffusionGemma.generate` gives for it."""
    settings = QUICK["diffusion"] if quick else {}
    sampler = network.sampler_defaults.with_overrides({k: v for k, v in settings.items() if k != "canvas_length"})
    request = Request("", tuple(prompt), max_tokens, settings.get("canvas_length", cases.CANVAS), sampler, seed)
    return cases.alone(network, request)[0]


def chat_ids(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def test_a_chat_is_what_the_network_gives_alone(client, network, tokenizer):
    answer = client.chat.completions.create(
        model="default", messages=CHAT, max_tokens=40, seed=7, temperature=0.5, extra_body=QUICK
    )
    prompt = chat_ids(tokenizer, CHAT)
    expected = alone(network, prompt, 7, 40)
    choice = answer.choices[0]
    assert choice.diffusion["token_ids"] == expected
    assert choice.message.content == tokenizer.decode(expected, skip_special_tokens=True)
    assert choice.finish_reason == ("stop" if expected[-1] in cases.EOS else "length")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), len(expected))
    assert answer.diffusion == {"ignored": ["temperature"]}
    ChatReply.model_validate(answer.model_dump(exclude_unset=True), extra="forbid")


def test_a_stream_has_a_chunk_a_canvas_and_the_same_text(client):
    given = dict(model="tiny", messages=CHAT, max_tokens=40, seed=7, extra_body=QUICK)
    whole = client.chat.completions.create(**given)
    chunks = list(client.chat.completions.create(**given, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage == whole.usage and chunks[-1].choices == []
    choices = [chunk.choices[0] for chunk in chunks[:-1]]
    assert choices[0].delta.role == "assistant"
    assert "".join(choice.delta.content or "" for choice in choices) == whole.choices[0].message.content
    assert choices[-1].finish_reason == whole.choices[0].finish_reason
    canvases = [choice.diffusion for choice in choices if "canvas" in getattr(choice, "diffusion", {})]
    assert [id for canvas in canvases for id in canvas["token_ids"]] == whole.choices[0].diffusion["token_ids"]
    assert [canvas["canvas"] for canvas in canvases] == list(range(whole.choices[0].diffusion["canvases"]))


def test_drafts_show_each_step_beside_the_text(client):
    body = {**QUICK, "stream_options": {"drafts": True}}
    chunks = client.chat.completions.create(
        model="tiny", messages=CHAT, max_tokens=32, seed=7, stream=True, extra_body=body
    )
    steps, drafts, text = 0, [], ""
    for chunk in chunks:
        if chunk.choices:
            steps += (getattr(chunk.choices[0], "diffusion", None) or {}).get("steps", 0)
            text += chunk.choices[0].delta.content or ""
        else:
            drafts.append(chunk.diffusion["draft"])
            DraftReply.model_validate(drafts[-1], extra="forbid")
    assert len(drafts) == steps and text
    assert all(len(draft["pieces"]) == len(draft["entropy"]) == len(draft["accepted"]) == 16 for draft in drafts)


def test_completions_take_texts_and_ids_and_give_n_answers(client, network):
    answer = client.completions.create(model="tiny", prompt=["ab", "c"], n=2, seed=3, max_tokens=20, extra_body=QUICK)
    prompts = [[2, *served.tokenizer()("ab").input_ids[1:]], served.tokenizer()("c").input_ids]
    found = [(choice.index, choice.diffusion["seed"], choice.diffusion["token_ids"]) for choice in answer.choices]
    assert found == [
        (2 * place + index, 3 + index, alone(network, prompt, 3 + index, 20))
        for place, prompt in enumerate(prompts)
        for index in range(2)
    ]
    assert answer.usage.prompt_tokens == sum(map(len, prompts))
    CompletionReply.model_validate(answer.model_dump(exclude_unset=True), extra="forbid")
    ids = client.completions.create(model="tiny", prompt=[5, 6, 7], seed=3, max_tokens=20, extra_body=QUICK)
    assert ids.choices[0].diffusion["token_ids"] == alone(network, [5, 6, 7], 3, 20)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_nothing_of_a_stop_string_is_shown(client, stream):
    given = dict(model="tiny", prompt="ab", seed=5, max_tokens=60, extra_body=QUICK)
    text = client.completions.create(**given).choices[0].text
    for begin in (3, 10, len(text) // 2):
        stop = text[begin : begin + 4]
        found = client.completions.create(**given, stop=[stop], stream=stream)
        if stream:
            chunks = [chunk.choices[0] for chunk in found]
            shown, reason = "".join(chunk.text for chunk in chunks), chunks[-1].finish_reason
        else:
            shown, reason = found.choices[0].text, found.choices[0].finish_reason
        assert (shown, reason) == (text[: text.index(stop)], "stop")


def test_a_shared_beginning_goes_where_it_is_cached(client):
    prompt = [3 + index % 400 for index in range(600)]
    cached = [
        client.completions.create(model="tiny", prompt=[*prompt, index], max_tokens=4, extra_body=QUICK).usage
        for index in range(4)
    ]
    assert [one.prompt_tokens_details.cached_tokens for one in cached] == [0, 512, 512, 512]


# -- what is wrong -----------------------------------------------------------------------------------------------------

ONE = {"model": "tiny", "messages": [{"role": "user", "content": "a"}]}


@pytest.mark.parametrize(
    "change, status, parameter, code",
    [
        ({"model": "gpt-9"}, 404, "model", "model_not_found"),
        ({"messages": []}, 400, "messages", "invalid_value"),
        ({"messages": "a"}, 400, "messages", "invalid_value"),
        ({"messages": [{"role": "user"}]}, 400, "messages.0.content", "missing_parameter"),
        ({"messages": [{"role": "robot", "content": "a"}]}, 400, "messages.0.role", "invalid_value"),
        ({"max_tokens": 0}, 400, "max_tokens", "invalid_value"),
        ({"max_tokens": "5"}, 400, "max_tokens", "invalid_value"),
        ({"max_tokens": 10**9}, 400, "max_tokens", "context_length_exceeded"),
        ({"seed": 2**63}, 400, "seed", "invalid_value"),
        ({"seed": 2**63 - 1, "n": 2}, 400, "seed", None),
        ({"seed": True}, 400, "seed", "invalid_value"),
        ({"n": 0}, 400, "n", "invalid_value"),
        ({"n": ROOM + 1}, 400, None, None),
        ({"stop": [""]}, 400, "stop.0", "invalid_value"),
        ({"functions": [{}]}, 400, "functions", "unknown_parameter"),
        ({"tools": [{}]}, 400, "tools.0.type", "missing_parameter"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools", "invalid_value"),
        ({"logprobs": 1}, 400, "logprobs", "invalid_value"),
        ({"top_logprobs": 3}, 400, "top_logprobs", "invalid_value"),
        ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", "invalid_value"),
        ({"diffusion": {"steps": 3}}, 400, "diffusion.steps", "unknown_parameter"),
        ({"diffusion": {"t_min": 0.9, "t_max": 0.1}}, 400, "diffusion.t_min", "invalid_value"),
        ({"diffusion": {"canvas_length": 33}}, 400, "diffusion.canvas_length", "invalid_value"),
        ({"diffusion": {"max_denoising_steps": 0}}, 400, "diffusion.max_denoising_steps", "invalid_value"),
        ({"stream_options": {"draft": True}}, 400, "stream_options.draft", "unknown_parameter"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, None, "invalid_json"),
        ({"messages": [{"role": "user", "content": "a" * 5000}]}, 400, "messages", "context_length_exceeded"),
    ],
)
def test_what_cannot_be_answered_is_refused_in_openais_format(server, change, status, parameter, code):
    body = json.dumps({**ONE, **change})  # escapes lone surrogates, which no UTF-8 has
    answer = server.http.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (status, parameter, code), error
    assert error["message"] and error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "method, path, content, kind, status, code",
    [
        ("POST", "/v1/chat/completions", b'{"model": ', "application/json", 400, "invalid_json"),
        ("POST", "/v1/chat/completions", b"", "application/json", 400, "missing_parameter"),
        ("POST", "/v1/chat/completions", b"[1]", "application/json", 400, "invalid_value"),
        ("POST", "/v1/chat/completions", b"\xff\xfe", "application/json", 400, "invalid_json"),
        ("POST", "/v1/chat/completions", b"[" * 100_000, "application/json", 400, "invalid_json"),
        ("POST", "/v1/chat/completions", b"model=tiny", "application/x-www-form-urlencoded", 400, "invalid_json"),
        ("POST", "/v1/chat/completions", b"a" * 3_000_000, "application/json", 413, "body_too_large"),
        ("GET", "/v1/chat/completions", b"", "application/json", 405, None),
        ("POST", "/v1/nothing", b"{}", "application/json", 404, None),
    ],
    ids=["cut", "empty", "list", "binary", "deep", "form", "large", "method", "path"],
)
def test_bodies_that_are_none(server, method, path, content, kind, status, code):
    answer = server.http.request(method, path, content=content, headers={"Content-Type": kind})
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text


def test_a_body_of_unknown_length_is_limited_too(server):
    pieces = (b"a" * 100_000 for _ in range(40))
    answer = server.http.post("/v1/completions", content=pieces, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")


def test_the_client_package_raises_its_own_errors(client):
    with pytest.raises(openai.NotFoundError, match="there is no model 'x'; this server has 'tiny'"):
        client.chat.completions.create(model="x", messages=CHAT)
    with pytest.raises(openai.BadRequestError, match="context"):
        client.completions.create(model="tiny", prompt=[3] * 10_000)


def test_information(server, client):
    assert [model.id for model in client.models.list()] == ["tiny", "default"]
    assert client.models.retrieve("tiny").diffusion["canvas_length"] == cases.CANVAS
    health = server.http.get("/health").json()
    assert health["status"] == "ok" and len(health["replicas"]) == 2
    tokenizer = served.tokenizer()
    for body, ids in [
        ({"prompt": "aé"}, tokenizer("aé").input_ids),
        ({"messages": CHAT}, chat_ids(tokenizer, CHAT)),
    ]:
        assert server.http.post("/tokenize", json=body).json()["tokens"] == ids
    page = server.http.get("/metrics").text
    assert 'diffgemma_requests_total{outcome="length"}' in page and "diffgemma_steps_per_canvas_bucket" in page


def test_the_front_end_has_loaded_no_torch(server):
    maps = Path(f"/proc/{server.process.pid}/maps").read_text()
    assert "tokenizers" in maps and "libtorch" not in maps


# -- load and faults ---------------------------------------------------------------------------------------------------

LONG = dict(model="tiny", max_tokens=900, stream=True, extra_body={"diffusion": {"canvas_length": 8}})


def test_a_full_queue_says_when_to_come_again(server, client):
    streams = [client.completions.create(prompt=[3, 4 + index], **LONG) for index in range(ROOM)]
    with pytest.raises(openai.RateLimitError) as refused:
        client.completions.create(prompt=[3], **LONG)
    assert 1 <= int(refused.value.response.headers["Retry-After"]) <= 60
    assert server.metric("requests_running") + server.metric("requests_waiting") == ROOM
    for stream in streams:
        stream.close()
    server.until("engine_slots_taken", lambda slots: slots == 0)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_client_that_leaves_frees_its_slot(server, stream):
    """Its connection is cut while a replica works for it."""
    server.until("engine_slots_taken", lambda slots: slots == 0)
    server.until("requests_running", lambda count: count == 0)
    before = server.metric('requests_total{outcome="cancelled"}')
    host, port = server.url.removeprefix("http://").split(":")
    body = json.dumps({"model": "tiny", "prompt": [3, 6], "max_tokens": 3000, "stream": stream}).encode()
    with socket.create_connection((host, int(port))) as raw:
        raw.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % len(body) + body
        )
        server.until("engine_slots_taken", lambda slots: slots == 1)
    server.until('requests_total{outcome="cancelled"}', lambda count: count == before + 1)
    server.until("engine_slots_taken", lambda slots: slots == 0)


def test_a_replica_that_is_killed_costs_nothing_but_time(split, server, client, network):
    """Half of the requests stream, and have had canvases when it happens."""
    told = threading.Semaphore(0)
    slow = {"diffusion": {"max_denoising_steps": 6, "confidence_threshold": 0.0, "canvas_length": 16}}
    sampler = network.sampler_defaults.with_overrides({"max_denoising_steps": 6, "confidence_threshold": 0.0})

    def ask(index: int) -> list[int]:
        given = dict(model="tiny", prompt=[9, index + 3], seed=index, max_tokens=640, extra_body=slow)
        if index % 2:
            return client.completions.create(**given).choices[0].diffusion["token_ids"]
        return served.streamed(client, told, **given)

    with ThreadPoolExecutor(6) as threads:
        answers = [threads.submit(ask, index) for index in range(6)]
        for _ in range(9):
            told.acquire(timeout=300)
        os.kill(split.replicas[0].pid, signal.SIGKILL)
        found = [answer.result() for answer in answers]
    assert "its connection has ended; 3 requests begin again" in server.log.read_text(), "noticed without a silence"
    assert server.metric("requests_replayed_total") > 0
    for index, tokens in enumerate(found):
        request = Request("", (9, index + 3), 640, 16, sampler, index)
        assert tokens == cases.alone(network, request)[0]
    split.replicas[0].communicate(60)
    split.replicas[0] = split.join()
    server.until("replicas", lambda count: count == 2)


def test_a_replica_that_was_away_comes_back_without_its_requests(split, server, client, network):
    """Stopped, as if the network between them were cut: it gets requests before its silence is noticed."""
    replays = server.metric("requests_replayed_total")
    os.kill(split.replicas[0].pid, signal.SIGSTOP)
    try:
        with ThreadPoolExecutor(6) as threads:
            given = dict(model="tiny", prompt=[9, 9], max_tokens=100, extra_body=QUICK)
            answers = [threads.submit(client.completions.create, **given, seed=seed) for seed in range(6)]
            for seed, answer in enumerate(answers):
                assert answer.result().choices[0].diffusion["token_ids"] == alone(network, [9, 9], seed, 100)
        assert server.metric("replicas") == 1 and server.metric("requests_replayed_total") > replays
    finally:
        os.kill(split.replicas[0].pid, signal.SIGCONT)
    server.until("replicas", lambda count: count == 2)
    server.until("engine_slots_taken", lambda slots: slots == 0)


def test_a_replica_that_is_told_to_end_answers_first(split, server, client, network):
    begun = threading.Semaphore(0)
    with ThreadPoolExecutor(4) as threads:
        given = dict(model="tiny", prompt=[9, 9], max_tokens=200, extra_body=QUICK)
        answers = [threads.submit(served.streamed, client, begun, **given, seed=seed) for seed in range(4)]
        assert begun.acquire(timeout=300)
        replays = server.metric("requests_replayed_total")
        os.kill(split.replicas[1].pid, signal.SIGTERM)
        for seed, answer in enumerate(answers):
            assert answer.result() == alone(network, [9, 9], seed, 200)
    assert server.metric("requests_replayed_total") == replays
    _, errors = split.replicas[1].communicate(60)
    assert split.replicas[1].returncode == 0, errors
