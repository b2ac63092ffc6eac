"""Bodies as JSON is: UTF-8, whole characters, finite numbers. What Python's own parser takes beside breaks replies."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException


class JsonRoute(APIRoute):
    """A route that reads its body so."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's, given requests of another class: https://fastapi.tiangolo.com/how-to/custom-request-and-route"""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(_Request(request.scope, request.receive))

        return handle


class _Request(Request):
    async def json(self) -> Any:
        """Raises `HTTPException` for a compressed body, `json.JSONDecodeError` for what is no JSON."""
        encoding = self.headers.get("content-encoding", "identity")
        if encoding.lower() != "identity":
            raise HTTPException(415, f"Content-Encoding: {encoding[:80]}; expected a body that is not compressed")
        try:
            return msgspec.json.decode(await self.body())
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            why = str(error).removeprefix("JSON is malformed: ")
            expected = "expected UTF-8, finite numbers, whole surrogate pairs"
            raise json.JSONDecodeError(f"{why}; {expected}", "", 0) from None
