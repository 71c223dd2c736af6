"""What holds for every request before anyone reads it: keys, the size of bodies, and how long a client may neither send nor read.

`Limits` sees requests; `Protocol`, below it, the connections: those that never become a request, and those whose client reads nothing.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import sys
from collections.abc import Awaitable, Callable
from time import monotonic
from typing import Any

import h11
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from redraft.serve.config import ServeConfig
from redraft.serve.errors import Refused, refused

OPEN = ("/health", "/ready", "/version", "/metrics")  # asked by machines that have no key
REFUSED = "redraft.refused"  # where it has what was wrong with its body: FastAPI makes a plain 400 of whatever reading it raises
ABORT = "redraft.abort"  # where a request's scope has the way to cut its connection off
LINGER = 2.0  # seconds for which a body that is refused is still taken in, so that the answer is read and not lost with the connection

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
            await answer(reply)(scope, receive, send)

    async def _admit(self, scope: Scope, receive: Receive) -> None:
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
            if b"expect" not in headers:  # who expects waits to be told, and sends nothing
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
                raise Refused(408, "the body did not come in time", headers={"Connection": "close"}) from None
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


async def _drain(receive: Receive) -> None:
    try:
        async with asyncio.timeout(LINGER):
            while (message := await receive())["type"] == "http.request" and message.get("more_body", False):
                pass
    except TimeoutError:
        pass


def _nothing() -> None:
    pass


class Protocol(H11Protocol):
    """A connection whose request's head must come within idle_timeout, whose client must go on reading, and whose errors look like
    all others."""

    idle_timeout: float  # set by `patient`

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.app_state = {**self.app_state, ABORT: self._abort}
        self._late: asyncio.TimerHandle | None = None  # runs while a head is awaited
        self._unread = 0  # bytes that the client had not taken when it was last looked

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            self._watch()
        else:
            self._unwatch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._reap()

    def timeout_keep_alive_handler(self) -> None:
        """Behind an answer nothing came: fine, unless the answer was not even read."""
        if self.transport.get_write_buffer_size():
            self._reap()
        else:
            super().timeout_keep_alive_handler()

    def send_400_response(self, msg: str) -> None:
        hint = getattr(sys.exception(), "error_status_hint", 400)
        self._refuse(Refused(hint if hint in (400, 431) else 400, msg))

    def _refuse(self, error: Refused) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(error.body).encode()
            headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), (b"connection", b"close")]
            response = h11.Response(status_code=error.status, headers=headers, reason=STATUS_PHRASES[error.status])
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
        self._reap()

    def _watch(self) -> None:
        if self._late is None and not self.transport.is_closing():
            self._late = self.loop.call_later(self.idle_timeout, self._too_late)

    def _unwatch(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _too_late(self) -> None:
        self._late = None
        if self.conn.trailing_data[0]:
            self._refuse(Refused(408, "the head of the request did not come in time"))
        else:
            self.transport.close()

    def _reap(self) -> None:
        """Ends a connection that is over as soon as its client has stopped taking what is left."""
        left = self.transport.get_write_buffer_size()
        if left and left == self._unread:
            self._abort()
        elif left:
            self._unread = left
            self.loop.call_later(self.idle_timeout, self._reap)
        else:
            self.transport.close()

    def _abort(self) -> None:
        """A close would wait for the client to read."""
        self.transport.abort()


def patient(idle_timeout: float) -> type[Protocol]:
    """The class that uvicorn makes connections of."""
    return type("Connection", (Protocol,), {"idle_timeout": idle_timeout})


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
