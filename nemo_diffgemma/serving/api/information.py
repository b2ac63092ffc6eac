"""What a server says of itself: /v1/models, /health, /metrics; and /tokenize."""

from __future__ import annotations

import time
from typing import Any

import msgspec
from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST

from nemo_diffgemma.serving.api.asking import Desk
from nemo_diffgemma.serving.api.conversation import for_template
from nemo_diffgemma.serving.api.fields import Templated, TokenizeBody
from nemo_diffgemma.serving.api.json_body import JsonRoute
from nemo_diffgemma.serving.api.replies import HealthReply, ModelReply, ModelsReply, TokensReply
from nemo_diffgemma.serving.failures import InvalidRequest
from nemo_diffgemma.serving.metrics import Metrics


def routes(desk: Desk, metrics: Metrics) -> APIRouter:
    router, began = APIRouter(route_class=JsonRoute), int(time.time())

    def model(name: str) -> dict[str, Any]:
        facts = desk.facts
        about = {
            "context_tokens": facts.context_tokens,
            "canvas_length": facts.canvas_length,
            "vocab_size": facts.vocab_size,
            "sampler": facts.sampler.to_huggingface(),
            "task": facts.task,
            "takes_text": desk.router.text is not None,
            "takes_conversations": desk.router.text is not None and desk.router.text.takes_conversations,
        }
        described = {"id": name, "object": "model", "created": began, "owned_by": "nemo_diffgemma", "diffusion": about}
        return described if desk.adapter_of(name) is None else {**described, "parent": desk.settings.names[0]}

    @router.get("/v1/models", responses={200: {"model": ModelsReply}})
    async def models() -> dict[str, Any]:
        """The names that requests may give: those of the model, and of its adapters."""
        return {"object": "list", "data": [model(name) for name in [*desk.settings.names, *desk.facts.adapters]]}

    @router.get("/v1/models/{name:path}", responses={200: {"model": ModelReply}})
    async def one_model(name: str) -> dict[str, Any]:
        """One of them."""
        desk.check_model(name)
        return model(name)

    @router.get("/health", responses={status: {"model": HealthReply} for status in (200, 503)})
    async def health() -> Response:
        """200 while some replica answers, else 503."""
        replicas = [
            {"name": one.name, "requests": len(one.jobs), "layout": one.facts.layout, "device": one.facts.device}
            for one in desk.router.replicas.values()
            if one.is_able
        ]
        is_well = bool(replicas) and desk.router.ready.is_set()
        status = "ok" if is_well else "restarting" if desk.router.ready.is_set() else "loading"
        return JSONResponse({"status": status, "replicas": replicas}, 200 if is_well else 503)

    @router.get("/metrics", response_class=PlainTextResponse)
    async def prometheus() -> Response:
        """Figures for Prometheus."""
        metrics.show(desk.router)
        return Response(metrics.page(), media_type=CONTENT_TYPE_LATEST)

    @router.post("/tokenize", responses={200: {"model": TokensReply}})
    async def tokenize(body: TokenizeBody) -> Response:
        """Ids of a text, or of a conversation with the answer's beginning behind it."""
        return await _tokens(desk, body)

    return router


async def _tokens(desk: Desk, body: TokenizeBody) -> Response:
    """Raises `InvalidRequest` or `UserError`."""
    if body.model is not None:
        desk.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("give one of prompt and messages", "invalid_value", "prompt")
    if body.messages is not None:
        variables = body.template_variables
        ids = await desk.in_thread(desk.text.encode_chat, for_template(body.messages), variables)
    else:
        assert body.prompt is not None
        of_messages = [name for name in Templated.model_fields if name in body.model_fields_set]
        if of_messages:
            what = f"{of_messages[0]} is for messages; a prompt is read as it is"
            raise InvalidRequest(what, "invalid_value", of_messages[0])
        ids = await desk.in_thread(desk.text.encode, body.prompt, body.add_special_tokens)
    reply = {"tokens": ids, "count": len(ids), "context_tokens": desk.facts.context_tokens}
    # not through FastAPI, which looks at each of millions of numbers while all streams wait
    return Response(msgspec.json.encode(reply), media_type="application/json")
