"""The application: routes, limits and errors around one router."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from fastapi import FastAPI

from nemo_diffgemma.serving.answer_check import AnswerCheck
from nemo_diffgemma.serving.api import chat, completions, infill, information, responses
from nemo_diffgemma.serving.api.asking import Desk
from nemo_diffgemma.serving.api.errors import add_handlers
from nemo_diffgemma.serving.api.limits import Limits
from nemo_diffgemma.serving.api.replies import failures
from nemo_diffgemma.serving.metrics import Metrics
from nemo_diffgemma.serving.router import Router
from nemo_diffgemma.serving.settings import FrontSettings


def create_app(router: Router, settings: FrontSettings, metrics: Metrics) -> FastAPI:
    """CORS is off: pages of other hosts may not ask. FastAPI's own pages are off: they load scripts from elsewhere."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        check.close()

    check = AnswerCheck(metrics)
    app = FastAPI(title="nemo_diffgemma", docs_url=None, redoc_url=None, lifespan=lifespan)
    desk = Desk(router, settings, check)
    add_handlers(app)
    app.add_middleware(Limits, settings=settings)
    for kind in (chat, completions, infill, responses):
        app.include_router(kind.routes(desk), responses=failures())
    app.include_router(information.routes(desk, metrics), responses=failures())
    return app
