"""What a server says of itself: /v1/models, /health, /metrics; and /tokenize."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST

from nemo_diffgemma.serving.api.asking import Desk
from nemo_diffgemma.serving.api.fields import TokenizeBody
from nemo_diffgemma.serving.failures import InvalidRequest
from nemo_diffgemma.serving.metrics import Metrics


def routes(desk: Desk, metrics: Metrics) -> APIRouter:
    router, began = APIRouter(), int(time.time())

    def model(name: str) -> dict[str, Any]:
        facts = desk.facts
        about = {
            "context_tokens": facts.context_tokens,
            "canvas_length": facts.canvas_length,
            "vocab_size": facts.vocab_size,
            "sampler": facts.sampler.to_huggingface(),
        }
        described = {"id": name, "object": "model", "created": began, "owned_by": "nemo_diffgemma", "diffusion": about}
        return described if desk.adapter_of(name) is None else {**described, "parent": desk.settings.names[0]}

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The names that requests may give: those of the model, and of its adapters."""
        return {"object": "list", "data": [model(name) for name in [*desk.settings.names, *desk.facts.adapters]]}

    @router.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        """One of them."""
        desk.check_model(name)
        return model(name)

    @router.get("/health")
    async def health() -> Response:
        """200 while some replica answers, else 503."""
        replicas = [
            {"name": one.name, "requests": len(one.jobs), "layout": one.facts.layout, "device": one.facts.device}
            for one in desk.router.replicas.values()
            if not one.draining
        ]
        is_well = bool(replicas) and desk.router.ready.is_set()
        status = "ok" if is_well else "restarting" if desk.router.ready.is_set() else "loading"
        return JSONResponse({"status": status, "replicas": replicas}, 200 if is_well else 503)

    @router.get("/metrics")
    async def prometheus() -> Response:
        """Figures for Prometheus."""
        metrics.show(desk.router)
        return Response(metrics.page(), media_type=CONTENT_TYPE_LATEST)

    @router.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> dict[str, Any]:
        """Ids of a text, or of a conversation with the answer's beginning behind it."""
        if body.model is not None:
            desk.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise InvalidRequest("give one of prompt and messages", "invalid_value", "prompt")
        if body.messages is not None:
            messages = [message.for_template() for message in body.messages]
            ids = await asyncio.to_thread(desk.text.encode_chat, messages)
        else:
            assert body.prompt is not None
            ids = await asyncio.to_thread(desk.text.encode, body.prompt, body.add_special_tokens)
        return {"tokens": ids, "count": len(ids), "context_tokens": desk.facts.context_tokens}

    return router
