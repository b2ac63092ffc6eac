"""The application: routes, limits and errors around one router."""

from __future__ import annotations

from fastapi import FastAPI

from nemo_diffgemma.serving.api import chat, completions, infill, information, page, responses
from nemo_diffgemma.serving.api.asking import Desk
from nemo_diffgemma.serving.api.errors import add_handlers
from nemo_diffgemma.serving.api.limits import Limits
from nemo_diffgemma.serving.metrics import Metrics
from nemo_diffgemma.serving.router import Router
from nemo_diffgemma.serving.settings import FrontSettings


def create_app(router: Router, settings: FrontSettings, metrics: Metrics) -> FastAPI:
    """CORS is off: pages of other hosts may not ask. FastAPI's own pages are off: they load scripts from elsewhere."""
    app, desk = FastAPI(title="nemo_diffgemma", docs_url=None, redoc_url=None), Desk(router, settings)
    add_handlers(app)
    app.add_middleware(Limits, most_bytes=int(settings.max_body_mb * 1e6), keys=settings.api_keys)
    for kind in (chat, completions, infill, responses):
        app.include_router(kind.routes(desk))
    app.include_router(information.routes(desk, metrics))
    app.include_router(page.routes())
    return app
