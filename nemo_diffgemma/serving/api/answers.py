"""From events to what clients read: whole answers, and streams of server-sent events."""

from __future__ import annotations

import asyncio
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from nemo_diffgemma.serving.answer_text import AnswerText
from nemo_diffgemma.serving.api.asking import Desk
from nemo_diffgemma.serving.api.errors import body_of_failure, failure_of
from nemo_diffgemma.serving.api.fields import Common
from nemo_diffgemma.serving.job import Job
from nemo_diffgemma.serving.messages import Event
from nemo_diffgemma.serving.request import Draft, Finished, Scores, Settled
from nemo_diffgemma.serving.text import ServedText


@dataclass
class Answer:
    """One answer as far as it is known."""

    job: Job
    words: AnswerText
    text: str = ""
    steps: int = 0
    canvases: int = 0
    scores: list[Scores] = field(default_factory=list)
    end: Finished | None = None

    def take(self, event: Event) -> str:
        """What an event adds to the text. The last canvas is told from others by what ends the answer, behind it."""
        if isinstance(event, Settled):
            self.steps, self.canvases = self.steps + event.steps, self.canvases + 1
            self.scores += event.scores or []
            new = self.words.push(event.tokens, is_last=False)
        elif isinstance(event, Finished):
            self.end = event
            new = self.words.push([], is_last=True)
        else:
            return ""
        self.text += new
        return new

    @property
    def finish_reason(self) -> str | None:
        return self.end.reason.value if self.end else None


class Format(ABC):
    """How one endpoint writes answers. `object` and `chunk_object` are OpenAI's names of its two forms."""

    prefix, object, chunk_object = "", "", ""

    def __init__(self, desk: Desk, body: Common) -> None:
        self.text = desk.router.text
        self.head = head_of(self.prefix, body.model)
        self.body = body

    @abstractmethod
    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        """A whole answer."""

    @abstractmethod
    def delta(self, index: int, text: str, is_first: bool, finish_reason: str | None) -> dict[str, Any]:
        """What a chunk adds to an answer."""

    @abstractmethod
    def logprobs(self, answer: Answer, since: int) -> dict[str, Any]:
        """Log-probabilities of an answer's tokens, the first `since` of them left out."""

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        choices = []
        for index, answer in enumerate(answers):
            diffusion = {"token_ids": answer.words.tokens, "steps": answer.steps, "canvases": answer.canvases}
            diffusion["seed"] = answer.job.request.seed
            logprobs = None if self.body.scores is None else self.logprobs(answer, 0)
            choices.append({**self.choice(index, answer), "logprobs": logprobs, "diffusion": diffusion})
        result = {**self.head, "object": self.object, "choices": choices, "usage": usage(answers, self.body.n)}
        if self.body.ignored:
            result["diffusion"] = {"ignored": self.body.ignored}
        return result

    def chunk(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return {**self.head, "object": self.chunk_object, "choices": choices, **more}


def head_of(prefix: str, model: str) -> dict[str, Any]:
    """What all parts of a reply begin with."""
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}


def usage(answers: Sequence[Answer], n: int) -> dict[str, Any]:
    """Tokens of prompts, each counted once, and of answers. Of `n` answers to a prompt the first encodes it."""
    ends = [answer.end for answer in answers[::n] if answer.end]
    prompt, cached = sum(end.prompt_tokens for end in ends), sum(end.cached_tokens for end in ends)
    completion = sum(len(answer.words.tokens) for answer in answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def begin(desk: Desk, jobs: Sequence[Job]) -> list[Answer]:
    decode = desk.router.text.decode if desk.router.text is not None else lambda ids: ""
    return [Answer(job, AnswerText(decode, job.request.stop)) for job in jobs]


async def collect(desk: Desk, jobs: Sequence[Job]) -> list[Answer]:
    """Whole answers. Raises `Failure` of the first that fails; the others end with it."""
    answers = begin(desk, jobs)
    try:
        for answer in answers:
            while answer.end is None:
                answer.take(await answer.job.next())
        return answers
    finally:
        desk.leave(jobs)


class JobStream(StreamingResponse):
    """Server-sent events about some jobs, which end when the client goes."""

    def __init__(self, desk: Desk, jobs: Sequence[Job], events: AsyncIterator[bytes]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._desk, self._jobs = desk, jobs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._desk.leave(self._jobs)


class Stream(JobStream):
    """The answers of some jobs in chunks."""

    def __init__(self, desk: Desk, jobs: Sequence[Job], format: Format) -> None:
        super().__init__(desk, jobs, _events(desk, jobs, format))


async def _events(desk: Desk, jobs: Sequence[Job], format: Format) -> AsyncIterator[bytes]:
    answers, options = begin(desk, jobs), format.body.stream_options
    null_usage = {"usage": None} if options.include_usage else {}
    try:
        for index in range(len(answers)):
            yield sse(format.chunk([format.delta(index, "", True, None)], **null_usage))
        async for index, event in merged(jobs):
            answer = answers[index]
            if isinstance(event, Draft):
                yield sse(
                    format.chunk([], diffusion={"draft": draft_of(index, event, desk.router.text)}), "diffusion.draft"
                )
                continue
            since = len(answer.words.tokens)
            choice = format.delta(index, answer.take(event), False, answer.finish_reason)
            if isinstance(event, Settled):
                if format.body.scores is not None:
                    choice["logprobs"] = format.logprobs(answer, since)
                choice["diffusion"] = {"token_ids": event.tokens, "steps": event.steps, "canvas": event.canvas}
            else:
                choice["diffusion"] = {"seed": answer.job.request.seed}
            yield sse(format.chunk([choice], **null_usage))
        if options.include_usage:
            yield sse(format.chunk([], usage=usage(answers, format.body.n)))
        yield b"data: [DONE]\n\n"
    except Exception as error:
        yield sse(body_of_failure(failure_of(error)))


def sse(content: dict[str, Any], name: str | None = None) -> bytes:
    """A server-sent event."""
    line = b"event: %s\n" % name.encode() if name else b""
    return line + b"data: " + msgspec.json.encode(content) + b"\n\n"


def draft_of(index: int, draft: Draft, text: ServedText | None) -> dict[str, Any]:
    """A canvas between two steps: its cells side by side, entropies in nats."""
    result = {
        "index": index,
        "canvas": draft.canvas,
        "remaining": draft.remaining,
        "token_ids": draft.tokens,
        "accepted": draft.accepted,
        "entropy": [round(entropy, 4) for entropy in draft.entropy],
    }
    if text is not None:
        result |= {"text": text.decode(draft.tokens), "pieces": [text.piece(id) for id in draft.tokens]}
    return result


async def merged(jobs: Sequence[Job]) -> AsyncIterator[tuple[int, Event]]:
    """Events of all jobs as they come, each with the number of its job. Raises the first `Failure`."""
    waiting = {asyncio.create_task(job.next()): index for index, job in enumerate(jobs)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=waiting.__getitem__):
                index, event = waiting.pop(task), task.result()
                if not isinstance(event, Finished):
                    waiting[asyncio.create_task(jobs[index].next())] = index
                yield index, event
    finally:
        for task in waiting:
            task.cancel()
