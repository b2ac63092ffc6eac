"""One streamed request, and when its canvases came."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

from nemo_diffgemma.serving.bench.calls import Call

_WAIT = 1.0  # seconds after a 429 that names none
_BRIEF = 200  # characters of an error


class _Failed(Exception):
    """What a server answers instead of tokens."""


@dataclass
class Record:
    """What became of a request. Times are seconds of `time.perf_counter`; waiting for a free place counts."""

    began: float
    canvases: list[float] = field(default_factory=list)  # when each came
    steps: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    ended: float = 0.0
    refused: int = 0  # times that the server said 429
    error: str | None = None  # why it has no whole answer

    @property
    def seconds(self) -> float:
        return self.ended - self.began


async def ask(http: httpx.AsyncClient, call: Call, record: Record, time_limit: float) -> Record:
    """Send a request and read its stream into `record`; after a 429 again, as late as the server says."""
    try:
        async with asyncio.timeout(time_limit):
            while not await _answered(http, call, record):
                record.refused += 1
    except TimeoutError:
        record.error = f"no answer in {time_limit:g} s"
    except _Failed as error:
        record.error = str(error)
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:  # the last three: no stream of this API
        record.error = f"{type(error).__name__}: {error}"[:_BRIEF]
    record.ended = time.perf_counter()
    return record


async def _answered(http: httpx.AsyncClient, call: Call, record: Record) -> bool:
    """False after a 429 and the wait that it asks for."""
    async with http.stream("POST", call.path, json=call.body) as response:
        if response.status_code == 429:
            await response.aread()
            wait = _seconds(response.headers.get("Retry-After"))
        elif response.status_code != 200:
            raise _Failed(f"{response.status_code}: {_message(json.loads(await response.aread()))}")
        else:
            await _read(response, record)
            return True
    await asyncio.sleep(wait)
    return False


def _seconds(text: str | None) -> float:
    try:
        return max(0.0, float(text or _WAIT))
    except ValueError:  # a date
        return _WAIT


async def _read(response: httpx.Response, record: Record) -> None:
    """Server-sent events up to the last."""
    name = ""
    async for line in response.aiter_lines():
        field, _, value = line.partition(": ")
        if not line:
            name = ""
        elif field == "event":
            name = value
        elif line == "data: [DONE]":
            return
        elif field == "data" and not name:
            _take(json.loads(value), record)
    raise _Failed("the stream ended before [DONE]")


def _take(chunk: dict[str, Any], record: Record) -> None:
    if "error" in chunk:
        raise _Failed(_message(chunk))
    for choice in chunk["choices"]:
        canvas = choice.get("diffusion", {})
        if "steps" in canvas:
            record.canvases.append(time.perf_counter())
            record.steps += canvas["steps"]
            record.tokens += len(canvas["token_ids"])
    if usage := chunk.get("usage"):
        record.prompt_tokens = usage["prompt_tokens"]
        record.cached_tokens = usage["prompt_tokens_details"]["cached_tokens"]


def _message(body: dict[str, Any]) -> str:
    return str(body["error"]["message"])[:_BRIEF]
