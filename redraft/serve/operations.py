"""The endpoints for operators of a server: information, health and metrics."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute

from redraft import __version__, registry
from redraft.ops.format import PAGE
from redraft.serve import documents, page
from redraft.serve.choices import FIELDS, cache_policy, public
from redraft.serve.config import ServeConfig
from redraft.serve.documents import answers
from redraft.serve.errors import Refused
from redraft.serve.service import service

router = APIRouter()


@router.get("/", **answers(documents.Index, html=True))
async def index(http: Request) -> Response:
    """The endpoints of this server; a browser gets the page."""
    if page.wanted(http):
        return page.sent(http, "index.html")
    found = {"name": "redraft", "version": __version__, "endpoints": http.app.state.endpoints}
    return JSONResponse(found, headers={"Vary": "Accept"})


@router.head("/", include_in_schema=False)
async def alive() -> Response:
    """Whether the server answers, as Ollama's program asks."""
    return Response()


@router.get("/health", **answers(documents.Healthy, 503))
async def health(http: Request) -> dict[str, str]:
    """Whether the engine works: 503 if it stopped or if a step takes longer than step_timeout."""
    here = service(http)
    if not here.shell.alive:
        raise Refused(503, "the engine stopped")
    limit = here.config.step_timeout
    if limit and (seconds := here.shell.stalled) > limit:
        raise Refused(503, f"the engine's step has taken {seconds:.0f} seconds: more than step_timeout = {limit:g}")
    return {"status": "ok"}


@router.get("/ready", **answers(documents.Ready, 503))
async def ready(http: Request) -> dict[str, str]:
    """Whether new requests are taken."""
    shell = service(http).shell
    if shell.draining or not shell.alive or not any(worker.ready for worker in shell.host.figures().values()):
        raise Refused(503, "no new requests are taken")
    return {"status": "ready"}


@router.get("/version", **answers(documents.Version))
async def version() -> dict[str, str]:
    """The version of Redraft."""
    return {"version": __version__}


@router.get("/metrics", response_class=Response, **answers(None))
async def metrics(http: Request) -> Response:
    """Figures for Prometheus."""
    return Response(service(http).metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/server_info", **answers(documents.ServerInfo))
async def server_info(http: Request) -> dict[str, Any]:
    """What is served, and what a request may choose."""
    here = service(http)
    llm, config = here.llm, here.llm.config
    spec, backend = llm.spec, llm.backend
    return {
        "version": __version__,
        "models": list(here.names),
        "adapters": here.llm.loras,
        "family": spec.family,
        "max_model_len": llm.max_model_len,
        "backend": backend.name,
        "dtype": str(backend.dtype).removeprefix("torch."),
        "device": str(backend.device),
        "threads": backend.threads,
        "quant": config.model.quant and public("quant", config.model.quant),
        "draft": public("draft", config.draft),
        "verify": config.verify,
        "guarantee": llm.guarantee_with_policy(here.own).label,
        "scheduler": config.schedule.model_dump(),
        "cache": {
            "pages": llm.blocks * len(here.host.workers),
            "tokens_per_page": PAGE,
            "prefix_sharing": config.cache.prefix_sharing,
            "on_disk": config.cache.kept is not None,
        },
        "workers": [
            {"name": name, "ready": now.ready, "starts": now.starts, "running": now.running, "waiting": now.waiting}
            for name, now in here.host.figures().items()
        ],
        "policies": {seam: _policy(here.config, seam) for seam in ("keep", "codec", "read", "depth", "steer")},
        "cache_policy": [{"prompt_tokens": n, "policy": cache_policy(llm.cached(here.own, n))} for n in llm.cache_lengths],
        "parsers": here.prompts.formats.names,
        "methods": {seam: sorted(registry.METHODS[seam]) for seam in FIELDS},
        "limits": here.config.model_dump(include={"max_queue", "request_timeout", "max_body", "max_n", "max_logprobs", "max_stop"}),
    }


@router.post("/reset_prefix_cache", **answers(documents.Pages, 503))
async def reset_prefix_cache(http: Request) -> dict[str, int]:
    """Drops cached prefixes that no running text uses."""
    here = service(http)
    return {"pages": await here.host.forget_prefixes()}


def _policy(config: ServeConfig, seam: str) -> str | None:
    text: str | None = getattr(config, seam)
    return text and public(seam, text)


def endpoints(*routers: APIRouter) -> list[dict[str, str]]:
    """Method, path and purpose of each route."""
    routes = [route for one in routers for route in one.routes if isinstance(route, APIRoute) and route.include_in_schema]
    return [
        {"method": method, "path": route.path.replace(":path", ""), "about": (route.description or "").partition("\n")[0]}
        for route in routes
        for method in sorted(route.methods or ())
    ]
