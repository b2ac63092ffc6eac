"""Many requests at a time: so many users who each ask again when answered, or arrivals that wait for nobody.

In an open load requests arrive at random with a mean rate (a Poisson process), however slow the answers are, and their
time begins when they should have been sent: a client that is late does not make the server look fast.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx

from nemo_diffgemma.errors import UserError
from nemo_diffgemma.serving.bench.calls import Call
from nemo_diffgemma.serving.bench.client import Record, ask


@dataclass(frozen=True)
class Load:
    """`requests` by `concurrency` users at a time, or at `rate` a second; one of the two is None."""

    requests: int
    concurrency: int | None = None
    rate: float | None = None

    @property
    def name(self) -> str:
        return f"{self.concurrency} at a time" if self.rate is None else f"{self.rate:g} a second"


@dataclass(frozen=True)
class Target:
    """A server, and what every request to it has besides its prompt."""

    url: str
    body: dict[str, Any]
    headers: dict[str, str]
    time_limit: float  # seconds of a request

    def client(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        return httpx.AsyncClient(base_url=self.url, headers=self.headers, timeout=None, limits=limits)

    def facts(self) -> dict[str, Any]:
        """What it says of its first model. Raises `UserError` where no such server answers."""
        try:
            answer = httpx.get(f"{self.url}/v1/models", headers=self.headers, timeout=30.0)
            if answer.status_code == 200:
                return answer.json()["data"][0]
            what = f"answers {answer.status_code}: {answer.text[:200]}"
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, IndexError) as error:
            what = f"is no server of ours ({type(error).__name__}: {error})"
        raise UserError(f"{self.url}/v1/models {what}; give url=http://host:port of a server, or checkpoint=...")

    def complete(self, prompts: Iterable[Call], seed: int) -> Iterator[Call]:
        """Requests with all that they need, each with a seed of its own."""
        for index, call in enumerate(prompts):
            yield call._replace(body={**self.body, **call.body, "seed": seed + index, "stream": True})


async def run(target: Target, load: Load, prompts: Iterable[Call], seed: int, tick: Callable[[], Any]) -> list[Record]:
    """Every request of a load; `tick` is called as each ends."""
    calls = itertools.islice(target.complete(prompts, seed), load.requests)
    async with target.client() as http:

        async def one(call: Call, began: float) -> Record:
            record = await ask(http, call, Record(began), target.time_limit)
            tick()
            return record

        if load.rate is not None:
            return await _open(one, calls, load.rate, random.Random(seed))
        return await _closed(one, calls, load.concurrency or 1)


async def _closed(one: Callable[[Call, float], Any], calls: Iterator[Call], users: int) -> list[Record]:
    records: list[Record] = []

    async def user() -> None:
        for call in calls:  # of all users: each takes the next
            records.append(await one(call, time.perf_counter()))

    await asyncio.gather(*(user() for _ in range(users)))
    return records


async def _open(
    one: Callable[[Call, float], Any], calls: Iterator[Call], rate: float, draw: random.Random
) -> list[Record]:
    due, tasks = time.perf_counter(), []
    for call in calls:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(one(call, due)))
        due += draw.expovariate(rate)
    return await asyncio.gather(*tasks)
