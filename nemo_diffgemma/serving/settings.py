"""What the front end is told when it starts: launch/serve.py composes it. No torch."""

from __future__ import annotations

from msgspec import Struct

DEFAULT_MAX_TOKENS = 2048


class FrontSettings(Struct, frozen=True, kw_only=True):
    """Numbers are above 0 where nothing else is said."""

    host: str
    port: int  # 0: any
    names: list[str]  # of the model; the first is the one that is shown
    replicas: list[list[str]]  # the command of each replica of this node, without front= and name=
    environments: list[dict[str, str]]  # variables of each of them
    address: str | None = None  # where replicas of other nodes join; None: nowhere
    queue_limit: int = 256  # requests that wait, above what the replicas run
    request_seconds: float = 600.0  # time limit of a request, waiting included
    drain_seconds: float = 60.0  # after SIGTERM, for what is being answered
    max_body_mb: float = 8.0
    default_max_tokens: int = DEFAULT_MAX_TOKENS  # of an answer that asks for nothing else
    api_keys: list[str] = []  # empty: everybody may ask
    cors_origins: list[str] = []  # of pages on other hosts that may ask; ["*"]: all
    silent_seconds: float = 5.0  # without a heartbeat of a replica, after which its requests go to others
    lost_seconds: float = 30.0  # without one, after which it is given up: killed and started again
    stall_seconds: float = 600.0  # without an end of a pass, after which it is given up too
