"""POST /v1/chat/completions"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from nemo_diffgemma.serving.answer_parts import AnswerParts, Part, Thought, ToolCall
from nemo_diffgemma.serving.api.answers import Answer, Format, reply
from nemo_diffgemma.serving.api.asking import Desk, while_connected
from nemo_diffgemma.serving.api.conversation import for_template
from nemo_diffgemma.serving.api.fields import ChatBody
from nemo_diffgemma.serving.api.json_body import JsonRoute
from nemo_diffgemma.serving.api.logprobs import chat_form
from nemo_diffgemma.serving.api.replies import ChatReply, responses
from nemo_diffgemma.serving.failures import InvalidRequest
from nemo_diffgemma.serving.job import Job


class _Chat(Format):
    prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, desk: Desk, body: ChatBody) -> None:
        super().__init__(desk, body)
        self.chat, self.read = body, desk.text

    def begin(self, jobs: Sequence[Job]) -> list[Answer]:
        most, read = self.chat.offer.most_calls, self.read
        return [Answer(job, AnswerParts(read.decode, read.part_markers, job.request.stop, most)) for job in jobs]

    @property
    def ignored(self) -> list[str]:
        """What the model's template does not know changes nothing either."""
        given, known = self.chat.chat_template_kwargs, self.read.variables
        unknown = [f"chat_template_kwargs.{name}" for name in given if name not in known]
        if self.chat.reasoning_effort is not None and "enable_thinking" not in known:
            unknown.append("reasoning_effort")
        return self.chat.ignored + unknown

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        content = None if answer.calls and not answer.text else answer.text
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if answer.thought:
            message["reasoning_content"] = answer.thought
        if answer.calls:
            message["tool_calls"] = [_call(call) for call in answer.calls]
        return {"index": index, "message": message, "finish_reason": answer.finish_reason}

    def opening(self, index: int) -> dict[str, Any]:
        return _delta(index, {"role": "assistant", "content": ""})

    def deltas(self, index: int, parts: Sequence[Part], finish_reason: str | None) -> list[dict[str, Any]]:
        """One for each part: clients look for one thing in a chunk."""
        made = [_delta(index, _of_part(part)) for part in parts]
        return made if made and finish_reason is None else [*made, _delta(index, {}, finish_reason)]

    def logprobs(self, answer: Answer, since: int) -> dict[str, Any]:
        return chat_form(self.text, answer.words.tokens[since:], answer.scores[since:])


def _delta(index: int, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


def _of_part(part: Part) -> dict[str, Any]:
    if isinstance(part, ToolCall):
        return {"tool_calls": [{"index": part.index, **_call(part)}]}
    return {"reasoning_content" if isinstance(part, Thought) else "content": part.text}


def _call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def prompt_of(desk: Desk, body: ChatBody) -> list[int]:
    """Ids of the conversation. It may take a while."""
    if body.offer.tools and desk.text.part_markers.call is None:
        raise InvalidRequest("this model's tokenizer has no tokens for calls of tools", "invalid_value", "tools")
    return desk.text.encode_chat(for_template(body.messages), body.template_variables)


def routes(desk: Desk) -> APIRouter:
    router = APIRouter(route_class=JsonRoute)

    async def answer(body: ChatBody) -> Response:
        await desk.learn_language(body)
        prompt = await desk.in_thread(prompt_of, desk, body)
        jobs = await desk.submit(desk.requests([prompt], body, body.max_completion_tokens or body.max_tokens))
        return await reply(desk, jobs, _Chat(desk, body))

    @router.post("/v1/chat/completions", responses=responses(ChatReply))
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        """The next turn of a conversation."""
        desk.check_model(body.model)
        return await while_connected(request, answer(body))

    return router
