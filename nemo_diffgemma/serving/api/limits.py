"""Who may ask, and how much at once: checked before a body is read."""

from __future__ import annotations

import asyncio
import hmac

from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nemo_diffgemma.serving.api.errors import answer_of_http, body_of
from nemo_diffgemma.serving.settings import FrontSettings

_OPEN = ("/health", "/metrics", "/")  # for load balancers, Prometheus, and the page, which asks its reader for a key
_OPEN_FOLDER = "/page/"


class _TooLarge(HTTPException):
    """Of the kind that FastAPI lets through where it reads a body."""

    def __init__(self, most_bytes: int) -> None:
        super().__init__(413, f"the body has more than {most_bytes} bytes")


class Limits:
    """ASGI middleware: how large a body is and how long it takes; and one of the API keys as bearer token, if any."""

    def __init__(self, app: ASGIApp, settings: FrontSettings) -> None:
        self._app, self._most_bytes = app, int(settings.max_body_mb * 1e6)
        self._seconds = settings.request_seconds
        self._keys = [key.encode() for key in settings.api_keys]

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
        deadline: float | None = asyncio.get_running_loop().time() + self._seconds

        async def limited() -> Message:
            nonlocal received, deadline
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"the body did not arrive in {self._seconds:g} s") from None
            if not message.get("more_body", False):
                deadline = None  # what comes now is the client's end
            received += len(message.get("body", b""))
            if received > self._most_bytes:
                raise _TooLarge(self._most_bytes)
            return message

        if length.isdigit() and int(length) > self._most_bytes:
            await answer_of_http(_TooLarge(self._most_bytes))(scope, receive, send)
            return
        if scope["method"] == "HEAD":  # as some load balancers ask; of the reply to GET the server then sends the head
            scope = {**scope, "method": "GET"}
        await self._app(scope, limited, send)

    def _may_ask(self, authorization: bytes) -> bool:
        if not self._keys:
            return True
        scheme, _, given = authorization.partition(b" ")
        return scheme.lower() == b"bearer" and any([hmac.compare_digest(given.strip(), key) for key in self._keys])
