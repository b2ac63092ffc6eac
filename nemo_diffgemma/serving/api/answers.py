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
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from nemo_diffgemma.serving.answer_parts import AnswerParts, Part, Thought, ToolCall
from nemo_diffgemma.serving.api.asking import Desk
from nemo_diffgemma.serving.api.errors import body_of_failure, failure_of
from nemo_diffgemma.serving.api.fields import Common
from nemo_diffgemma.serving.job import Job
from nemo_diffgemma.serving.markers import Markers
from nemo_diffgemma.serving.messages import Event
from nemo_diffgemma.serving.request import Draft, Finished, Reason, Scores, Settled
from nemo_diffgemma.serving.text import ServedText

_LAST_WORDS = 10.0  # seconds after a request's time limit, in which its client reads that it is over


@dataclass
class Answer:
    """One answer as far as it is known."""

    job: Job
    words: AnswerParts
    text: str = ""
    thought: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    steps: int = 0
    canvases: int = 0
    scores: list[Scores] = field(default_factory=list)
    end: Finished | None = None

    def take(self, event: Event) -> list[Part]:
        """What an event adds. The last canvas is told from others by what ends the answer, behind it."""
        if isinstance(event, Settled):
            self.steps, self.canvases = self.steps + event.steps, self.canvases + 1
            self.scores += event.scores or []
            parts = self.words.push(event.tokens, is_last=False)
        elif isinstance(event, Finished):
            self.end = event
            parts = self.words.push([], is_last=True)
        else:
            return []
        for part in parts:
            if isinstance(part, ToolCall):
                self.calls.append(part)
            elif isinstance(part, Thought):
                self.thought += part.text
            else:
                self.text += part.text
        return parts

    @property
    def finish_reason(self) -> str | None:
        if self.end is None:
            return None
        return "tool_calls" if self.calls and self.end.reason is Reason.STOP else self.end.reason.value

    @property
    def diffusion(self) -> dict[str, Any]:
        """How it came about, as replies tell it."""
        seed = self.job.request.seed
        return {"token_ids": self.words.tokens, "steps": self.steps, "canvases": self.canvases, "seed": seed}


class Format(ABC):
    """How one endpoint writes answers. `object` and `chunk_object` are OpenAI's names of its two forms."""

    prefix, object, chunk_object = "", "", ""

    def __init__(self, desk: Desk, body: Common) -> None:
        self.text = desk.router.text
        self.head = head_of(self.prefix, body.model)
        self.body = body

    def begin(self, jobs: Sequence[Job]) -> list[Answer]:
        """Answers of which nothing is known yet."""
        return begin(self.text, jobs)

    @abstractmethod
    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        """A whole answer."""

    @abstractmethod
    def opening(self, index: int) -> dict[str, Any]:
        """The first chunk of an answer, before anything is known."""

    @abstractmethod
    def deltas(self, index: int, parts: Sequence[Part], finish_reason: str | None) -> list[dict[str, Any]]:
        """What chunks add to an answer, at least one."""

    @property
    def ignored(self) -> list[str]:
        """Names of given fields that change nothing."""
        return self.body.ignored

    @abstractmethod
    def logprobs(self, answer: Answer, since: int) -> dict[str, Any]:
        """Log-probabilities of an answer's tokens, the first `since` of them left out."""

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        choices = []
        for index, answer in enumerate(answers):
            logprobs = None if self.body.scores is None else self.logprobs(answer, 0)
            choices.append({**self.choice(index, answer), "logprobs": logprobs, "diffusion": answer.diffusion})
        result = {**self.head, "object": self.object, "choices": choices, "usage": usage(answers, self.body.n)}
        if self.ignored:
            result["diffusion"] = {"ignored": self.ignored}
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
        "completion_tokens_details": {"reasoning_tokens": sum(answer.words.thought_tokens for answer in answers)},
    }


def begin(text: ServedText | None, jobs: Sequence[Job]) -> list[Answer]:
    """Answers of which everything is text; without a tokenizer there is none."""
    decode = text.decode if text is not None else lambda ids: ""
    return [Answer(job, AnswerParts(decode, Markers(), job.request.stop)) for job in jobs]


async def collect(desk: Desk, answers: Sequence[Answer]) -> Sequence[Answer]:
    """Whole answers. Raises `Failure` of the first that fails; the others end with it."""
    jobs = [answer.job for answer in answers]
    try:
        for answer in answers:
            while answer.end is None:
                answer.take(await answer.job.next())
            await desk.check(answer.job, answer.words.tokens)
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
            async with asyncio.timeout(self._desk.settings.request_seconds + _LAST_WORDS):
                await super().__call__(scope, receive, send)
        except TimeoutError:  # all was answered in time, but not read: the connection is cut
            pass
        finally:
            self._desk.leave(self._jobs)


async def reply(desk: Desk, jobs: Sequence[Job], format: Format) -> Response:
    """The answers of some jobs: in chunks where the body wants a stream, else whole. Raises `Failure`."""
    if format.body.stream:
        return JobStream(desk, jobs, _events(desk, jobs, format))
    return JSONResponse(format.whole(await collect(desk, format.begin(jobs))))


async def _events(desk: Desk, jobs: Sequence[Job], format: Format) -> AsyncIterator[bytes]:
    answers, options = format.begin(jobs), format.body.stream_options
    null_usage = {"usage": None} if options.include_usage else {}
    try:
        for index in range(len(answers)):
            yield sse(format.chunk([format.opening(index)], **null_usage))
        async for index, event in merged(jobs):
            answer = answers[index]
            if isinstance(event, Draft):
                yield sse(
                    format.chunk([], diffusion={"draft": draft_of(index, event, desk.router.text)}), "diffusion.draft"
                )
                continue
            since, parts = len(answer.words.tokens), answer.take(event)
            if answer.end is not None:
                await desk.check(answer.job, answer.words.tokens)
            choices = format.deltas(index, parts, answer.finish_reason)
            if isinstance(event, Settled):
                if format.body.scores is not None:
                    choices[-1]["logprobs"] = format.logprobs(answer, since)
                choices[-1]["diffusion"] = {"token_ids": event.tokens, "steps": event.steps, "canvas": event.canvas}
            else:
                choices[-1]["diffusion"] = {"seed": answer.job.request.seed}
            for choice in choices:
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
