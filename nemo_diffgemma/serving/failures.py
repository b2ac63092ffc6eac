"""Why a request gets no answer, as HTTP says it."""

from __future__ import annotations


class Failure(Exception):
    """`code` is for programs, the message for people; `kind` is OpenAI's type of error, `parameter` a field's name."""

    status, kind = 500, "server_error"

    def __init__(self, message: str, code: str | None = None, parameter: str | None = None) -> None:
        super().__init__(message)
        self.code, self.parameter = code, parameter


class InvalidRequest(Failure):
    """It can never be answered as it is."""

    status, kind = 400, "invalid_request_error"


class UnknownModel(Failure):
    """Nobody here has this model."""

    status, kind = 404, "invalid_request_error"


class Overloaded(Failure):
    """The queue is full; a place may be free in `retry_after` seconds."""

    status, kind = 429, "rate_limit_error"

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message, "queue_full")
        self.retry_after = retry_after


class Unavailable(Failure):
    """The server starts, ends, or has no replica."""

    status, kind = 503, "server_error"


class TimedOut(Failure):
    """The request took longer than this server allows."""

    status, kind = 504, "server_error"
