"""The page's files, from the package, with headers that keep a browser from running anything else."""

from __future__ import annotations

from importlib.resources import files
from mimetypes import guess_type

from starlette.requests import Request
from starlette.responses import Response

from packlight.server.errors import ApiError

INDEX = "index.html"
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; base-uri 'none'; object-src 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


async def index(request: Request) -> Response:
    """The page itself."""
    return page_file(INDEX)


async def named(request: Request) -> Response:
    """A file that the page asks for."""
    return page_file(request.path_params["name"])


def page_file(name: str) -> Response:
    """A file of the folder `page`. Raises ApiError, 404, for any other name."""
    folder = files("packlight.server") / "page"
    known = {file.name: file for file in folder.iterdir() if file.is_file()} if folder.is_dir() else {}
    if name not in known:
        raise ApiError(404, f"the page has no file {name!r}")
    return Response(known[name].read_bytes(), headers=HEADERS, media_type=guess_type(name)[0])
