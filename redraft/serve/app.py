"""The ASGI application: routes, middleware, and errors in one form."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import asynccontextmanager
from typing import Any, cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from redraft import __version__
from redraft.llm import LLM
from redraft.serve import adapters, documents, openai, operations
from redraft.serve.config import ServeConfig
from redraft.serve.errors import Refused, clean
from redraft.serve.limits import Limits, answer
from redraft.serve.schema import near_field
from redraft.serve.service import Service


def app(llm: LLM, config: ServeConfig) -> FastAPI:
    """The ASGI application over a loaded model."""
    here = Service(llm, config)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        here.shell.start()
        yield
        await here.shell.stop()

    made = FastAPI(title="Redraft", version=__version__, lifespan=lifespan, openapi_url="/openapi.json", docs_url=None, redoc_url=None)
    routers = (openai.router, adapters.router, operations.router)
    made.state.service, made.state.endpoints = here, operations.endpoints(*routers)
    for router in routers:
        made.include_router(router)
    documents.describe(made, config)
    _answer_errors(made)
    made.add_middleware(Limits, config=config)
    if config.allow_origins:
        made.add_middleware(CORSMiddleware, allow_origins=list(config.allow_origins), allow_methods=["*"], allow_headers=["*"])
    return made


def _answer_errors(made: FastAPI) -> None:
    @made.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return cast(Response, answer(Refused(400, *_wrong(error.errors(), error.body))))

    @made.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> Response:
        status = error.status_code if error.status_code in (404, 405) else 400
        return cast(Response, answer(Refused(status, str(error.detail), headers=dict(error.headers or {}))))

    @made.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        raise error  # Limits answers it


def _wrong(errors: Seq[Mapping[str, Any]], body: Any) -> tuple[str, str | None]:
    """(message, field) of the first error in a body. If a body has several allowed forms, the error of the nearest form."""
    if isinstance(body, bytes):
        return "the body is not read: its content type is not JSON", None
    same = (one for one in errors if one["loc"][:2] == errors[0]["loc"][:2])
    first = max(same, key=lambda one: (len(one["loc"]), not str(one["type"]).endswith("_type")))
    parts, around = [], body
    for part in first["loc"][1:]:  # among them are names of types
        if (isinstance(body, dict) and part in body) or (isinstance(body, list) and isinstance(part, int)):
            parts.append(str(part))
            around, body = body, body[part]
    if first["type"] == "missing":
        parts.append(str(first["loc"][-1]))
    place = ".".join(parts)
    kind, text = first["type"], str(first["msg"]).removeprefix("Value error, ")
    if kind == "extra_forbidden":
        near = near_field(parts[-1], around) if parts else None
        return f"unknown field {place!r}" + (f"; did you mean {near!r}?" if near else ""), place
    if kind == "json_invalid":
        return f"the body is not JSON: {first.get('ctx', {}).get('error', text)}", None
    if kind == "value_error" and not place:
        return text, text.partition(":")[0] or None
    given = clean(repr(first.get("input")))[:80]
    return f"{place or 'body'} = {given}: {text[:1].lower()}{text[1:]}", place or None
