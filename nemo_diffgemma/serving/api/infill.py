"""POST /v1/infill: text around holes. What is given stands in the canvas from the first step on, on both sides.

A hole of free length is tried at several lengths at once, each an answer of its own with the same seed; that in which
the tokens of all holes have the highest mean log-probability in the last step, untempered, is the answer.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec
from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse
from starlette.responses import Response

from nemo_diffgemma.serving.api.answers import Answer, JobStream, begin, collect, draft_of, head_of, merged, sse, usage
from nemo_diffgemma.serving.api.asking import Desk, while_connected
from nemo_diffgemma.serving.api.conversation import for_template
from nemo_diffgemma.serving.api.errors import body_of_failure, failure_of
from nemo_diffgemma.serving.api.infill_body import InfillBody
from nemo_diffgemma.serving.api.json_body import JsonRoute
from nemo_diffgemma.serving.api.logprobs import LOWEST
from nemo_diffgemma.serving.api.replies import InfillReply, responses
from nemo_diffgemma.serving.api.template import Hole, Locked, Part, Template, of_token_ids, templates, written
from nemo_diffgemma.serving.failures import InvalidRequest
from nemo_diffgemma.serving.job import Job
from nemo_diffgemma.serving.request import Draft, Request, Settled


class Infill:
    """One request: `templates` are tried for each of its answers, and asked for in this order."""

    def __init__(self, desk: Desk, body: InfillBody, tried: Sequence[Template]) -> None:
        self.desk, self.body, self.tried = desk, body, tried
        self.head = head_of("infill", body.model)

    def requests(self, prompt: Sequence[int]) -> list[Request]:
        """Raises `InvalidRequest`."""
        longest = max(template.length for template in self.tried)
        try:
            answers = self.desk.requests([prompt], self.body, longest)
        except InvalidRequest as failure:
            if failure.parameter == "max_tokens":  # is not for the client to say
                failure.parameter = "text" if self.body.text is not None else "token_ids"
            raise
        shortens = self.body.diffusion.canvas_length is None
        return [
            msgspec.structs.replace(
                request,
                id=uuid.uuid4().hex,
                max_tokens=template.length,
                canvas_length=template.canvas_length(request.canvas_length) if shortens else request.canvas_length,
                locked=template.locked,
                logprobs=0 if len(self.tried) > 1 else None,
            )
            for request in answers
            for template in self.tried
        ]

    def place(self, number: int) -> tuple[int, Template]:
        """Which answer a job is for, and with what lengths."""
        index, combination = divmod(number, len(self.tried))
        return index, self.tried[combination]

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The reply, of each answer the best."""
        choices: list[dict[str, Any]] = []
        chosen: list[Answer] = []
        for first in range(0, len(answers), len(self.tried)):
            group = answers[first : first + len(self.tried)]
            scores = [self._score(template, answer) for template, answer in zip(self.tried, group, strict=True)]
            best = max(range(len(group)), key=lambda number: scores[number])
            chosen.append(group[best])
            choices.append(self._choice(len(choices), self.tried[best], group[best], scores))
        result = {**self.head, "object": "infill", "choices": choices, "usage": usage(chosen, len(chosen))}
        if self.body.ignored:
            result["diffusion"] = {"ignored": self.body.ignored}
        return result

    def _score(self, template: Template, answer: Answer) -> float:
        """Mean log-probability of the tokens in holes, in nats; 0 where there is nothing to compare."""
        if len(self.tried) == 1:
            return 0.0
        found = [score.logprob for place, score in enumerate(answer.scores) if place not in template.locked]
        return max(LOWEST, sum(found) / len(found)) if found else LOWEST

    def _choice(self, index: int, template: Template, answer: Answer, scores: Sequence[float]) -> dict[str, Any]:
        text, tokens = self.desk.router.text, answer.words.tokens
        pieces = None if text is None else written(text, template, tokens)
        holes = [
            {"text": None if pieces is None else pieces[number], "start": begin, "token_ids": tokens[begin:end]}
            for number, (part, (begin, end)) in enumerate(zip(template.parts, template.spans, strict=True))
            if isinstance(part, Hole)
        ]
        diffusion = answer.diffusion
        if len(self.tried) > 1:
            diffusion["tried"] = [
                {"lengths": list(one.lengths), "logprob": score} for one, score in zip(self.tried, scores, strict=True)
            ]
        whole = None if pieces is None else "".join(pieces)
        return {"index": index, "text": whole, "holes": holes, "finish_reason": "stop", "diffusion": diffusion}

    async def events(self, jobs: Sequence[Job]) -> AsyncIterator[bytes]:
        """Canvases and drafts of all that is tried, then the reply as if it had not been streamed."""
        answers = begin(self.desk.router.text, jobs)
        head = {**self.head, "object": "infill.chunk"}
        try:
            async for number, event in merged(jobs):
                answers[number].take(event)
                index, template = self.place(number)
                where = {"index": index, "lengths": list(template.lengths)}
                if isinstance(event, Draft):
                    draft = draft_of(index, event, self.desk.router.text) | where
                    yield sse({**head, "choices": [], "diffusion": {"draft": draft}}, "diffusion.draft")
                elif isinstance(event, Settled):
                    canvas = {"token_ids": event.tokens, "steps": event.steps, "canvas": event.canvas}
                    yield sse({**head, "choices": [], "diffusion": {"settled": where | canvas}}, "diffusion.settled")
            for answer in answers:
                await self.desk.check(answer.job, answer.words.tokens)
            yield sse(self.whole(answers))
            yield b"data: [DONE]\n\n"
        except Exception as error:
            yield sse(body_of_failure(failure_of(error)))


def _read(desk: Desk, body: InfillBody) -> tuple[list[Part], list[int]]:
    """The text and what stands before it. It may take a while."""
    return _parts(desk, body), _prompt(desk, body)


def _parts(desk: Desk, body: InfillBody) -> list[Part]:
    """Raises `InvalidRequest` or `UserError`. Each span is read by itself, so what stands beside it changes nothing."""
    if (body.text is None) == (body.token_ids is None):
        raise InvalidRequest("give one of text and token_ids", "invalid_value", "text")
    if body.token_ids is not None:
        return of_token_ids(body.token_ids)
    parts: list[Part] = []
    for part in body.text or []:
        if isinstance(part, str):
            parts.append(Locked(tuple(desk.text.encode(part, special_tokens=False)), part))
        else:
            parts.append(Hole(*part.limits))
    return parts


def _prompt(desk: Desk, body: InfillBody) -> list[int]:
    """What stands before the text. Raises `InvalidRequest` or `UserError`."""
    if body.prompt is not None and body.messages is not None:
        raise InvalidRequest("give one of prompt and messages, or none", "invalid_value", "prompt")
    if body.messages is not None:
        return desk.text.encode_chat(for_template(body.messages))
    if isinstance(body.prompt, list):
        return body.prompt
    return desk.text.encode(body.prompt or "")


def routes(desk: Desk) -> APIRouter:
    router = APIRouter(route_class=JsonRoute)

    async def answer(body: InfillBody) -> Response:
        desk.facts  # noqa: B018  raises before there is any
        await desk.learn_language(body)
        parts, prompt = await desk.in_thread(_read, desk, body)
        infill = Infill(desk, body, templates(parts))
        jobs = await desk.submit(infill.requests(prompt))
        if body.stream:
            return JobStream(desk, jobs, infill.events(jobs))
        return JSONResponse(infill.whole(await collect(desk, begin(desk.router.text, jobs))))

    @router.post("/v1/infill", responses=responses(InfillReply))
    async def infill(body: InfillBody, request: HttpRequest) -> Response:
        """Fill holes in a text: locked tokens never change, and holes settle around them."""
        desk.check_model(body.model)
        return await while_connected(request, answer(body))

    return router
