"""The front end's half of ZeroMQ: which replica gets a request, and what happens when one dies. asyncio, no torch.

A request goes to a replica that has room for it and a free slot, of these to the one that has most of its prompt in its
prefix cache, of these to the one with the fewest requests.

A replica whose process or connection has ended, which is noticed within a second, is lost: its requests begin again on
another one, or wait for the next. One that is silent for some seconds may be busy, stopped or cut off: its requests
move to another, where there is one, and stay with it where there is none. Only silence that lasts, or a pass that does
not end, gives it up.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence

import msgspec
import zmq
import zmq.asyncio

from nemo_diffgemma.serving.failures import Failure, InvalidRequest, Overloaded, TimedOut, Unavailable
from nemo_diffgemma.serving.job import Job, Replica
from nemo_diffgemma.serving.messages import (
    Beat,
    Cancel,
    Drain,
    Event,
    Events,
    Facts,
    Farewell,
    Hello,
    Ping,
    Refused,
    TextFiles,
    ToFront,
    ToReplica,
    Unknown,
    Welcome,
    encode,
    of_replica,
)
from nemo_diffgemma.serving.metrics import Metrics
from nemo_diffgemma.serving.prefix_keys import keys_of
from nemo_diffgemma.serving.request import Finished, Reason, Request, Settled
from nemo_diffgemma.serving.settings import FrontSettings
from nemo_diffgemma.serving.text import ServedText

_TICK = 0.5  # seconds
_REPLAYS = 2  # of one request, after ends of replicas: it may be what they die of
_MOVES = 2  # of one request, away from replicas that are silent: where all are slow, it must stay somewhere
_log = logging.getLogger(__name__)


class Router:
    """`on_ready` and `on_dead` hear the names of replicas that begin to serve and that are given up.

    Without a replica yet, `facts` is None.
    """

    def __init__(
        self,
        settings: FrontSettings,
        metrics: Metrics,
        on_dead: Callable[[str], None] = lambda name: None,
        on_ready: Callable[[str], None] = lambda name: None,
    ) -> None:
        self._settings, self._metrics, self._on_dead, self._on_ready = settings, metrics, on_dead, on_ready
        self.facts: Facts | None = None
        self.text: ServedText | None = None
        self.ready = asyncio.Event()  # the first replica has said what it serves
        self.replicas: dict[bytes, Replica] = {}
        self.jobs: dict[str, Job] = {}
        self._unplaced: deque[Job] = deque()  # while there is no replica
        self._finished: deque[float] = deque(maxlen=32)  # times, for Retry-After
        self._ended: set[str] = set()  # replicas of which the first process has ended
        self._closing = False
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.sndhwm = self._socket.rcvhwm = 0  # the queue is limited; nothing may be dropped
        self._socket.router_mandatory = True  # to send to a peer whose connection has ended is an error
        self._socket.linger = 500
        self._tasks: list[asyncio.Task[None]] = []

    def listen(self, addresses: Sequence[str]) -> None:
        """Begin to hear replicas at these addresses. Raises `zmq.ZMQError`."""
        for address in addresses:
            self._socket.bind(address)
        self._tasks = [asyncio.create_task(self._hear()), asyncio.create_task(self._watch())]

    async def close(self) -> None:
        """Tell the replicas to end, and end."""
        self.abandon()
        for replica in self.replicas.values():
            self._send(replica.identity, Drain())
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._socket.close()
        self._context.term()

    def abandon(self) -> None:
        """Take nothing more; what is not answered never will be."""
        self._closing = True
        for job in list(self.jobs.values()):
            self._end(job, Unavailable("the server ends"))

    # -- requests --------------------------------------------------------------------------------------------------

    def submit(self, requests: Sequence[Request]) -> list[Job]:
        """Send requests of one client on their way, all or none.

        Raises `Overloaded`, `Unavailable`, or `InvalidRequest` for more than there is ever room for.
        """
        if self._closing or self.facts is None:
            raise Unavailable("the server ends" if self._closing else "the server is loading the model")
        room = self.check_room(len(requests))
        if len(self.jobs) + len(requests) > room:
            wait = self._retry_after(len(self.jobs) + len(requests) - room)
            self._metrics.refused.inc(len(requests))
            raise Overloaded(f"{len(self.jobs)} requests are running or waiting; try again in {wait} s", wait)
        now = time.monotonic()
        tile = self.facts.tile
        jobs = [Job(one, keys_of(one.prompt, tile, salt=one.adapter or ""), now) for one in requests]
        for job in jobs:
            self.jobs[job.id] = job
            self._place(job)
        return jobs

    def check_room(self, answers: int) -> int:
        """How many answers there ever is room for. Raises `InvalidRequest` where so many at once are more."""
        room = sum(replica.facts.max_running for replica in self.replicas.values()) + self._settings.queue_limit
        if self.replicas and answers > room:
            raise InvalidRequest(f"{answers} answers at once; this server has room for {room}")
        return room

    def cancel(self, job: Job) -> None:
        """Nobody waits for it."""
        if not job.is_over:
            self._metrics.requests.labels("cancelled").inc()
            self._remove(job)

    def _retry_after(self, excess: int) -> int:
        """Seconds until so many requests more have ended, at the rate of late."""
        if len(self._finished) < 2:
            return 1
        rate = (len(self._finished) - 1) / max(1e-3, time.monotonic() - self._finished[0])
        return min(60, max(1, math.ceil(excess / rate)))

    def _place(self, job: Job) -> None:
        able = [replica for replica in self.replicas.values() if replica.is_able and replica.has_room(job)]
        if not able:
            self._unplaced.append(job)
            return
        best = max(able, key=lambda one: (one.has_free_slot, one.known(job.keys), -len(one.jobs)))
        best.take(job)
        self._send(best.identity, job.request)

    def _remove(self, job: Job) -> None:
        """It is over, or must be where it is."""
        job.is_over = True
        self.jobs.pop(job.id, None)
        with contextlib.suppress(ValueError):
            self._unplaced.remove(job)
        if job.replica is not None and job.replica.jobs.pop(job.request.id, None) is not None:
            self._send(job.replica.identity, Cancel(job.request.id))

    def _end(self, job: Job, failure: Failure) -> None:
        self._metrics.requests.labels("failed").inc()
        self._remove(job)
        job.fail(failure)

    # -- replicas --------------------------------------------------------------------------------------------------

    def _send(self, identity: bytes, message: ToReplica) -> None:
        # done at once: there is no limit to wait for
        sent = asyncio.ensure_future(self._socket.send_multipart([identity, encode(message)]))
        if sent.done() and sent.exception() is not None and identity in self.replicas:
            self.replicas[identity].is_cut = True

    async def _hear(self) -> None:
        while True:
            identity, *frames = await self._socket.recv_multipart()
            try:
                self._take(identity, of_replica(b"".join(frames)))
            except msgspec.DecodeError as error:
                _log.warning("what came is no message of a replica: %s", error)
            except Exception:  # a defect; others are still to be heard
                _log.exception("a message of a replica could not be taken")

    def _take(self, identity: bytes, message: ToFront) -> None:
        replica = self.replicas.get(identity)
        if isinstance(message, Hello):
            self._greet(identity, message)
        elif isinstance(message, TextFiles):
            self._tasks.append(asyncio.create_task(self._read(message)))  # which may take longer than a heartbeat
        elif replica is None:
            if not isinstance(message, Farewell):
                self._send(identity, Unknown())
        else:
            self._heard(replica)
            if isinstance(message, Beat):
                replica.beat = message
            elif isinstance(message, Events):
                for event in message.events:
                    self._happened(replica, event)
            elif message.draining:
                replica.draining = True
            else:
                self._give_up(replica, message.why)

    async def _read(self, files: TextFiles) -> None:
        if self.text is None:
            self.text = await asyncio.to_thread(ServedText, files)
        self.ready.set()

    def _greet(self, identity: bytes, hello: Hello) -> None:
        """A replica begins, or one that was given up or cut off comes back: it has forgotten its requests."""
        if identity in self.replicas:  # it said so again before it heard that it is welcome
            return
        if hello.name in self._ended:
            self._send(identity, Drain())
            return
        self.facts = self.facts or hello.facts
        ours, theirs = (
            msgspec.structs.replace(facts, context_tokens=0, cached_tiles=0, max_running=0, layout="", device="")
            for facts in (self.facts, hello.facts)
        )
        if ours != theirs:
            _log.error("replica %s has another model than this server; it gets no requests", hello.name)
            return
        most = max(self.facts.context_tokens, hello.facts.context_tokens)
        self.facts = msgspec.structs.replace(self.facts, context_tokens=most)
        self.replicas[identity] = Replica(identity, hello.name, hello.facts, time.monotonic())
        self._on_ready(hello.name)
        self._send(identity, Welcome(wants_text=bool(hello.facts.text) and self.text is None))
        if not hello.facts.text:
            self.ready.set()
        self._place_waiting()

    def _place_waiting(self) -> None:
        waiting, self._unplaced = self._unplaced, deque()
        for job in waiting:
            self._place(job)

    def _happened(self, replica: Replica, event: Event) -> None:
        job = replica.jobs.get(event.id)
        if job is None:  # cancelled, or begun again elsewhere
            return
        if isinstance(event, Refused):
            replica.jobs.pop(event.id)
            if event.elsewhere:
                replica.draining = True
                self._place(job)
            else:
                self._end(job, InvalidRequest(event.why))
            return
        if isinstance(event, Finished):
            replica.jobs.pop(event.id)
            if event.reason is Reason.ERROR:
                self._end(job, Failure(event.error or "the engine failed", "engine_error"))
                return
            self.jobs.pop(job.id)
            self._finished.append(time.monotonic())
            self._metrics.finished(job, event)
        if job.tell(event) and isinstance(event, Settled):
            self._metrics.settled(job, event, time.monotonic())

    def ended(self, name: str, why: str) -> None:
        """The process of a replica has ended; ranks that it may have left are not to come back."""
        self._ended.add(name)
        for replica in [] if self._closing else [one for one in self.replicas.values() if one.name == name]:
            self._lost(replica, why)

    def _heard(self, replica: Replica) -> None:
        replica.heard = time.monotonic()
        if replica.is_silent:
            replica.is_silent = False
            _log.warning("replica %s is heard again", replica.name)
            self._place_waiting()

    def _move(self, replica: Replica, seconds: float) -> None:
        """A replica is silent: its requests go where somebody may answer sooner, should it not come back."""
        if not replica.is_silent:
            replica.is_silent = True
            _log.warning("replica %s: silent for %.1f s, with %d requests", replica.name, seconds, len(replica.jobs))
        others = [other for other in self.replicas.values() if other.is_able]
        if others:
            for job in [one for one in replica.jobs.values() if one.moves < _MOVES]:
                if not any(other.has_room(job) for other in others):
                    continue
                del replica.jobs[job.request.id]
                self._send(replica.identity, Cancel(job.request.id))
                job.renew()
                job.moves += 1
                self._metrics.replays.inc()
                self._place(job)

    def _give_up(self, replica: Replica, why: str) -> None:
        """Its process may still be there."""
        if not replica.draining:  # else it ends by itself
            self._on_dead(replica.name)
        self._lost(replica, why)

    def _lost(self, replica: Replica, why: str) -> None:
        """A replica is gone; its requests begin again."""
        del self.replicas[replica.identity]
        jobs, replica.jobs = list(replica.jobs.values()), {}
        _log.warning("replica %s: %s; %d requests begin again", replica.name, why, len(jobs))
        for job in jobs:
            job.renew()
            job.replays += 1
            if job.replays > _REPLAYS:
                self._end(job, Failure(f"{job.replays} replicas failed while they answered: {why}", "replica_failed"))
            else:
                self._metrics.replays.inc()
                self._place(job)

    async def _watch(self) -> None:
        """Say that we live, and see who does not, and what takes too long."""
        last = time.monotonic()
        while True:
            await asyncio.sleep(_TICK)
            now = time.monotonic()
            try:
                self._look(now, late=now - last - _TICK)
            except Exception:  # a defect; there will be more to see
                _log.exception("the replicas could not be looked after")
            last = now

    def _look(self, now: float, late: float) -> None:
        for replica in list(self.replicas.values()):
            replica.heard += max(0.0, late)  # what came while we did not listen is not read yet
            silent, stalled = now - replica.heard, replica.beat.stalled
            self._send(replica.identity, Ping())
            if replica.is_cut:
                self._give_up(replica, "its connection has ended")
            elif silent > self._settings.lost_seconds:
                self._give_up(replica, f"silent for {silent:.1f} s")
            elif stalled > self._settings.stall_seconds:
                self._give_up(replica, f"one pass has taken {stalled:.0f} s")
            elif silent > self._settings.silent_seconds:
                self._move(replica, silent)
        for job in [one for one in self.jobs.values() if now - one.began > self._settings.request_seconds]:
            self._end(job, TimedOut(f"not answered in {self._settings.request_seconds:g} s", "timeout"))
        self._metrics.show(self)

    @property
    def waiting(self) -> int:
        """Requests that no slot is free for, as far as known here."""
        waiting = sum(max(0, len(one.jobs) - one.facts.max_running) for one in self.replicas.values())
        return len(self._unplaced) + waiting
