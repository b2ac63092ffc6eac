"""What the front end and a replica say to each other: msgspec structs in MessagePack, one a ZeroMQ message. No torch.

front end -> replica: Welcome, Ping, Request, Cancel, Drain, Unknown
replica -> front end: Hello, TextFiles, Beat, Events, Farewell
"""

from __future__ import annotations

import msgspec
from msgspec import Struct

from nemo_diffgemma.diffusion.sampler_config import SamplerConfig
from nemo_diffgemma.serving.request import Draft, Finished, Request, Settled


class Facts(Struct, frozen=True):
    """What a replica serves, and how much of it. Replicas of one server differ in their size alone."""

    vocab_size: int
    canvas_length: int
    context_tokens: int  # the most that one request can have: its prompt, and all canvases but the last
    tile: int  # tokens of prompts are cached in tiles
    cached_tiles: int  # the most that are remembered
    max_running: int  # requests that denoise at a time
    sampler: SamplerConfig  # what a request gets that asks for nothing else
    text: str  # a fingerprint of its tokenizer and template; empty without a tokenizer
    layout: str
    device: str
    adapters: list[str] = []  # that requests may name
    task: str | None = None  # "sudoku": what prompts and answers are, where they are no language


class TextFiles(Struct, frozen=True, tag=True):
    """A tokenizer as transformers has built it, and how conversations become prompts."""

    tokenizer: str  # JSON of the tokenizers library
    template: str | None  # Jinja
    special_tokens: dict[str, str]  # that the template may name: bos_token and others


# -- of the front end --------------------------------------------------------------------------------------------------


class Welcome(Struct, frozen=True, tag=True):
    """The replica is one of the server's; `wants_text` asks for its `TextFiles`."""

    wants_text: bool


class Ping(Struct, frozen=True, tag=True):
    """The front end lives."""


class Cancel(Struct, frozen=True, tag=True):
    """Nobody waits for this request any more."""

    id: str


class Drain(Struct, frozen=True, tag=True):
    """End when all requests are answered."""


class Unknown(Struct, frozen=True, tag=True):
    """The front end has given this replica up, or is a new one: forget all requests and say Hello again."""


# -- of a replica ------------------------------------------------------------------------------------------------------


class Hello(Struct, frozen=True, tag=True):
    """A replica is ready. `name` is that which it was started with."""

    name: str
    facts: Facts


class Beat(Struct, frozen=True, tag=True):
    """Every second: what it does. `stalled` are seconds since it last finished a pass while there was work."""

    running: int
    waiting: int
    passes: int
    stalled: float


class Accepted(Struct, frozen=True, tag=True):
    """The request is one that can be answered."""

    id: str


class Refused(Struct, frozen=True, tag=True):
    """It is not, and why; nothing more is heard of it. `elsewhere`: by this replica, which is about to end."""

    id: str
    why: str
    elsewhere: bool = False


Event = Accepted | Refused | Draft | Settled | Finished


class Events(Struct, frozen=True, tag=True):
    """What happened in a pass."""

    events: list[Event]


class Farewell(Struct, frozen=True, tag=True):
    """The replica ends. While it drains, requests are still answered; else a fault of it is told."""

    draining: bool
    why: str


ToReplica = Welcome | Ping | Request | Cancel | Drain | Unknown
ToFront = Hello | TextFiles | Beat | Events | Farewell

_to_replica, _to_front = msgspec.msgpack.Decoder(ToReplica), msgspec.msgpack.Decoder(ToFront)
encode = msgspec.msgpack.Encoder().encode


def of_front(message: bytes) -> ToReplica:
    """Raises `msgspec.DecodeError`, of which `ValidationError` is one."""
    return _to_replica.decode(message)


def of_replica(message: bytes) -> ToFront:
    """Raises `msgspec.DecodeError`, of which `ValidationError` is one."""
    return _to_front.decode(message)
