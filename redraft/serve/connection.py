"""Connections of clients that do not send a whole request, do not read, or close their side."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from redraft.serve.errors import Refused
from redraft.serve.limits import ABORT

BEGINNING = b"HTTP/1.1 "  # of every answer
LOOK = 0.1  # seconds between checks whether a client that has closed its sending side is still there


class Rest:
    """A transport whose first write lacks the BEGINNING, which was sent before."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport, self._begun = transport, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        self._transport.write(data if self._begun else data.removeprefix(BEGINNING))
        self._begun = True


class Protocol(H11Protocol):
    """A connection. The head of a request must arrive within idle_timeout, the client must read, and errors have the same form as all
    others. A client may close its sending side after its request and still read the answer."""

    idle_timeout: float  # set by `patient`

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.app_state = {**self.app_state, ABORT: self._abort}
        self._late: asyncio.TimerHandle | None = None  # runs while a head is awaited
        self._unread = 0  # bytes that the client had not read at the last check
        self._half_closed = False  # the client sends nothing more

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

    def eof_received(self) -> bool:  # type: ignore[override]
        """A client that closes both sides looks the same until it refuses what is sent to it, so the first bytes of the answer, which
        are always the same, are sent at once. True: the connection stays open for the answer."""
        whole = self.conn.their_state in (h11.DONE, h11.MUST_CLOSE)
        if self.scheme == "https" or not whole or self.cycle is None or self.cycle.response_complete:
            return False
        self._half_closed = True
        if not self.cycle.response_started:
            self.transport.write(BEGINNING)
            self.cycle.transport = Rest(self.transport)  # type: ignore[assignment]
        self._look()
        return True

    def _look(self) -> None:
        """Ends the connection if the client has closed it, and checks again later."""
        if self.transport.is_closing() or self.cycle.response_complete:
            return
        if self.transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self._abort()
        else:
            self.loop.call_later(LOOK, self._look)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._half_closed:
            self.transport.close()
        if self.transport.is_closing():
            self._reap()

    def timeout_keep_alive_handler(self) -> None:
        """Nothing came after an answer: the connection is closed, at once if the answer was not read."""
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
            self._refuse(Refused(408, "the head of the request did not arrive in time"))
        else:
            self.transport.close()

    def _reap(self) -> None:
        """Ends a finished connection as soon as its client has stopped reading the rest."""
        left = self.transport.get_write_buffer_size()
        if left and left == self._unread:
            self._abort()
        elif left:
            self._unread = left
            self.loop.call_later(self.idle_timeout, self._reap)
        else:
            self.transport.close()

    def _abort(self) -> None:
        """Closes without waiting for the client to read."""
        self.transport.abort()


def patient(idle_timeout: float) -> type[Protocol]:
    """The class of connections that uvicorn uses."""
    return type("Connection", (Protocol,), {"idle_timeout": idle_timeout})
