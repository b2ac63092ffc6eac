"""Bodies as JSON is: UTF-8, whole characters, finite numbers. What Python's own parser takes beside breaks replies.

A large body is checked in a thread: its hundred thousand messages are not to keep the streams of others waiting.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

_LARGE = 1 << 16  # bytes


class JsonRoute(APIRoute):
    """A route that reads its body so."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's, given requests of another class: https://fastapi.tiangolo.com/how-to/custom-request-and-route"""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            try:
                return await handler(_Request(request.scope, request.receive, self.body_field))
            except _FaultyBodyError as error:
                raise RequestValidationError(error.faults) from None

        return handle


class _FaultyBodyError(HTTPException):
    """FastAPI lets no other exceptions of `json` through."""

    def __init__(self, faults: Any) -> None:
        super().__init__(422)
        self.faults = faults


class _Request(Request):
    def __init__(self, scope: Any, receive: Any, field: Any) -> None:
        super().__init__(scope, receive)
        self._field = field

    async def json(self) -> Any:
        """The body as FastAPI is to check it, or a large one that is checked.

        Raises `HTTPException` for a compressed body, `json.JSONDecodeError` for what is no JSON.
        """
        encoding = self.headers.get("content-encoding", "identity")
        if encoding.lower() != "identity":
            raise HTTPException(415, f"Content-Encoding: {encoding[:80]}; expected a body that is not compressed")
        try:
            body = await self.body()
            value = msgspec.json.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            why = str(error).removeprefix("JSON is malformed: ")
            expected = "expected UTF-8, finite numbers, whole surrogate pairs"
            raise json.JSONDecodeError(f"{why}; {expected}", "", 0) from None
        if len(body) > _LARGE and self._field is not None:
            value, faults = await asyncio.to_thread(self._field.validate, value, {}, loc=("body",))
            if faults:
                raise _FaultyBodyError(faults)
        return value
