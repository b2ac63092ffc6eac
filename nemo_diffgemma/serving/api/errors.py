"""Errors in OpenAI's format: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from nemo_diffgemma.errors import UserError
from nemo_diffgemma.json_files import brief
from nemo_diffgemma.serving.failures import Failure, InvalidRequest, Overloaded

_CODES = {413: "body_too_large"}
_FIELD = re.compile(r"(?!str$|int$)([a-z_]+|\d+)")  # of a place in a body; other parts of it are names of types
_LONGEST_MESSAGE = 2000  # characters
_LONGEST_NAME = 80  # of a field that nobody knows
_log = logging.getLogger(__name__)


def body_of(message: str, kind: str, code: str | None = None, parameter: str | None = None) -> dict[str, Any]:
    if len(message) > _LONGEST_MESSAGE:  # it repeats something long that was sent
        message = f"{message[: _LONGEST_MESSAGE // 2]} ... {message[-_LONGEST_MESSAGE // 2 :]}"
    return {"error": {"message": message, "type": kind, "param": parameter, "code": code}}


def failure_of(error: Exception) -> Failure:
    """What a client is told of an error; of a defect only that it is one."""
    if isinstance(error, Failure):
        return error
    if isinstance(error, UserError):
        return InvalidRequest(str(error))
    _log.error("a defect", exc_info=error)
    return Failure("the server has a defect; its log has the traceback", "internal_error")


def body_of_failure(failure: Failure) -> dict[str, Any]:
    return body_of(str(failure), failure.kind, failure.code, failure.parameter)


def answer_of(error: Exception) -> JSONResponse:
    failure = failure_of(error)
    headers = {"Retry-After": str(failure.retry_after)} if isinstance(failure, Overloaded) else None
    return JSONResponse(body_of_failure(failure), failure.status, headers)


def answer_of_http(error: HTTPException) -> JSONResponse:
    """For what is wrong before a route begins."""
    code = _CODES.get(error.status_code)
    return JSONResponse(body_of(error.detail, "invalid_request_error", code), error.status_code, error.headers)


def _place(fault: Mapping[str, Any]) -> list[str]:
    return [str(part) for part in fault["loc"] if part != "body" and _FIELD.fullmatch(str(part))]


def _validation_message(faults: Sequence[Mapping[str, Any]]) -> tuple[str, str | None, str]:
    """Message, parameter and code of the first thing that is wrong with a body.

    Where a field may be of several kinds, each has its faults; the deepest is of the kind that was meant, or one that
    is of a right type.
    """
    place = _place(faults[0])
    of_place = [one for one in faults if _place(one)[: len(place)] == place]
    fault = max(of_place, key=lambda one: (len(_place(one)), not one["type"].endswith("_type")))
    place = _place(fault)
    parameter = ".".join(place) or None
    if fault["type"] == "json_invalid":
        return f"the body is no valid JSON: {fault['ctx']['error']}", None, "invalid_json"
    if isinstance(fault["input"], bytes):
        return "the body was not sent as JSON; add the header Content-Type: application/json", None, "invalid_json"
    if fault["type"] == "extra_forbidden":
        parameter = ".".join([*_place({"loc": fault["loc"][:-1]}), str(fault["loc"][-1])[:_LONGEST_NAME]])
        return f"{parameter} is no field that this server knows", parameter, "unknown_parameter"
    if fault["type"] == "missing":
        what = f"{parameter} is missing" if parameter else "the body is empty; expected a JSON object"
        return what, parameter, "missing_parameter"
    return f"{parameter or 'the body'}: {fault['msg']}, not {brief(fault['input'])}", parameter, "invalid_value"


def add_handlers(app: FastAPI) -> None:
    """Every error in the format, whatever raises it."""

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        message, parameter, code = _validation_message(error.errors())
        return JSONResponse(body_of(message, "invalid_request_error", code, parameter), 400)

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        if error.status_code in (404, 405):
            error.detail = f"{request.method} {request.url.path}: {error.detail.lower()}"
        return answer_of_http(error)

    async def other(request: Request, error: Exception) -> JSONResponse:
        return answer_of(error)

    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    for kind in (Failure, UserError, Exception):
        app.add_exception_handler(kind, other)
