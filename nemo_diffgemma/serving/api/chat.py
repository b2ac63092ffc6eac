"""POST /v1/chat/completions"""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from nemo_diffgemma.serving.api.answers import Answer, Format, Stream, collect
from nemo_diffgemma.serving.api.asking import Desk, while_connected
from nemo_diffgemma.serving.api.fields import ChatBody
from nemo_diffgemma.serving.api.logprobs import chat_form
from nemo_diffgemma.serving.api.replies import ChatReply, responses


class _Chat(Format):
    prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        return {"index": index, "message": message, "finish_reason": answer.finish_reason}

    def delta(self, index: int, text: str, is_first: bool, finish_reason: str | None) -> dict[str, Any]:
        delta = {"role": "assistant", "content": ""} if is_first else {"content": text} if text else {}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}

    def logprobs(self, answer: Answer, since: int) -> dict[str, Any]:
        return chat_form(self.text, answer.words.tokens[since:], answer.scores[since:])


def routes(desk: Desk) -> APIRouter:
    router = APIRouter()

    async def answer(body: ChatBody) -> Response:
        messages = [message.for_template() for message in body.messages]
        prompt = await asyncio.to_thread(desk.text.encode_chat, messages)
        jobs = await desk.submit(desk.requests([prompt], body, body.max_completion_tokens or body.max_tokens))
        format = _Chat(desk, body)
        if body.stream:
            return Stream(desk, jobs, format)
        return JSONResponse(format.whole(await collect(desk, jobs)))

    @router.post("/v1/chat/completions", responses=responses(ChatReply))
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        """The next turn of a conversation."""
        desk.check_model(body.model)
        return await while_connected(request, answer(body))

    return router
