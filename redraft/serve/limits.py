"""Checks of every request before a route sees it: host and origin, key, size of the body, and time-outs of clients that neither send
nor read. Connections are in connection.py."""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Awaitable, Callable, Mapping
from collections.abc import Sequence as Seq
from time import monotonic
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from redraft.serve.config import ServeConfig
from redraft.serve.errors import Refused, body_of, refused
from redraft.serve.origins import Origins

OPEN = ("", "/", "/health", "/ready", "/version", "/metrics")  # answered without a key
PAGE = "/page/"  # begins the paths of the page's files, which need no key either
ADMIN = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")  # answered with the admin key only
KEY_HEADERS: dict[str, bytes] = {}  # begin of a path -> a header that may hold the key there, besides Authorization
ADMITTED = "redraft.admin"  # key of the scope: the request had that key
ENDED = "redraft.ended"  # key of the scope: what to call when the answer has ended
REFUSED = "redraft.refused"  # key of the scope: the error of its body, because FastAPI turns any error of reading into a plain 400
ABORT = "redraft.abort"  # key of the scope's state: cuts the connection off
LOADS = "adapters are loaded at run time only by a server that was started with --lora-dir and --admin-key"
LINGER = 2.0  # seconds for which a refused body is still received, so that the client reads the answer

log = logging.getLogger("redraft.serve")


class ClientGone(Exception):
    """The client has left; there is no answer."""


class Limits:
    """ASGI middleware, the outermost but for CORS. It turns every exception into an answer."""

    def __init__(self, app: ASGIApp, config: ServeConfig) -> None:
        self.app, self.config = app, config
        self.keys = [key.encode() for key in config.api_key]
        self.admin = [] if config.admin_key is None else [config.admin_key.encode()]
        self.origins = Origins(config)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun = False

        async def sending(message: Message) -> None:
            nonlocal begun
            if (error := scope.get(REFUSED)) is not None:
                raise error
            begun = True
            try:
                async with asyncio.timeout(self.config.idle_timeout):  # wait_for would make a task of each piece of a stream
                    await send(message)
            except TimeoutError:
                scope.get("state", {}).get(ABORT, _nothing)()
                raise ClientGone from None

        try:
            await self._admit(scope, receive)
            await self.app(scope, self._receiving(scope, receive), sending)
        except ClientGone:
            pass
        except Exception as error:
            reply = refused(error)
            if reply is not error and reply.status == 500:
                log.error("%s %s failed", scope["method"], scope["path"], exc_info=error)
            if begun:
                return  # half an answer: uvicorn closes the connection
            await answer(reply, scope)(scope, receive, send)
        finally:
            scope.get(ENDED, _nothing)()

    async def _admit(self, scope: Scope, receive: Receive) -> None:
        headers = dict(scope["headers"])
        if b"content-length" in headers and b"transfer-encoding" in headers:  # else servers may disagree on the length (smuggling)
            await _drain(receive)
            raise Refused(400, "Content-Length and Transfer-Encoding exclude each other", headers={"Connection": "close"})
        self.origins.check(scope, headers)
        scope["redraft.key"] = ""
        path, asks = scope["path"].removeprefix(scope.get("root_path", "")), scope["method"] != "OPTIONS"
        if asks and path in ADMIN and self.config.loads:
            _authorized(headers, self.admin, "the admin key")
            scope[ADMITTED] = True
        elif asks and self.keys and path not in OPEN and not path.startswith(PAGE):
            scope["redraft.key"] = _authorized(headers, self.keys, "a key", key_header(path)).decode("latin-1")
        if asks and path in ADMIN and not self.config.loads:
            raise Refused(403, LOADS)
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self.config.max_body:
            if b"expect" not in headers:  # else the client waits for permission and sends nothing
                await _drain(receive)
            raise self._large()

    def _receiving(self, scope: Scope, receive: Receive) -> Receive:
        size, whole = 0, False
        until = monotonic() + (self.config.request_timeout or float("inf"))

        async def receiving() -> Message:
            try:
                return await checked()
            except Exception as error:
                scope[REFUSED] = error
                raise

        async def checked() -> Message:
            nonlocal size, whole
            try:
                patience = min(self.config.idle_timeout, max(0.0, until - monotonic()))
                message = await (receive() if whole else asyncio.wait_for(receive(), patience))
            except TimeoutError:
                raise Refused(408, "the body did not arrive in time", headers={"Connection": "close"}) from None
            if message["type"] == "http.disconnect" and not whole:
                raise ClientGone
            if message["type"] == "http.request":
                size += len(message.get("body", b""))
                whole = not message.get("more_body", False)
                if size > self.config.max_body:
                    if not whole:
                        await _drain(receive)
                    raise self._large()
            return message

        return receiving

    def _large(self) -> Refused:
        return Refused(413, f"the body has more than {self.config.max_body} bytes", headers={"Connection": "close"})


def key_header(path: str) -> bytes:
    """The header that may hold the key of a request to this path, besides Authorization; empty if there is none."""
    return next((header for begin, header in KEY_HEADERS.items() if path.startswith(begin)), b"")


def _authorized(headers: Mapping[bytes, bytes], keys: Seq[bytes], needed: str, header: bytes = b"") -> bytes:
    """The key of the request, if it is one of these; else Refused (401). header: one that may hold it instead; if a request has both,
    both must hold one of these."""
    scheme, _, bearer = headers.get(b"authorization", b"").partition(b" ")
    given = [bearer.strip()] if scheme.lower() == b"bearer" else []
    if header and header in headers:
        given.append(headers[header].strip())
    matches = [[hmac.compare_digest(one, key) for key in keys] for one in given]  # compares all keys, so that times are equal
    if not given or not all(any(several) for several in matches):
        other = f", or {header.decode()}: KEY" if header else ""
        raise Refused(401, f"{needed} of this server is needed: Authorization: Bearer KEY{other}", code="invalid_api_key")
    return given[0]


async def _drain(receive: Receive) -> None:
    try:
        async with asyncio.timeout(LINGER):
            while (message := await receive())["type"] == "http.request" and message.get("more_body", False):
                pass
    except TimeoutError:
        pass


def _nothing() -> None:
    pass


def answer(error: Refused, scope: Scope) -> Any:
    from starlette.responses import JSONResponse

    headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    return JSONResponse(body_of(error, path), error.status, headers=headers | error.headers)


async def gone(receive: Receive) -> None:
    """Returns when the client has left, after its body was read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(receive: Receive, work: Awaitable[Any], then: Callable[[], None] = lambda: None) -> Any:
    """What `work` returns. If the client leaves first, `work` is cancelled and ClientGone is raised. `then` is always called."""
    watch, task = asyncio.ensure_future(gone(receive)), asyncio.ensure_future(work)
    try:
        await asyncio.wait({watch, task}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        watch.cancel()
        task.cancel()
        await asyncio.gather(watch, task, return_exceptions=True)
        then()
