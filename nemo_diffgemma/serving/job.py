"""A request in the front end: where it is, what was heard of it, and what its client gets to hear."""

from __future__ import annotations

import asyncio
import math
import uuid
from collections import OrderedDict
from collections.abc import Sequence

import msgspec

from nemo_diffgemma.serving.failures import Failure
from nemo_diffgemma.serving.messages import Accepted, Beat, Event, Facts, Refused
from nemo_diffgemma.serving.prefix_keys import Key
from nemo_diffgemma.serving.request import Draft, Finished, Request, Settled

_DRAFTS_AHEAD = 64  # events that a slow reader may be behind before drafts are dropped


class Job:
    """`next` gives its events: `Accepted` first, `Finished` last. `request` is as its replica knows it.

    A request that begins again elsewhere gives the same tokens: what its client has had already is not told twice.
    """

    def __init__(self, request: Request, keys: Sequence[Key], began: float) -> None:
        self.id, self.request, self.keys, self.began = request.id, request, keys, began
        self.replica: Replica | None = None
        self.replays = 0  # since a replica ended
        self.moves = 0  # since a replica was silent
        self.is_over = False
        self.last_told = began  # when its client last heard of a canvas
        self._events: asyncio.Queue[Event | Failure] = asyncio.Queue()
        self._accepted, self._canvas, self._remaining = False, 0, math.inf

    def renew(self) -> None:
        """It begins again, with another name: what a replica still says of its former life is of nobody."""
        self.replica, self.request = None, msgspec.structs.replace(self.request, id=uuid.uuid4().hex)

    def tell(self, event: Event) -> bool:
        """Hand an event of a replica on; False if its client knows it."""
        if isinstance(event, Accepted):
            fresh, self._accepted = not self._accepted, True
        elif isinstance(event, Settled):
            fresh = event.canvas == self._canvas
            if fresh:
                self._canvas, self._remaining = self._canvas + 1, math.inf
        elif isinstance(event, Draft):
            fresh = event.canvas == self._canvas and event.remaining < self._remaining
            fresh = fresh and self._events.qsize() < _DRAFTS_AHEAD
            if fresh:
                self._remaining = event.remaining
        else:
            fresh = True
            self.is_over = isinstance(event, Finished | Refused)
        if fresh:
            self._events.put_nowait(event)
        return fresh

    def fail(self, failure: Failure) -> None:
        """The last that its client hears."""
        self.is_over = True
        self._events.put_nowait(failure)

    async def next(self) -> Event:
        """Raises `Failure` where no more events will come because something went wrong."""
        event = await self._events.get()
        if isinstance(event, Failure):
            raise event
        return event


class Replica:
    """What the front end knows of a replica."""

    def __init__(self, identity: bytes, name: str, facts: Facts, now: float) -> None:
        self.identity, self.name, self.facts = identity, name, facts
        self.heard, self.beat = now, Beat(0, 0, 0, 0.0)
        self.draining = self.is_silent = self.is_cut = False
        self.jobs: dict[str, Job] = {}
        self._prefixes: OrderedDict[Key, None] = OrderedDict()  # of prompts that it was sent, the longest unused first

    @property
    def is_able(self) -> bool:
        """It takes requests."""
        return not (self.draining or self.is_silent or self.is_cut)

    @property
    def has_free_slot(self) -> bool:
        return len(self.jobs) < self.facts.max_running

    def has_room(self, job: Job) -> bool:
        """Its memory can hold the request."""
        return job.request.most_context <= self.facts.context_tokens

    def known(self, keys: Sequence[Key]) -> int:
        """How many of a prompt's first tiles it has likely encoded."""
        known = 0
        while known < len(keys) and keys[known] in self._prefixes:
            known += 1
        return known

    def take(self, job: Job) -> None:
        """`job` goes to this replica."""
        job.replica = self
        self.jobs[job.request.id] = job
        for key in reversed(job.keys):
            self._prefixes[key] = None
            self._prefixes.move_to_end(key)
        while len(self._prefixes) > self.facts.cached_tiles:
            self._prefixes.popitem(last=False)
