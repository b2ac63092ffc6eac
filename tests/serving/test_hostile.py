"""Requests made to hurt: bodies that are no JSON, a million errors in one, schemas of odd values, HTTP that is none."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import socket
from typing import Any

import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from starlette.responses import JSONResponse

from nemo_diffgemma.serving.api.replies import ErrorReply
from nemo_diffgemma.serving.constraints import ConstraintError, choice, json_of_schema, tool_calls
from nemo_diffgemma.serving.http_protocol import Protocol
from tests.serving.test_limits import BODIES, BODY, KINDS, World

JSON = {"Content-Type": "application/json"}
NO_JSON = ["NaN", "Infinity", "-Infinity", "1e400", '"\\ud800"', '"\\udc00\\ud800"', "[" * 100_000, "9" * 5000]


@pytest.fixture(scope="module")
def world():
    with World(max_body_mb=1.0) as made:
        yield made


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("name", ["user", "metadata", "temperature", "nobody_knows"])
def test_what_is_no_json_is_refused_wherever_it_stands(world, path, name):
    """Python's parser takes these, and the reply that tells one again cannot be written."""
    for value in NO_JSON:
        content = json.dumps(BODIES[path]).removesuffix("}") + f', "{name}": {{"a": [{value}]}}}}'
        answer = world.ask("POST", path, content=content, headers=JSON)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json"), (value, answer.text)


def test_bodies_are_utf_8_and_not_compressed(world):
    content = json.dumps(BODY)
    for encoding in ("utf-16", "utf-8-sig"):
        answer = world.ask("POST", "/v1/completions", content=content.encode(encoding), headers=JSON)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")
    headers = {**JSON, "Content-Encoding": "gzip"}
    answer = world.ask("POST", "/v1/completions", content=gzip.compress(content.encode()), headers=headers)
    assert answer.status_code == 415 and "Content-Encoding: gzip" in answer.json()["error"]["message"]


@pytest.mark.parametrize("body", KINDS)
def test_of_a_million_errors_few_are_collected(body):
    """Each is an object with a text: those of eight megabytes of wrong ids would take ten gigabytes."""
    wrong: list[Any] = [
        [value] * 500 for value in (0.5, "", {}, [], {"type": "text"}, {"role": "user", "content": [0]})
    ]
    wrong += [[7] * 500 + [0.5] * 500, [[0.5] * 500] * 500, {f"{number}": number for number in range(500)}]
    for value in wrong:
        given: dict[str, Any] = dict.fromkeys(body.model_fields, value)
        with pytest.raises(ValidationError) as caught:
            body.model_validate(given)
        assert caught.value.error_count() < 20 * len(given), value
    with pytest.raises(ValidationError) as caught:
        body.model_validate({f"field {number}": 0 for number in range(1000)})
    assert caught.value.error_count() < 20


def test_a_field_that_nobody_knows_is_named(world):
    for name in ("k0", "Prompt", "max tokens", "\u00fc", "a" * 1000):
        error = world.ask("POST", "/v1/completions", json={**BODY, name: 1}).json()["error"]
        assert (error["param"], error["code"]) == (name[:80], "unknown_parameter")
        assert error["message"] == f"{name[:80]} is no field that this server knows"
    error = world.ask("POST", "/v1/completions", json={**BODY, "diffusion": {"T1": 1}}).json()["error"]
    assert error["param"] == "diffusion.T1"


def test_of_several_kinds_the_one_that_was_meant_is_spoken_of(world):
    error = world.ask("POST", "/v1/completions", json={**BODY, "stop": ["a"] * 17}).json()["error"]
    assert error["param"] == "stop" and "at most 16 items" in error["message"]


def test_errors_are_short_whatever_they_repeat(world):
    for path, sent in (("/v1/completions", {**BODY, "prompt": [{"a" * 100_000: 0}]}), (f"/{'a' * 50_000}", BODY)):
        answer = world.ask("POST", path, json=sent)
        assert answer.status_code in (400, 404) and len(answer.content) < 3000


def test_of_a_large_body_the_same_is_said(world):
    """It is checked in a thread."""
    padding = {"user": "a" * 100_000}
    for path in BODIES:
        for wrong in ({"nobody": 1}, {"model": 3}, {"n": 0, "max_output_tokens": 0}, {"diffusion": {"regex": 1}}, {}):
            sent = {**BODIES[path], **wrong}
            small, large = (world.ask("POST", path, json={**more, **sent}) for more in ({}, padding))
            if path == "/tokenize":  # has no such field
                assert large.status_code == 400
            else:
                assert (small.status_code, small.json()) == (large.status_code, large.json()), (path, wrong)


# -- schemas -----------------------------------------------------------------------------------------------------------

KEYWORDS = (
    "$defs $id $ref $schema additionalProperties allOf anyOf const default definitions description enum examples "
    "exclusiveMaximum exclusiveMinimum format items maxItems maxLength maxProperties maximum minItems minLength "
    "minProperties minimum oneOf pattern prefixItems properties required title type uniqueItems x-a"
).split()
DIALECTS = [f"http://json-schema.org/draft-0{number}/schema#" for number in (3, 4, 6, 7)]
NUMBERS = [0, 1, -1, 2, 0.5, 1e308, 10**400, float("nan"), float("inf")]
TEXTS = ["a", "", "(", "object", "array", "string", "integer", "null", "date", "http://[", *DIALECTS]
PLACES = ["#", "#/$defs/a", "#/examples/0", "#/enum/0", "#/const", "#/properties/a/items", "#/x-a", "#/-1", "urn:a"]
ODD = st.sampled_from([None, True, False, *NUMBERS, *TEXTS, *PLACES])
SCHEMAS = st.recursive(
    ODD | st.just({}),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*KEYWORDS, "a"]), inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(st.sampled_from(KEYWORDS), SCHEMAS, max_size=4))
def test_whatever_is_sent_as_a_schema_is_one_or_is_refused(schema):
    for make in (json_of_schema, lambda parameters: tool_calls([_tool(parameters)], parallel=True)):
        with contextlib.suppress(ConstraintError):
            make(schema)


def _tool(parameters: Any, name: str = "f") -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


@pytest.mark.parametrize(
    "schema, what",
    [
        ({"$ref": "#/examples/0", "examples": [{"type": "object", "required": 5}]}, "where no schema stands"),
        ({"$ref": "#/$defs", "$defs": {"type": {}}}, "where no schema stands"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$id": "http://x/y", "items": {"$ref": "#"}}}}, "has '\\$id' within"),
        ({"enum": [[], {}] * 5000}, "10000 values"),
        ({"$defs": {"a": {"required": [[]] * 5000}}}, "5000 values"),
        ({"$defs": {str(number): {} for number in range(30_000)}}, "more than 20000 objects"),
        ({"type": "integer", "minimum": 10**4000}, "below 1e308"),
        ({"$schema": ["a"]}, "the address of a dialect"),
    ],
)
def test_schemas_that_would_take_long_or_mean_something_else_are_refused(schema, what):
    with pytest.raises(ConstraintError, match=what):
        json_of_schema(schema)


def test_long_lists_of_values_take_no_square_of_their_length():
    """Twenty thousand values took minutes, in the process that serves everybody."""
    values = list(range(20_000))
    assert json_of_schema({"enum": values}).expression.count("|") == len(values) - 1
    assert json_of_schema({"enum": [*values, "a"][:1001], "type": "integer"}).expression.count("|") == 1000
    assert json_of_schema({"enum": values[:50], "minimum": 40, "const": 45}).expression.count("45") == 1
    assert choice(["a", "b"] * 50_000).expression == choice(["a", "b"]).expression
    with pytest.raises(ConstraintError, match="300000 characters; expected at most 200000"):
        choice(["abc"] * 100_000)
    anything = {"type": "object", "properties": {"a": {"type": "object"}}}
    with pytest.raises(ConstraintError, match="offer fewer"):
        tool_calls([_tool(anything, f"f{number}") for number in range(500)], parallel=True)


# -- HTTP --------------------------------------------------------------------------------------------------------------


class _Impatient(Protocol):
    head_seconds = 0.2


async def _said_to(*sent: bytes, pause: float = 0.02) -> bytes:
    """What a server says to a client that sends this, with pauses, until the connection ends."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        await JSONResponse({"path": scope["path"]})(scope, receive, send)

    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, http=_Impatient, log_level="critical", lifespan="off", timeout_keep_alive=60)
    server = uvicorn.Server(config)
    task = asyncio.create_task(server._serve([listener]))
    reader, writer = await asyncio.open_connection(*listener.getsockname())
    said, pieces = b"", iter(sent)
    try:
        while True:
            try:
                async with asyncio.timeout(pause):
                    part = await reader.read(65536)
                if not part:
                    return said
                said += part
            except TimeoutError:
                if (content := next(pieces, None)) is not None:
                    writer.write(content)
    finally:
        writer.close()
        server.should_exit = True
        await task


def _error(reply: bytes) -> tuple[int, str]:
    head, _, body = reply.partition(b"\r\n\r\n")
    assert b"content-type: application/json" in head and b"connection: close" in head
    return int(head.split()[1]), ErrorReply.model_validate_json(body).error.message


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\r\n",
        b"nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\n" + b"A: b\r\n" * 12_000,
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
        b"GET /page/../../etc/passwd\x00 HTTP/1.1\r\nHost: a\r\n\r\n",
    ],
)
def test_what_is_no_http_is_refused_in_the_format_of_errors(sent):
    status, message = _error(asyncio.run(_said_to(sent)))
    assert status == 400 and "no valid HTTP/1.1 request" in message


def test_a_client_that_never_asks_is_let_go():
    assert asyncio.run(_said_to()) == b""
    status, message = _error(asyncio.run(_said_to(b"GET / HTTP/1.1\r\n", b"A: b\r\n")))
    assert status == 408 and "the head of the request did not arrive" in message
    with contextlib.suppress(ConnectionError):  # whoever writes on may miss what is said
        assert asyncio.run(_said_to(b"GET / HTTP/1.1\r\n", *[b"A: b\r\n"] * 10_000))


def test_what_comes_behind_a_reply_is_not_waited_for():
    asked = b"GET /a HTTP/1.1\r\nHost: a\r\n\r\n"
    replies = asyncio.run(_said_to(asked, asked, b"GET"))
    assert replies.count(b'{"path":"/a"}') == 2 and b" 408 " in replies
