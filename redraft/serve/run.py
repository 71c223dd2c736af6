"""The process of a server: listen, load, serve, and end in an orderly way."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import sys
from pathlib import Path
from time import monotonic
from types import FrameType
from typing import Any

import typer
import uvicorn

from redraft.config import EngineConfig, SamplingParams
from redraft.errors import InvalidInput
from redraft.llm import LLM
from redraft.serve.app import app
from redraft.serve.config import ServeConfig
from redraft.serve.connection import patient
from redraft.serve.errors import Refused
from redraft.serve.service import Service

GRACE = 2.0  # seconds for the last events of streams that are ended
BACKLOG = 2048  # connections that wait to be accepted
TICK = 0.05


class Server(uvicorn.Server):
    """First signal: no new requests; running ones may end within `shutdown_timeout` seconds. Second: all end now."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service
        self.dead = False
        service.shell.stopped = self._stopped

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if sockets is not None:
            self._log_started_message(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.service.shell.draining:
            self.force_exit = True
        self.service.shell.draining = True
        self.should_exit = True

    def _stopped(self) -> None:
        self.dead = self.should_exit = self.service.shell.draining = True

    async def shutdown(self, sockets: Any = None) -> None:
        """Waits for running requests while new ones get 503; then ends the rest with an error that its client can read."""
        shell = self.service.shell
        until = monotonic() + self.service.config.shutdown_timeout
        while shell.busy and monotonic() < until and not self.force_exit and shell.alive:
            await asyncio.sleep(TICK)
        if shell.busy:
            shell.fail(Refused(503, "the server is shutting down", headers={"Retry-After": "5"}))
        self.config.timeout_graceful_shutdown = int(GRACE)
        self.force_exit = False  # uvicorn would skip the end of the application
        await super().shutdown(sockets)


def server(llm: LLM, serve: ServeConfig) -> Server:
    """Not yet listening; its `run` serves until a signal."""
    application = app(llm, serve)
    config = uvicorn.Config(
        application,
        host=serve.host,
        port=serve.port,
        uds=None if serve.uds is None else str(serve.uds),
        root_path=serve.root_path,
        ssl_keyfile=serve.ssl_keyfile,
        ssl_certfile=serve.ssl_certfile,
        log_level=serve.log_level,
        access_log=serve.access_log,
        timeout_keep_alive=max(1, int(min(serve.idle_timeout, 3600))),
        h11_max_incomplete_event_size=64 << 10,
        http=patient(serve.idle_timeout),
        backlog=BACKLOG,
        ws="none",
        lifespan="on",
        server_header=False,
    )
    return Server(config, application.state.service)


def listen(serve: ServeConfig) -> list[socket.socket]:
    """Sockets that listen already, so that a port in use is an error before the model loads. InvalidInput names host and port."""
    if serve.uds is not None:
        return [_listen_unix(serve.uds)]
    made: list[socket.socket] = []
    absent: OSError | None = None
    try:
        for family, _, protocol, _, address in socket.getaddrinfo(serve.host, serve.port, type=socket.SOCK_STREAM):
            port = address[1] or (made[0].getsockname()[1] if made else 0)  # one port for all addresses of a name
            try:
                made.append(_listen_at(family, protocol, (address[0], port, *address[2:])))
            except OSError as error:
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                absent = error  # such as ::1 of localhost, where IPv6 is off
        if absent is not None and not made:
            raise absent
    except OSError as error:
        for one in made:
            one.close()
        reason = "in use; choose another port, or 0 for any free one" if error.errno == errno.EADDRINUSE else error.strerror
        raise InvalidInput(f"host = {serve.host!r}, port = {serve.port}: {reason}") from None
    return made


def _listen_at(family: int, protocol: int, address: Any) -> socket.socket:
    one = socket.socket(family, socket.SOCK_STREAM, protocol)  # asyncio switches Nagle's delays off only where the protocol is given
    try:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        one.bind(address)
        one.listen(BACKLOG)
    except OSError:
        one.close()
        raise
    return one


def _listen_unix(path: Path) -> socket.socket:
    one = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.is_socket() and one.connect_ex(str(path)):  # left over: nothing answers there
            path.unlink()
            one.close()
            one = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        one.bind(str(path))
        path.chmod(0o666)
        one.listen(BACKLOG)
    except OSError as error:
        one.close()
        reason = "in use" if error.errno in (errno.EADDRINUSE, errno.EISCONN, errno.EINVAL) else error.strerror
        raise InvalidInput(f"uds = {str(path)!r}: {reason}") from None
    return one


def run(engine: EngineConfig, serve: ServeConfig) -> int:
    """Serves until a signal. 0, or 1 where the engine died."""
    sockets = listen(serve)
    try:
        llm = LLM(config=engine)
        policies = {seam: getattr(serve, seam) for seam in ("keep", "codec", "read", "depth")}
        llm.engine.policies.check(SamplingParams(**policies))  # a conflict is an error now, not for the first client
        made = server(llm, serve)
        names = ", ".join(made.service.names)
        typer.echo(
            f"{names}: backend {llm.runner.backend.name}, texts of up to {llm.max_model_len} tokens, {llm.guarantee.label}", err=True
        )
        with contextlib.suppress(KeyboardInterrupt):
            made.run(sockets)
    finally:
        for one in sockets:
            one.close()
        if serve.uds is not None:
            serve.uds.unlink(missing_ok=True)
    sys.stderr.flush()
    return int(made.dead or not made.started)
