"""What goes wrong around a server: clients that leave, do not read, or send nonsense; replicas that hang; crowds."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from nemo_diffgemma.serving.request import Request
from tests.serving import cases, served

ENGINE = dict(context_gb=0.02, typical_tokens=700, max_running=3, tokens_per_pass=600)
QUICK = {"max_denoising_steps": 3, "entropy_bound": 20.0, "canvas_length": 16}


@pytest.fixture(scope="module")
def network(single):
    return cases.network()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, network) -> Path:
    return served.write_checkpoint(tmp_path_factory.mktemp("faults") / "model")


@pytest.fixture(scope="module")
def split(checkpoint) -> Iterator[served.Split]:
    """One replica of three slots; ten may wait."""
    made = served.Split(checkpoint, 1, ENGINE, queue_limit=10)
    made.ready(1)
    yield made
    made.close()


@pytest.fixture(scope="module")
def server(split):
    return split.server


def alone(network: Any, seed: int, max_tokens: int, prompt: tuple[int, ...] = (9, 9)) -> list[int]:
    given = {name: value for name, value in QUICK.items() if name != "canvas_length"}
    sampler = network.sampler_defaults.with_overrides(given)
    return cases.alone(network, Request("", prompt, max_tokens, QUICK["canvas_length"], sampler, seed))[0]


def body(seed: int = 0, max_tokens: int = 40, **given: Any) -> dict[str, Any]:
    return {"model": "default", "prompt": [9, 9], "seed": seed, "max_tokens": max_tokens, "diffusion": QUICK, **given}


def connection(server: served.Server, content: bytes, receive_buffer: int | None = None) -> socket.socket:
    """A client by hand: it has sent a POST of /v1/completions, and reads nothing."""
    host, port = server.url.removeprefix("http://").split(":")
    raw = socket.socket()
    if receive_buffer is not None:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    raw.settimeout(300)
    raw.connect((host, int(port)))
    head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nConnection: close\r\n"
    raw.sendall(head + b"Content-Length: %d\r\n\r\n" % len(content) + content)
    return raw


def read(raw: socket.socket) -> bytes:
    """All that a server says until it closes."""
    parts = []
    while part := raw.recv(1 << 16):
        parts.append(part)
    return b"".join(parts)


def events(raw: bytes) -> list[Any]:
    """Of a stream, however its bytes were cut into chunks of HTTP."""
    head, _, rest = raw.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200"), head
    content = b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        content, rest = content + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
    lines = [line.removeprefix(b"data: ") for line in content.splitlines() if line.startswith(b"data: ")]
    return [line if line == b"[DONE]" else json.loads(line) for line in lines]


def resident(pid: int) -> float:
    """Megabytes that a process holds."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6


def test_a_reader_that_does_not_read_holds_up_nobody_and_misses_no_token(server, network):
    """Its slots are free when its answers are made, which wait for it. That drafts do not pile up is tested of jobs."""
    count, sampler = 4, {"max_denoising_steps": 48, "confidence_threshold": 0.0}
    asked = body(0, 200, n=count, stream=True, stream_options={"drafts": True}, diffusion=sampler)
    with connection(server, json.dumps(asked).encode(), receive_buffer=2048) as raw:
        answer = server.http.post("/v1/completions", json=body(1)).json()
        assert answer["choices"][0]["diffusion"]["token_ids"] == alone(network, 1, 40)
        server.until("requests_running", lambda running: running == 0)
        server.until("engine_slots_taken", lambda slots: slots == 0)
        heard = events(read(raw))
    tokens: list[list[int]] = [[] for _ in range(count)]
    steps, drafts = 0, sum("draft" in event.get("diffusion", {}) for event in heard[:-1])
    for choice in [choice for event in heard[:-1] for choice in event["choices"]]:
        tokens[choice["index"]] += choice.get("diffusion", {}).get("token_ids", [])
        steps += choice.get("diffusion", {}).get("steps", 0)
    for seed in range(count):
        request = Request("", (9, 9), 200, cases.CANVAS, network.sampler_defaults.with_overrides(sampler), seed)
        assert tokens[seed] == cases.alone(network, request)[0]
    assert 0 < drafts <= steps and heard[-1] == b"[DONE]"


def test_a_crowd_is_answered_or_told_to_come_again(server, network):
    """Many connections at once, for which there is no room: each gets its own answer or 429."""
    expected = {seed: alone(network, seed, 40) for seed in range(4)}
    found = asyncio.run(crowd(server.url, 60, lambda index: body(index % 4)))
    for index, answer in enumerate(found):
        if answer.status_code == 200:
            assert answer.json()["choices"][0]["diffusion"]["token_ids"] == expected[index % 4]
        else:
            assert answer.status_code == 429 and int(answer.headers["Retry-After"]) >= 1
    kinds = Counter(answer.status_code for answer in found)
    assert kinds[200] >= 13, kinds
    server.until("requests_running", lambda count: count == 0)


async def crowd(url: str, count: int, make: Any) -> list[httpx.Response]:
    """So many requests, each by a connection of its own, all open before the first is asked."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=500, limits=limits) as client:
        opened = asyncio.Barrier(count)

        async def one(index: int) -> httpx.Response:
            content = json.dumps(make(index)).encode()

            async def pieces() -> Any:
                yield content[:5]
                await opened.wait()
                yield content[5:]

            return await client.post("/v1/completions", content=pieces(), headers={"Content-Type": "application/json"})

        return await asyncio.gather(*(one(index) for index in range(count)))


@pytest.mark.parametrize("depth", [400, 900, 100_000])
@pytest.mark.parametrize("place", ["metadata", "n", "prompt", "nobody_knows"])
def test_json_however_deep_is_answered(server, place, depth):
    """Where it is no field's business it does no harm; else it is refused."""
    deep = '{"a":' * depth + "1" + "}" * depth
    content = json.dumps(body(max_tokens=1)).removesuffix("}") + f', "{place}": {deep}}}'
    answer = server.http.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code in ((200, 400) if place == "metadata" else (400,)), answer.text
    assert answer.status_code == 200 or answer.json()["error"]["type"] == "invalid_request_error"


def test_more_answers_than_there_is_ever_room_for_are_refused(server):
    for n in (14, 128, 129, 10**9, 10**30):
        answer = server.http.post("/v1/completions", json=body(n=n))
        assert answer.status_code == 400 and answer.json()["error"]["message"], n


def test_ten_megabytes_are_refused_by_their_length_or_as_they_come(server):
    content = json.dumps(body(prompt="a" * 10_000_000)).encode()
    for sent in (content, (content[at : at + 65536] for at in range(0, len(content), 65536))):
        answer = server.http.post("/v1/completions", content=sent, headers={"Content-Type": "application/json"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")


def test_a_replica_that_hangs_lets_every_request_end_in_its_time_limit(checkpoint):
    """Stopped, it neither answers nor ends: whole answers get 504, streams an error, and what waits when the server is
    told to end gets 503."""
    split = served.Split(checkpoint, 1, ENGINE, request_seconds=4.0, drain_seconds=1.0)
    try:
        server = split.ready(1)
        raw = connection(server, json.dumps(body(0, 3000, stream=True)).encode())
        assert raw.recv(1 << 16).startswith(b"HTTP/1.1 200")
        os.kill(split.replicas[0].pid, signal.SIGSTOP)
        answer = server.http.post("/v1/completions", json=body(1))
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
        assert b"not answered in 4 s" in read(raw)
        with ThreadPoolExecutor(1) as threads:
            last = threads.submit(server.http.post, "/v1/completions", json=body(2))
            over = ("requests_waiting", 'requests_total{outcome="failed"}')
            server.until("requests_running", lambda count: count + sum(map(server.metric, over)) == 3)
            assert server.stop() == 0
            assert last.result().status_code in (503, 504)
    finally:
        split.close()


# -- at length ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def launched(checkpoint) -> Iterator[served.Server]:
    """As a user starts it, with two replicas and room for all that the next tests ask at once."""
    made = served.launched(
        checkpoint, "replicas=2", "queue_limit=600", "engine.context_gb=0.02", "engine.typical_tokens=700"
    )
    made.wait()
    made.until("replicas", lambda count: count == 2)
    yield made
    made.close()


@pytest.mark.slow
def test_five_hundred_connections_at_once_are_answered(launched, network):
    expected = {seed: alone(network, seed, 40) for seed in range(8)}
    found = asyncio.run(crowd(launched.url, 500, lambda index: body(index % 8)))
    assert [answer.status_code for answer in found] == 500 * [200]
    for index, answer in enumerate(found):
        assert answer.json()["choices"][0]["diffusion"]["token_ids"] == expected[index % 8]


@pytest.mark.slow
def test_a_replica_killed_under_load_loses_nothing(launched, network):
    """Three times 100 requests, and kill -9 of a replica behind the tenth answer; it is started again each time."""
    expected = {seed: alone(network, seed, 120) for seed in range(6)}

    def ask(index: int) -> list[int]:
        answer = launched.http.post("/v1/completions", json=body(index % 6, 120))
        return answer.json()["choices"][0]["diffusion"]["token_ids"]

    for _ in range(3):
        replicas, replays = both(launched), launched.metric("requests_replayed_total")
        with ThreadPoolExecutor(24) as threads:
            for index, tokens in enumerate(threads.map(ask, range(100))):
                assert tokens == expected[index % 6]
                if index == 10:
                    os.kill(replicas[0], signal.SIGKILL)
        assert launched.metric("requests_replayed_total") > replays
    assert launched.metric('requests_total{outcome="failed"}') == 0


def both(server: served.Server) -> list[int]:
    """Processes of its two replicas, when they serve."""
    server.until("replicas", lambda count: count == len(server.children()) == 2)
    return server.children()


@pytest.mark.slow
def test_two_thousand_requests_leave_memory_flat(launched):
    """Of all kinds: answers whole and streamed, refusals, and clients that leave. What a process holds is what it held
    after the first few hundred."""
    pids = [launched.process.pid, *both(launched)]

    def ask(index: int) -> None:
        kind, seed = index % 5, index % 50
        if kind == 0:
            with launched.http.stream("POST", "/v1/completions", json=body(seed, 3000, stream=True)) as stream:
                next(stream.iter_bytes())  # and leave
        elif kind == 1:
            assert launched.http.post("/v1/completions", json=body(seed, prompt="a" * index, n=0)).status_code == 400
        elif kind == 2:
            options = {"drafts": True, "include_usage": True}
            text = launched.http.post("/v1/completions", json=body(seed, stream=True, stream_options=options)).text
            assert text.endswith("data: [DONE]\n\n")
        else:
            prompt = [3 + (index * place) % 400 for place in range(index % 300 + 1)]
            assert launched.http.post("/v1/completions", json=body(seed, prompt=prompt)).status_code == 200

    held = []
    with ThreadPoolExecutor(16) as threads:
        for hundreds in range(24):
            list(threads.map(ask, range(100 * hundreds, 100 * hundreds + 100)))
            held.append([resident(pid) for pid in pids])
    print("MB of the front end and its replicas:", [[round(x, 1) for x in one] for one in held])
    for before, after in zip(held[3], held[-1], strict=True):
        assert after - before < 16, held
    launched.until("engine_slots_taken", lambda slots: slots == 0)
