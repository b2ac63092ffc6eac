"""Who may ask, and how much at once: checked before a body is read."""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nemo_diffgemma.serving.api.errors import answer_of_http, body_of

_OPEN = ("/health", "/metrics", "/")  # for load balancers, Prometheus, and the page, which asks its reader for a key
_OPEN_FOLDER = "/page/"


class _TooLarge(HTTPException):
    """Of the kind that FastAPI lets through where it reads a body."""

    def __init__(self, most_bytes: int) -> None:
        super().__init__(413, f"the body has more than {most_bytes} bytes")


class Limits:
    """ASGI middleware: bodies of at most `most_bytes`, and one of `keys` as bearer token, where there are any."""

    def __init__(self, app: ASGIApp, most_bytes: int, keys: Sequence[str]) -> None:
        self._app, self._most_bytes = app, most_bytes
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        is_open = scope["path"] in _OPEN or scope["path"].startswith(_OPEN_FOLDER)
        if not is_open and not self._may_ask(headers.get(b"authorization", b"")):
            message = "this server wants an API key: Authorization: Bearer KEY"
            await JSONResponse(body_of(message, "authentication_error", "invalid_api_key"), 401)(scope, receive, send)
            return
        length, received = headers.get(b"content-length", b"0"), 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._most_bytes:
                raise _TooLarge(self._most_bytes)
            return message

        if length.isdigit() and int(length) > self._most_bytes:
            await answer_of_http(_TooLarge(self._most_bytes))(scope, receive, send)
            return
        await self._app(scope, limited, send)

    def _may_ask(self, authorization: bytes) -> bool:
        if not self._keys:
            return True
        scheme, _, given = authorization.partition(b" ")
        return scheme.lower() == b"bearer" and any([hmac.compare_digest(given.strip(), key) for key in self._keys])
