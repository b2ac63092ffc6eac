"""POST /v1/completions"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from nemo_diffgemma.serving.answer_parts import Part, Said
from nemo_diffgemma.serving.api.answers import Answer, Format, reply
from nemo_diffgemma.serving.api.asking import Desk, while_connected
from nemo_diffgemma.serving.api.fields import CompletionBody
from nemo_diffgemma.serving.api.json_body import JsonRoute
from nemo_diffgemma.serving.api.logprobs import completion_form
from nemo_diffgemma.serving.api.replies import CompletionReply, responses
from nemo_diffgemma.serving.failures import InvalidRequest


class _Completion(Format):
    prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        return {"index": index, "text": answer.text, "finish_reason": answer.finish_reason}

    def opening(self, index: int) -> dict[str, Any]:
        return self.deltas(index, [], None)[0]

    def deltas(self, index: int, parts: Sequence[Part], finish_reason: str | None) -> list[dict[str, Any]]:
        text = "".join(part.text for part in parts if isinstance(part, Said))
        return [{"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}]

    def logprobs(self, answer: Answer, since: int) -> dict[str, Any]:
        tokens = answer.words.tokens
        return completion_form(self.text, tokens[:since], tokens[since:], answer.scores[since:])


async def _ids(desk: Desk, body: CompletionBody) -> list[list[int]]:
    """Prompts as ids: one or more, as texts or as ids. Raises `InvalidRequest`."""
    prompt: str | list[Any] = body.prompt
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], int):
        return [prompt]
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not prompts:
        raise InvalidRequest("there is no prompt", "invalid_value", "prompt")
    desk.router.check_room(len(prompts) * body.n)  # before any of it is made
    return await desk.in_thread(lambda: [desk.text.encode(one) if isinstance(one, str) else one for one in prompts])


def routes(desk: Desk) -> APIRouter:
    router = APIRouter(route_class=JsonRoute)

    async def answer(body: CompletionBody) -> Response:
        await desk.learn_language(body)
        jobs = await desk.submit(desk.requests(await _ids(desk, body), body, body.max_tokens))
        return await reply(desk, jobs, _Completion(desk, body))

    @router.post("/v1/completions", responses=responses(CompletionReply))
    async def completions(body: CompletionBody, request: Request) -> Response:
        """What follows a prompt, as it is: no chat template."""
        desk.check_model(body.model)
        return await while_connected(request, answer(body))

    return router
