"""From a body to jobs: what is checked here before a replica hears of it, and the client's connection meanwhile."""

from __future__ import annotations

import asyncio
import secrets
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence

from fastapi import Request as HttpRequest
from starlette.responses import Response

from nemo_diffgemma.diffusion.sampler_config import SamplerConfig
from nemo_diffgemma.errors import UserError
from nemo_diffgemma.serving.api.fields import Common, StreamOptions
from nemo_diffgemma.serving.failures import InvalidRequest, TimedOut, Unavailable, UnknownModel
from nemo_diffgemma.serving.job import Job
from nemo_diffgemma.serving.messages import Facts
from nemo_diffgemma.serving.request import Request
from nemo_diffgemma.serving.router import Router
from nemo_diffgemma.serving.settings import FrontSettings
from nemo_diffgemma.serving.text import ServedText
from nemo_diffgemma.serving.untrusted import Untrusted

_SEED_BITS = 48  # of a seed that is drawn: JavaScript's numbers hold it
CLIENT_GONE = 499


class Desk:
    """Where requests come in."""

    def __init__(self, router: Router, settings: FrontSettings, untrusted: Untrusted) -> None:
        self.router, self.settings, self._untrusted = router, settings, untrusted

    @property
    def facts(self) -> Facts:
        """Raises `Unavailable` before the first replica is ready."""
        if self.router.facts is None or not self.router.ready.is_set():
            raise Unavailable("the server is loading the model")
        return self.router.facts

    @property
    def text(self) -> ServedText:
        """Raises `InvalidRequest` for a model without a tokenizer."""
        self.facts  # noqa: B018  raises before there is any
        if self.router.text is None:
            what = "this model has no tokenizer; send token ids: to /v1/completions, or to /v1/infill with a prompt"
            raise InvalidRequest(what, "no_tokenizer")
        return self.router.text

    def check_model(self, name: str) -> None:
        """Raises `UnknownModel`."""
        if name not in self.settings.names and name not in self.facts.adapters:
            names = ", ".join(repr(known) for known in [*self.settings.names, *self.facts.adapters])
            raise UnknownModel(f"there is no model {name!r}; this server has {names}", "model_not_found", "model")

    def adapter_of(self, name: str) -> str | None:
        """The adapter that a model's name means; None: the model itself."""
        return None if name in self.settings.names else name

    def requests(self, prompts: Sequence[Sequence[int]], body: Common, max_tokens: int | None) -> list[Request]:
        """The answers that a body asks for, `n` for each prompt. Raises `InvalidRequest` or `UserError`."""
        facts, stop = self.facts, body.stop_strings
        if body.stream_options != StreamOptions() and not body.stream:
            raise InvalidRequest("stream_options needs stream: true", "invalid_value", "stream_options")
        if stop and self.router.text is None:
            raise InvalidRequest("this model has no tokenizer, so it cannot find stop strings", None, "stop")
        if stop and body.language is not None:
            what = f"stop={stop[0]!r} would cut an answer that is held to a format; it ends by itself: leave stop out"
            raise InvalidRequest(what, "invalid_value", "stop")
        length = body.diffusion.canvas_length
        length = facts.canvas_length if length is None else length
        if not 1 <= length <= facts.canvas_length:
            what = f"diffusion.canvas_length={length}; expected 1 to {facts.canvas_length}"
            raise InvalidRequest(what, "invalid_value", "diffusion.canvas_length")
        sampler = _sampler(facts, body)
        seed = secrets.randbits(_SEED_BITS) if body.seed is None else body.seed
        if seed + body.n - 1 >= 2**63:
            raise InvalidRequest(
                f"answer {body.n - 1} would have seed {seed + body.n - 1}, above 2^63 - 1", None, "seed"
            )
        made = []
        for prompt in prompts:
            most = self._max_tokens(facts, len(prompt), max_tokens, length)
            for index in range(body.n):
                made.append(
                    Request(
                        id=uuid.uuid4().hex,
                        prompt=tuple(prompt),
                        max_tokens=most,
                        canvas_length=length,
                        sampler=sampler,
                        seed=seed + index,
                        stop=stop,
                        drafts=body.stream and body.stream_options.drafts,
                        adapter=self.adapter_of(body.model),
                        language=body.language,
                        logprobs=body.scores,
                        chat=body.has_parts,
                    )
                )
        return made

    def _max_tokens(self, facts: Facts, prompt: int, asked: int | None, length: int) -> int:
        """Tokens of an answer: as many as asked for, or as usual here and as there is room for."""
        canvases = (facts.context_tokens - prompt) // length + 1 if prompt <= facts.context_tokens else 0
        most = canvases * length
        if prompt < 1:
            raise InvalidRequest("the prompt has no token", "invalid_value", "prompt")
        if most < (asked or 1):
            what = f"{prompt} tokens of prompt" + (f" and {asked} of answer" if asked else "")
            room = f"this server has room for {facts.context_tokens} of context, a last canvas of {length} not counted"
            raise InvalidRequest(f"{what}; {room}", "context_length_exceeded", "max_tokens" if canvases else "messages")
        return asked or min(most, self.settings.default_max_tokens)

    async def in_time[T](self, began: float, work: Awaitable[T]) -> T:
        """What `work` gives in the time limit of a request that began then, by the monotonic clock.

        Raises `TimedOut`; a thread goes on to its end.
        """
        seconds = self.settings.request_seconds
        try:
            async with asyncio.timeout(began + seconds - time.monotonic()):
                return await work
        except TimeoutError:
            raise TimedOut(f"not answered in {seconds:g} s", "timeout") from None

    async def in_thread[**P, T](self, work: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
        """What may take a while, beside the event loop. Raises `TimedOut`."""
        return await self.in_time(time.monotonic(), asyncio.to_thread(work, *arguments, **options))

    async def learn_language(self, body: Common) -> None:
        """From here on `body.language` is known. Raises `InvalidRequest` or `TimedOut`."""
        if body.may_be_held:
            body.know(await self.in_time(time.monotonic(), self._untrusted.language(body.without_content())))

    async def submit(self, requests: Sequence[Request]) -> list[Job]:
        """Jobs that a replica has accepted. Raises `Failure`; then none is left behind."""
        jobs = self.router.submit(requests)
        try:
            for job in jobs:
                await job.next()
        except BaseException:
            self.leave(jobs)
            raise
        return jobs

    async def check(self, job: Job, tokens: Sequence[int]) -> None:
        """Whether an answer is what its request wants it to be, in its time limit. Raises `Failure`."""
        await self.in_time(job.began, self._untrusted.check(job.request, tokens, self.router.text))

    def leave(self, jobs: Sequence[Job]) -> None:
        """Whoever waited for these does no more."""
        for job in jobs:
            self.router.cancel(job)


def _sampler(facts: Facts, body: Common) -> SamplerConfig:
    """The checkpoint's settings, with those of the body in place. Raises `InvalidRequest`."""
    try:
        return SamplerConfig.from_mapping({**vars(facts.sampler), **body.diffusion.sampler()}, "diffusion.")
    except UserError as error:
        raise InvalidRequest(str(error), "invalid_value", str(error).partition("=")[0]) from None


async def while_connected[T](request: HttpRequest, work: Awaitable[T]) -> T | Response:
    """What `work` gives; it is cancelled when its client goes."""
    task, gone = asyncio.ensure_future(work), asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        return Response(status_code=CLIENT_GONE)
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: HttpRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
