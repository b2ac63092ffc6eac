"""Who may ask: keys are checked before a body is read. In this process, without a replica."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_diffgemma.serving.api.app import create_app
from nemo_diffgemma.serving.api.fields import ChatBody, CompletionBody, TokenizeBody
from nemo_diffgemma.serving.api.infill_body import InfillBody
from nemo_diffgemma.serving.api.replies import ErrorReply
from nemo_diffgemma.serving.api.responses_body import ResponsesBody
from nemo_diffgemma.serving.metrics import Metrics
from nemo_diffgemma.serving.router import Router
from nemo_diffgemma.serving.settings import FrontSettings


class World:
    """The application of a server that has no replica yet."""

    def __init__(self, **settings: Any) -> None:
        self._runner = asyncio.Runner()
        self._runner.run(self._begin(settings))

    async def _begin(self, settings: dict[str, Any]) -> None:
        given = dict(host="", port=0, names=["m"], replicas=[], environments=[], max_body_mb=1e-3)
        made, metrics = FrontSettings(**{**given, **settings}), Metrics()
        self.router = Router(made, metrics)
        transport = httpx.ASGITransport(create_app(self.router, made, metrics), raise_app_exceptions=False)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://server")

    def ask(self, method: str, path: str, **given: Any) -> httpx.Response:
        return self._runner.run(self.client.request(method, path, **given))

    def __enter__(self) -> World:
        return self

    def __exit__(self, *error: object) -> None:
        self._runner.run(self.client.aclose())
        self._runner.run(self.router.close())
        self._runner.close()


def ask(method: str, path: str, keys: list[str], seconds: float = 600.0, **given: Any) -> httpx.Response:
    """One request."""
    with World(api_keys=keys, request_seconds=seconds) as world:
        return world.ask(method, path, **given)


BODY = {"model": "m", "prompt": "a"}


@pytest.mark.parametrize(
    "given, status",
    [
        (None, 401),
        ("Bearer two", 503),
        ("bearer  one", 503),
        ("Bearer", 401),
        ("Bearer o", 401),
        ("Bearer one two", 401),
        ("Basic one", 401),
        ("Bearer \u00fc", 401),
    ],
)
def test_one_of_the_keys_opens(given, status):
    headers = {} if given is None else {"Authorization": given.encode("latin-1")}
    answer = ask("POST", "/v1/completions", ["one", "two"], json=BODY, headers=headers)
    assert answer.status_code == status
    assert answer.json()["error"]["type"] == ("authentication_error" if status == 401 else "server_error")


@pytest.mark.parametrize("path", ["/v1/models", "/tokenize", "/openapi.json", "/nothing"])
def test_without_a_key_only_health_and_figures_are_told(path):
    assert ask("GET", path, ["one"]).status_code == 401
    assert ask("GET", "/health", ["one"]).status_code == 503
    assert ask("GET", "/metrics", ["one"]).status_code == 200


def test_heads_are_those_of_get():
    for path in ("/health", "/metrics", "/", "/v1/models", "/nothing"):
        alone, whole = (ask(method, path, []) for method in ("HEAD", "GET"))
        assert (alone.status_code, alone.headers["content-type"]) == (whole.status_code, whole.headers["content-type"])
    assert ask("HEAD", "/v1/completions", []).status_code == 405


def test_a_body_too_large_is_not_read(path="/v1/completions"):
    assert ask("POST", path, [], json={**BODY, "prompt": "a" * 2000}).status_code == 413
    assert ask("POST", path, ["one"], json={**BODY, "prompt": "a" * 2000}).status_code == 401


def test_a_body_that_does_not_arrive_ends_in_the_time_limit():
    async def pieces() -> AsyncIterator[bytes]:
        yield b'{"model": "m", '
        await asyncio.sleep(60)

    answer = ask("POST", "/v1/completions", [], 0.2, content=pieces())
    assert answer.status_code == 408 and "did not arrive in 0.2 s" in answer.json()["error"]["message"]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["\ud800", "m"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
BODIES = {
    "/v1/completions": {"model": "m", "prompt": "a"},
    "/v1/chat/completions": {"model": "m", "messages": [{"role": "user", "content": "a"}]},
    "/v1/responses": {"model": "m", "input": "a"},
    "/v1/infill": {"model": "m", "text": ["a", {"hole": 3}]},
    "/tokenize": {"prompt": "a"},
}
KINDS = (CompletionBody, ChatBody, TokenizeBody, ResponsesBody, InfillBody)
FIELDS = sorted({name for body in KINDS for name in body.model_fields})


@pytest.mark.parametrize("path", BODIES)
def test_whatever_is_sent_gets_an_error_in_the_format(path):
    """Of a server without a replica yet, so that what is right gets 503."""

    @given(st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=5), VALUES, max_size=3), st.data())
    def check(changes: dict[str, object], data: st.DataObject) -> None:
        content = json.dumps({**BODIES[path], **changes})
        if data.draw(st.booleans()):
            content = content[: data.draw(st.integers(0, len(content)))]
        answer = world.ask("POST", path, content=content, headers={"Content-Type": "application/json"})
        error = ErrorReply.model_validate_json(answer.content, strict=True).error
        assert answer.status_code in (400, 404, 413, 503) and error.message, (content, answer.text)
        assert (error.type == "server_error") == (answer.status_code == 503)

    with World() as world:
        check()


def test_pages_of_other_hosts_may_not_ask():
    headers = {"Origin": "https://elsewhere.example", "Access-Control-Request-Method": "POST"}
    answer = ask("OPTIONS", "/v1/completions", [], headers=headers)
    assert answer.status_code == 405 and not [name for name in answer.headers if name.startswith("access-control")]


def test_the_schema_has_the_extensions():
    schema = ask("GET", "/openapi.json", []).json()
    fields = schema["components"]["schemas"]
    assert {"canvas_length", "entropy_bound", "t_min"} <= fields["Diffusion"]["properties"].keys()
    assert {"token_ids", "steps", "canvases", "seed"} == fields["AnswerDiffusion"]["properties"].keys()
    for path in ("/v1/chat/completions", "/v1/completions"):
        assert "text/event-stream" in schema["paths"][path]["post"]["responses"]["200"]["content"]
    references = set(re.findall(r'"\$ref": "([^"]*)"', json.dumps(schema)))
    assert references == {f"#/components/schemas/{name}" for name in fields}, "each leads somewhere, none is left over"
