"""Who may ask: keys are checked before a body is read. In this process, without a replica."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from nemo_diffgemma.serving.api.app import create_app
from nemo_diffgemma.serving.metrics import Metrics
from nemo_diffgemma.serving.router import Router
from nemo_diffgemma.serving.settings import FrontSettings


def ask(method: str, path: str, keys: list[str], **given: object) -> httpx.Response:
    """One request to a server that has no replica yet."""

    async def run() -> httpx.Response:
        settings = FrontSettings(
            host="", port=0, names=["m"], replicas=[], environments=[], api_keys=keys, max_body_mb=1e-3
        )
        metrics = Metrics()
        router = Router(settings, metrics)
        transport = httpx.ASGITransport(create_app(router, settings, metrics), raise_app_exceptions=False)
        try:
            async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
                return await client.request(method, path, **given)  # type: ignore[arg-type]
        finally:
            await router.close()

    return asyncio.run(run())


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


def test_a_body_too_large_is_not_read(path="/v1/completions"):
    assert ask("POST", path, [], json={**BODY, "prompt": "a" * 2000}).status_code == 413
    assert ask("POST", path, ["one"], json={**BODY, "prompt": "a" * 2000}).status_code == 401


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
