"""What strangers can make take for ever, in child processes: their schemas and patterns, and answers read once more.

    untrusted = Untrusted(metrics)
    language = await untrusted.language(body)           # what a body says that its answer must be
    await untrusted.check(request, tokens, text)        # before a client is told that its answer is whole

A child has a limit of time for a job, and of memory. So nothing that is sent stops the event loop or other answers. No
torch.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from nemo_diffgemma.serving.constraints import (
    Compiler,
    ConstraintError,
    ConstraintViolation,
    Language,
    Limits,
    Vocabulary,
)
from nemo_diffgemma.serving.constraints.worker import HasLanguage
from nemo_diffgemma.serving.failures import Failure, InvalidRequest
from nemo_diffgemma.serving.metrics import Metrics
from nemo_diffgemma.serving.request import Request
from nemo_diffgemma.serving.text import ServedText

_log = logging.getLogger(__name__)


class Untrusted:
    """`processes` jobs at a time, `seconds` each at most. The first child starts with the first job."""

    def __init__(self, metrics: Metrics, seconds: float = 5.0, processes: int = 2) -> None:
        self._metrics = metrics
        self._compiler = Compiler(Vocabulary({}, 0, ()), Limits(seconds=seconds), processes)

    async def language(self, body: HasLanguage) -> Language | None:
        """`body.language`. Raises `InvalidRequest`, also for one that is not made in time."""
        try:
            return await asyncio.wrap_future(self._compiler.submit_language(body))
        except ConstraintError as error:
            raise InvalidRequest(str(error), "constraint_too_large") from None

    async def check(self, request: Request, tokens: Sequence[int], text: ServedText | None) -> None:
        """Return if the answer, all its `tokens` with the one that ends it, is of `request.language`, or it has none.

        Python's `re`, or `json` and `jsonschema`, read it: libraries that had no part in it. Raises `Failure` for an
        answer that is not: a defect of this server, counted and logged, never an answer. Raises `InvalidRequest` for a
        pattern that cannot be checked in time.
        """
        if request.language is None:
            return
        assert text is not None, "a replica without a tokenizer refuses languages"
        ends = [place for place, id in enumerate(tokens) if id in request.sampler.eos_ids]
        whole = text.decode_marked(tokens[: ends[0]] if ends else tokens)
        try:
            await asyncio.wrap_future(self._compiler.submit_check(request.language, whole))
        except ConstraintViolation as violation:
            self._metrics.violations.inc()
            _log.error("request %s: %s", request.id, violation)
            raise Failure(
                "the answer is not what its constraint allows, a defect of this server; ask again with another seed",
                "constraint_violated",
            ) from None
        except ConstraintError as error:
            raise InvalidRequest(f"the answer cannot be checked: {error}", "constraint_too_slow") from None

    def close(self) -> None:
        """End the children."""
        self._compiler.close()
