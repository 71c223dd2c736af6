"""The page at `/` for browsers: static files of the package, which load nothing from elsewhere. It needs no key; the API does."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import Response

from redraft.serve.errors import Refused

FOLDER = Path(__file__).with_name("page")
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # asked for again each time, and answered with 304
}

router = APIRouter()


@cache
def files() -> dict[str, bytes]:
    """The contents of the files, by name."""
    return {path.name: path.read_bytes() for path in sorted(FOLDER.iterdir()) if path.suffix in KINDS}


def wanted(http: Request) -> bool:
    """Whether the client prefers a page to JSON, as browsers do."""
    kinds = {}
    for part in http.headers.get("accept", "").lower().split(","):
        kind, _, parameters = part.partition(";")
        kinds[kind.strip()] = _quality(parameters)
    return kinds.get("text/html", 0.0) > kinds.get("application/json", 0.0)


def _quality(parameters: str) -> float:
    """The value of q, 1 without it, 0 if it is not a number."""
    for parameter in parameters.split(";"):
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            try:
                return float(value)
            except ValueError:
                return 0.0
    return 1.0


def sent(http: Request, name: str) -> Response:
    """The file of this name; 304 if the client has it. Refused (404) if there is none."""
    content = files().get(name)
    if content is None:
        raise Refused(404, f"the page has no file {name!r}")
    mark = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {**HEADERS, "ETag": mark, "Vary": "Accept"}
    if mark in http.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(content, media_type=KINDS[Path(name).suffix], headers=headers)


@router.get("/page/{name}", include_in_schema=False)
async def file(http: Request, name: str) -> Response:
    """A script, a style or an image of the page."""
    return sent(http, name)
