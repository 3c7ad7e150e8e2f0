"""The page at `/`: four static files, served as they are, under a policy that lets them reach this server only.

They hold nothing that needs a key; what they ask for does. Knows nothing about images.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib import resources
from typing import Final

from fastapi import FastAPI
from fastapi.responses import Response

_FILES: Final = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/easel.js": ("easel.js", "text/javascript; charset=utf-8"),
}
PAGE_PATHS: Final = frozenset(_FILES)
_HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
}


def add_page(app: FastAPI) -> None:
    """Serve the page's files. They are no part of the API, and so not of its OpenAPI document."""
    folder = resources.files("fastcache.serve.http") / "page"
    for path, (name, kind) in _FILES.items():
        response = Response((folder / name).read_bytes(), headers={**_HEADERS, "Content-Type": kind})
        app.add_api_route(path, _always(response), methods=["GET", "HEAD"], include_in_schema=False)


def _always(response: Response) -> Callable[[], Awaitable[Response]]:
    async def answer() -> Response:
        return response

    return answer
