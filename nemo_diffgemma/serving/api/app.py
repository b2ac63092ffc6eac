"""The application: routes, limits and errors around one router."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from nemo_diffgemma.serving.api import chat, completions, infill, information, page, responses
from nemo_diffgemma.serving.api.asking import Desk
from nemo_diffgemma.serving.api.errors import add_handlers
from nemo_diffgemma.serving.api.limits import Limits
from nemo_diffgemma.serving.api.replies import failures
from nemo_diffgemma.serving.metrics import Metrics
from nemo_diffgemma.serving.router import Router
from nemo_diffgemma.serving.settings import FrontSettings
from nemo_diffgemma.serving.untrusted import Untrusted


def create_app(router: Router, settings: FrontSettings, metrics: Metrics) -> FastAPI:
    """Pages of other hosts may not ask, unless they are among `cors_origins`.

    FastAPI's own pages are off: they load scripts from elsewhere.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        untrusted.close()

    untrusted = Untrusted(metrics)
    app = FastAPI(title="nemo_diffgemma", docs_url=None, redoc_url=None, lifespan=lifespan)
    desk = Desk(router, settings, untrusted)
    add_handlers(app)
    app.add_middleware(Limits, settings=settings)
    if settings.cors_origins:  # around the limits: a browser asks whether it may without its key
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.cors_origins, allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    for kind in (chat, completions, infill, responses):
        app.include_router(kind.routes(desk), responses=failures())
    app.include_router(information.routes(desk, metrics), responses=failures())
    app.include_router(page.routes())
    return app
