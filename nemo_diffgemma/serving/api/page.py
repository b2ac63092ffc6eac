"""GET /: the page, whose files are in serving/page/. It asks this server alone, as the policy says to browsers."""

from __future__ import annotations

from importlib.resources import files

from fastapi import APIRouter, HTTPException, Response

_KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # a server of another version may stand here next
}


def routes() -> APIRouter:
    """The files are read once, when the server starts."""
    router = APIRouter(include_in_schema=False)
    contents = {
        file.name: (file.read_bytes(), _KINDS[suffix])
        for file in files("nemo_diffgemma.serving").joinpath("page").iterdir()
        if (suffix := "." + file.name.rpartition(".")[2]) in _KINDS
    }

    def answer(name: str) -> Response:
        if name not in contents:
            raise HTTPException(404)
        content, kind = contents[name]
        return Response(content, media_type=kind, headers=_HEADERS)

    @router.get("/")
    async def page() -> Response:
        return answer("index.html")

    @router.get("/page/{name}")
    async def file(name: str) -> Response:
        return answer(name)

    return router
