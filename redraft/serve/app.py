"""The ASGI application: routes, middleware, and errors in one form."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from redraft import __version__
from redraft.front import Front
from redraft.llm import LLM
from redraft.serve import adapters, documents, llama_cpp, messages, ollama, openai, operations, page, responses, score
from redraft.serve.config import ServeConfig
from redraft.serve.errors import Refused
from redraft.serve.invalid import wrong
from redraft.serve.limits import Limits, answer
from redraft.serve.service import Service
from redraft.serve.stored import Stored
from redraft.workers.host import Host
from redraft.workers.local import Local


def app(llm: Front, config: ServeConfig, host: Host | None = None) -> FastAPI:
    """The ASGI application over a loaded model, or over a host that computes the requests of `llm`."""
    if host is None:
        assert isinstance(llm, LLM), "a model without weights needs a host"
        host = Local(llm)
    here = Service(llm, host, config)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        here.shell.start()
        yield
        await here.shell.stop()

    made = FastAPI(title="Redraft", version=__version__, lifespan=lifespan, openapi_url="/openapi.json", docs_url=None, redoc_url=None)
    made.state.stored = Stored(config.stored_responses, config.stored_bytes)
    routers = (
        openai.router, responses.router, messages.router, ollama.router, llama_cpp.router, score.router, adapters.router,
        operations.router,
    )  # fmt: skip
    made.state.service, made.state.endpoints = here, operations.endpoints(*routers)
    for router in routers:
        made.include_router(router)
    made.include_router(page.router)
    documents.describe(made, config)
    _answer_errors(made)
    made.add_middleware(Limits, config=config)
    if config.allow_origins:
        made.add_middleware(CORSMiddleware, allow_origins=list(config.allow_origins), allow_methods=["*"], allow_headers=["*"])
    return made


def _answer_errors(made: FastAPI) -> None:
    @made.exception_handler(RequestValidationError)
    async def invalid(http: Request, error: RequestValidationError) -> Response:
        return cast(Response, answer(Refused(400, *wrong(error.errors(), error.body)), http.scope))

    @made.exception_handler(HTTPException)
    async def http_error(http: Request, error: HTTPException) -> Response:
        status = error.status_code if error.status_code in (404, 405) else 400
        return cast(Response, answer(Refused(status, str(error.detail), headers=dict(error.headers or {})), http.scope))

    @made.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        raise error  # Limits answers it
