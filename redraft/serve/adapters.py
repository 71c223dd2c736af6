"""Adapters loaded and unloaded at run time, by the admin key alone. Clients name subfolders of one folder and never paths."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path
from time import monotonic
from typing import Any

from fastapi import APIRouter, Request

from redraft.config import ADAPTER_NAME
from redraft.errors import OutOfMemory, RedraftError
from redraft.models import adapter
from redraft.serve import documents, schema
from redraft.serve.documents import answers
from redraft.serve.errors import Refused, without_paths
from redraft.serve.limits import ADMIN, ADMITTED, LOADS, unless_gone
from redraft.serve.openai import about
from redraft.serve.prompts import LATE
from redraft.serve.service import Service, service

TICK = 0.02
LOAD, UNLOAD = ADMIN

router = APIRouter()
log = logging.getLogger("redraft.serve")


@router.post(LOAD, **answers(documents.Model, 404, 503, 504))
async def load_lora_adapter(http: Request, body: schema.AdapterRequest) -> dict[str, Any]:
    """Loads the adapter in a subfolder of --lora-dir. Its name is then a model's."""
    here, name = _admitted(http), body.lora_name
    if not ADAPTER_NAME.fullmatch(name):
        raise Refused(400, f"lora_name = {name!r}: at most 64 letters, digits, '.', '-' and '_', not '.' first", "lora_name")
    if name in here.names:
        raise Refused(400, f"lora_name = {name!r}: is the name of the model", "lora_name")
    await unless_gone(http.receive, _load(here, name, here.deadline))
    return about(here, name)


@router.post(UNLOAD, **answers(documents.Unloaded, 404, 504))
async def unload_lora_adapter(http: Request, body: schema.AdapterRequest) -> dict[str, Any]:
    """Unloads an adapter. New requests for it are refused at once; the answer comes when those under way have ended."""
    here = _admitted(http)
    deadline = here.deadline
    found = here.llm.adapters.get(body.lora_name)
    if found is None:
        raise Refused(404, f"no adapter {body.lora_name!r} is loaded", "lora_name", "model_not_found")
    await unless_gone(http.receive, _unload(here, body.lora_name, found, deadline))
    return {"id": body.lora_name, "object": "model", "deleted": True}


def _admitted(http: Request) -> Service:
    if not http.scope.get(ADMITTED):
        raise Refused(403, LOADS)
    return service(http)


async def _load(here: Service, name: str, deadline: float) -> None:
    """In a thread, so that other requests continue. After the deadline the adapter may still come to be loaded."""
    try:
        async with asyncio.timeout(max(0.0, deadline - monotonic()) if deadline < float("inf") else None):
            await here.host.load_lora(name, _folder(here, name))
    except TimeoutError:
        raise Refused(504, LATE) from None
    except RedraftError as error:
        folder = f"{here.config.lora_dir}/{name}"
        text = str(error).replace(f"{folder}/", "").replace(folder, name)
        raise Refused(503 if isinstance(error, OutOfMemory) else 400, without_paths(text), "lora_name") from None


def _folder(here: Service, name: str) -> Path:
    """Refused (404) if there is no such folder in --lora-dir, or if it or its files lie elsewhere."""
    assert here.config.lora_dir is not None
    folder, top = here.config.lora_dir / name, os.path.realpath(here.config.lora_dir)
    files = [Path(os.path.realpath(folder / file)) for file in (adapter.CONFIG, adapter.TENSORS)]  # unlike Path's, they never raise
    if not os.path.isdir(folder) or not all(file.parent.parent == Path(top) for file in files):
        log.warning("no adapter is loaded from %s: it is no folder there, or leads elsewhere", folder)
        raise Refused(404, f"no adapter {name!r} in the folder of this server's adapters", "lora_name", "model_not_found")
    return folder


async def _unload(here: Service, name: str, found: adapter.Adapter, deadline: float) -> None:
    try:
        async with asyncio.timeout(max(0.0, deadline - monotonic()) if deadline < float("inf") else None):
            await here.host.unload_lora(name)
            while here.uses[found]:
                await asyncio.sleep(TICK)
    except TimeoutError:
        raise Refused(504, f"{LATE}: requests still use the adapter; new ones are refused") from None
