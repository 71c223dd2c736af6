"""What holds for every request before anyone reads it: keys, the size of bodies, and how long a client may neither send nor read."""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from redraft.serve.config import ServeConfig
from redraft.serve.errors import Refused, refused

OPEN = ("/health", "/ready", "/version", "/metrics")  # asked by machines that have no key

log = logging.getLogger("redraft.serve")


class ClientGone(Exception):
    """Nobody is there to be answered."""


class Limits:
    """ASGI middleware, the outermost: also what others let fall becomes an answer here."""

    def __init__(self, app: ASGIApp, config: ServeConfig) -> None:
        self.app, self.config = app, config
        self.keys = [key.encode() for key in config.api_key]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun = False

        async def sending(message: Message) -> None:
            nonlocal begun
            begun = True
            try:
                async with asyncio.timeout(self.config.idle_timeout):  # wait_for would make a task of each piece of a stream
                    await send(message)
            except TimeoutError:
                raise ClientGone from None

        try:
            self._admit(scope)
            await self.app(scope, self._receiving(scope, receive), sending)
        except ClientGone:
            pass
        except Exception as error:
            if not isinstance(error, Refused):
                log.error("%s %s failed", scope["method"], scope["path"], exc_info=error)
            if begun:
                raise ClientGone from None  # half an answer: the connection is closed
            await answer(refused(error))(scope, receive, send)

    def _admit(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        scope["redraft.key"] = ""
        if self.keys and scope["method"] != "OPTIONS" and scope["path"].removeprefix(scope.get("root_path", "")) not in OPEN:
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            matches = [hmac.compare_digest(given.strip(), key) for key in self.keys]  # all of them, whichever it is
            if scheme.lower() != b"bearer" or not any(matches):
                raise Refused(401, "a key of this server is needed: Authorization: Bearer KEY", code="invalid_api_key")
            scope["redraft.key"] = given.strip().decode("latin-1")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self.config.max_body:
            raise self._large()

    def _receiving(self, scope: Scope, receive: Receive) -> Receive:
        size, whole = 0, False

        async def receiving() -> Message:
            nonlocal size, whole
            try:
                message = await (receive() if whole else asyncio.wait_for(receive(), self.config.idle_timeout))
            except TimeoutError:
                raise Refused(408, f"nothing of the body came for {self.config.idle_timeout:g} seconds") from None
            if message["type"] == "http.disconnect" and not whole:
                raise ClientGone
            if message["type"] == "http.request":
                size += len(message.get("body", b""))
                whole = not message.get("more_body", False)
                if size > self.config.max_body:
                    raise self._large()
            return message

        return receiving

    def _large(self) -> Refused:
        return Refused(413, f"the body has more than {self.config.max_body} bytes", headers={"Connection": "close"})


def answer(error: Refused) -> Any:
    from starlette.responses import JSONResponse

    headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
    return JSONResponse(error.body, error.status, headers=headers | error.headers)


async def gone(receive: Receive) -> None:
    """Returns when the client has left, behind a body that was read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(receive: Receive, work: Awaitable[Any], then: Callable[[], None] = lambda: None) -> Any:
    """What `work` returns; ClientGone, and `work` cancelled, should the client leave before. `then` is called in any case."""
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
