"""Replicas that are sockets and say what is asked, and a router for them."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import zmq.asyncio

from nemo_diffgemma.diffusion.sampler_config import SamplerConfig
from nemo_diffgemma.serving import messages
from nemo_diffgemma.serving.job import Job
from nemo_diffgemma.serving.messages import Beat, Facts, Hello
from nemo_diffgemma.serving.metrics import Metrics
from nemo_diffgemma.serving.request import Finished, Reason, Request, Settled
from nemo_diffgemma.serving.router import Router
from nemo_diffgemma.serving.settings import FrontSettings

FACTS = Facts(500, 32, 4096, 4, 8, 2, SamplerConfig(), "", "one process", "cpu")


class Fake:
    """A replica of few words."""

    def __init__(self, address: str, name: str, facts: Facts = FACTS) -> None:
        self.name, self.facts = name, facts
        self.socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.identity = name.encode()
        self.socket.connect(address)

    async def say(self, *said: Any) -> None:
        for message in said:
            await self.socket.send(messages.encode(message))

    async def hear(self, kind: type) -> Any:
        """The next message of a kind."""
        while True:
            message = messages.of_front(await asyncio.wait_for(self.socket.recv(), 10))
            if isinstance(message, kind):
                return message

    async def hears_nothing(self, kind: type, seconds: float = 0.2) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                raise AssertionError(await self.hear(kind))

    async def live(self) -> None:
        """Heartbeats."""
        while True:
            await self.say(Beat(0, 0, 0, 0.0))
            await asyncio.sleep(0.2)


class World:
    """A router with some replicas, which beat until they are killed."""

    def __init__(self, address: str, **settings: Any) -> None:
        given = dict(host="", port=0, names=["m"], replicas=[], environments=[], silent_seconds=1.0)
        self.address, self.dead, self.hearts = address, [], {}
        self.router = Router(FrontSettings(**{**given, **settings}), Metrics(), self.dead.append)
        self.router.listen([address])

    async def join(self, name: str, facts: Facts = FACTS) -> Fake:
        replica = Fake(self.address, name, facts)
        await replica.say(Hello(name, facts))
        self.hearts[name] = asyncio.create_task(replica.live())
        await replica.hear(messages.Welcome)
        return replica

    def kill(self, replica: Fake) -> None:
        self.hearts[replica.name].cancel()

    def ask(self, prompt: tuple[int, ...] = (1, 2), **given: Any) -> Job:
        return self.router.submit([Request(uuid.uuid4().hex, prompt, 64, 32, **given)])[0]


def play_in(folder: Path, scene: Callable[[World], Coroutine[Any, Any, None]], **settings: Any) -> None:
    """Run a scene in a world of its own."""

    async def whole() -> None:
        world = World(f"ipc://{folder}/router", **settings)
        try:
            await scene(world)
        finally:
            for heart in world.hearts.values():
                heart.cancel()
            await world.router.close()
            zmq.asyncio.Context.instance().destroy()  # with the sockets of all replicas

    asyncio.run(asyncio.wait_for(whole(), 30))


def finished(id: str, reason: Reason = Reason.LENGTH, error: str | None = None) -> Finished:
    return Finished(id, reason, 2, 0, error)


async def rest(job: Job) -> list[int]:
    """Tokens of a job until it ends."""
    tokens = []
    while not isinstance(event := await job.next(), Finished):
        tokens += event.tokens if isinstance(event, Settled) else []
    return tokens
