"""HTTP/1.1 on one connection: uvicorn's, with an end for clients that never ask, and errors in the API's format.

uvicorn waits for the head of a request as long as a client likes, and reads what comes behind a reply for ever.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
import msgspec
from uvicorn.protocols.http.h11_impl import H11Protocol

from nemo_diffgemma.serving.api.errors import body_of

_HEAD_SECONDS = 65.0  # in twice that a request has begun, or the connection ends


class Protocol(H11Protocol):
    """One connection."""

    head_seconds = _HEAD_SECONDS
    _clock: asyncio.TimerHandle | None = None
    _seen: Any = None  # the request that was over, or None before the first, when it was last looked

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._clock = self.loop.call_later(self.head_seconds, self._look, True)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._clock is not None:
            self._clock.cancel()
        super().connection_lost(exc)

    def _look(self, is_first: bool = False) -> None:
        """End the connection if nothing was asked since it was last looked."""
        idle = self.cycle is None or self.cycle.response_complete
        if idle and not is_first and self._seen is self.cycle:
            if self.conn.our_state is h11.IDLE and self.conn.trailing_data[0]:
                self._refuse(408, f"the head of the request did not arrive in {self.head_seconds:g} s")
            self.transport.close()
            return
        self._seen = self.cycle if idle else self
        self._clock = self.loop.call_later(self.head_seconds, self._look)

    def send_400_response(self, msg: str) -> None:
        """What came is no HTTP. Behind the beginning of another reply nothing can be said: the connection ends."""
        if self.cycle is not None:
            self.cycle.disconnected = True  # whoever reads its body, or answers, is to stop
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._refuse(400, "what came is no valid HTTP/1.1 request, or its head is longer than 64 KB")
        self.transport.close()

    def _refuse(self, status: int, message: str) -> None:
        content = msgspec.json.encode(body_of(message, "invalid_request_error"))
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(content)).encode()),
            (b"connection", b"close"),
        ]
        for event in (h11.Response(status_code=status, headers=headers), h11.Data(content), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
