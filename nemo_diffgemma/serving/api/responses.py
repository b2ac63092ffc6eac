"""POST /v1/responses: the subset of OpenAI's API that its client needs for text, tools, formats and streams."""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from nemo_diffgemma.serving.answer_parts import AnswerParts
from nemo_diffgemma.serving.api.answers import Answer, JobStream, draft_of, sse, usage
from nemo_diffgemma.serving.api.asking import Desk, while_connected
from nemo_diffgemma.serving.api.chat import prompt_of
from nemo_diffgemma.serving.api.errors import body_of_failure, failure_of
from nemo_diffgemma.serving.api.fields import ChatBody
from nemo_diffgemma.serving.api.json_body import JsonRoute
from nemo_diffgemma.serving.api.replies import ResponseEvent, ResponseReply
from nemo_diffgemma.serving.api.replies import responses as replies
from nemo_diffgemma.serving.api.response_items import Items
from nemo_diffgemma.serving.api.responses_body import ResponsesBody
from nemo_diffgemma.serving.failures import InvalidRequest
from nemo_diffgemma.serving.job import Job
from nemo_diffgemma.serving.request import Draft, Reason


class _Response:
    """One answer as this endpoint writes it: `now` as far as it is known."""

    def __init__(self, desk: Desk, body: ResponsesBody, chat: ChatBody, job: Job) -> None:
        text = desk.text
        self.desk, self.body, self.chat, self.text, self.items = desk, body, chat, text, Items()
        self.answer = Answer(job, AnswerParts(text.decode, text.part_markers, most_calls=chat.offer.most_calls))
        self.head = {"id": f"resp_{uuid.uuid4().hex}", "object": "response", "created_at": int(time.time())}

    @property
    def status(self) -> str:
        end = self.answer.end
        return "in_progress" if end is None else "incomplete" if end.reason is Reason.LENGTH else "completed"

    def now(self) -> dict[str, Any]:
        """The response object."""
        body, answer, status = self.body, self.answer, self.status
        given = body.model_dump(mode="json", by_alias=True, exclude_none=True)
        made = {
            **self.head,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            **{name: given.get(name) for name in ("instructions", "max_output_tokens", "metadata", "user")},
            **{name: given[name] for name in ("model", "parallel_tool_calls", "text", "tools", "reasoning")},
            **{name: given.get(name) for name in ("temperature", "top_p")},
            "tool_choice": given.get("tool_choice", "auto"),
            "output": self.items.output,
            "usage": None if answer.end is None else _usage(answer),
            "previous_response_id": None,
            "store": False,
            "background": False,
            "truncation": "disabled",
        }
        if answer.end is not None:
            made["diffusion"] = {**answer.diffusion, "ignored": self.chat.ignored + self.body.ignored}
        return made

    async def whole(self) -> dict[str, Any]:
        """Raises `Failure`."""
        try:
            async for _ in self._told():
                pass
            return self.now()
        finally:
            self.desk.leave([self.answer.job])

    async def events(self) -> AsyncIterator[bytes]:
        """What a stream tells, numbered."""
        numbers = itertools.count()

        def line(event: dict[str, Any]) -> bytes:
            return sse({**event, "sequence_number": next(numbers)}, event["type"])

        try:
            yield line({"type": "response.created", "response": self.now()})
            yield line({"type": "response.in_progress", "response": self.now()})
            async for event in self._told():
                yield line(event)
            yield line({"type": f"response.{self.status}", "response": self.now()})
        except Exception as error:
            body = body_of_failure(failure_of(error))
            yield line(
                {"type": "error", **{name: body["error"][name] for name in ("code", "message", "param")}, **body}
            )

    async def _told(self) -> AsyncIterator[dict[str, Any]]:
        """Events of the answer's items, and drafts. Raises `Failure`."""
        answer = self.answer
        while answer.end is None:
            event = await answer.job.next()
            if isinstance(event, Draft):
                yield {"type": "diffusion.draft", "draft": draft_of(0, event, self.text)}
                continue
            parts = answer.take(event)
            if answer.end is not None:
                await self.desk.check(answer.job, answer.words.tokens)
            for told in self.items.take(parts):
                yield told
        for told in self.items.close(self.status):
            yield told


def _usage(answer: Answer) -> dict[str, Any]:
    counted = usage([answer], 1)
    return {
        "input_tokens": counted["prompt_tokens"],
        "input_tokens_details": {**counted["prompt_tokens_details"], "cache_write_tokens": 0},
        "output_tokens": counted["completion_tokens"],
        "output_tokens_details": counted["completion_tokens_details"],
        "total_tokens": counted["total_tokens"],
    }


_NAMES = {"messages": "input", "response_format": "text.format", "max_tokens": "max_output_tokens"}


def _renamed(failure: InvalidRequest) -> InvalidRequest:
    """A refusal of the chat that was asked, by this endpoint's names."""
    for name, own in _NAMES.items():
        if failure.parameter is not None and failure.parameter.startswith(name):
            failure.parameter = own
    return failure


def routes(desk: Desk) -> APIRouter:
    router = APIRouter(route_class=JsonRoute)

    async def answer(body: ResponsesBody) -> Response:
        chat = await desk.in_thread(body.chat)
        try:
            await desk.learn_language(chat)
            prompt = await desk.in_thread(prompt_of, desk, chat)
            jobs = await desk.submit(desk.requests([prompt], chat, chat.max_tokens))
        except InvalidRequest as failure:
            raise _renamed(failure) from None
        response = _Response(desk, body, chat, jobs[0])
        if body.stream:
            return JobStream(desk, jobs, response.events())
        return JSONResponse(await response.whole())

    @router.post("/v1/responses", responses=replies(ResponseReply, ResponseEvent))
    async def create(body: ResponsesBody, request: Request) -> Response:
        """The next turn of a conversation, as items."""
        desk.check_model(body.model)
        return await while_connected(request, answer(body))

    return router
