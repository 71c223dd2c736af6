"""The process of a server: load, serve, shut down."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
import threading
from collections.abc import Sequence as Seq
from time import monotonic
from types import FrameType
from typing import Any

import typer
import uvicorn

from redraft.columns import fold, width
from redraft.config import EngineConfig, SamplingParams
from redraft.engine.budgets import CACHE
from redraft.errors import InvalidInput, RedraftError
from redraft.front import POLICIES, Front
from redraft.llm import LLM
from redraft.models.memory import size
from redraft.ops.format import PAGE
from redraft.serve.app import app
from redraft.serve.config import ServeConfig
from redraft.serve.connection import patient
from redraft.serve.errors import Refused
from redraft.serve.listen import BACKLOG
from redraft.serve.service import Service
from redraft.workers.host import Host
from redraft.workers.ray_cluster import connect
from redraft.workers.ray_link import actors_of
from redraft.workers.several import workers_of

GRACE = 2.0  # seconds for the last events of streams that are ended
TICK = 0.05


class Server(uvicorn.Server):
    """First signal: no new requests; running ones may end within `shutdown_timeout` seconds. Second: all end now. SIGHUP: several workers
    start again, one after the other.

    SIGINT stays ignored if it was when the process started, as in background jobs of a script."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service
        self.dead = False
        self._restarting: asyncio.Task[None] | None = None
        self.ignores_sigint = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        service.shell.stopped = self._stopped

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        if len(self.service.host.workers) > 1 and threading.current_thread() is threading.main_thread():
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._restart)
        if not await self._prepared():
            self.dead = self.should_exit = True
            return
        await super().startup(sockets)
        if sockets is not None:
            self._log_started_message(sockets)

    async def _prepared(self) -> bool:
        """Whether workers are there; a signal ends the waiting for them."""
        host = self.service.host
        task = asyncio.create_task(host.prepare())
        while not task.done() and not self.should_exit:
            await asyncio.wait([task], timeout=TICK)
        if not task.done():
            task.cancel()
            await host.stop()
            return False
        if (error := task.exception()) is not None:
            if not isinstance(error, RedraftError):
                raise error
            typer.echo("\n".join(fold(f"error: {error}", width())), err=True)
            return False
        return True

    def _restart(self) -> None:
        if not self.started:
            return  # the workers are new
        if self._restarting is None or self._restarting.done():
            self._restarting = asyncio.create_task(self.service.host.restart())

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if sig == signal.SIGINT and self.ignores_sigint:
            return
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


def server(llm: Front, serve: ServeConfig, host: Host | None = None) -> Server:
    """Not yet listening; its `run` serves until a signal."""
    application = app(llm, serve, host)
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


def described(llm: Front, names: str, workers: Seq[str], own: SamplingParams) -> list[str]:
    """What runs, and the size of its cache. own: what requests get that choose nothing."""
    backend, blocks = llm.backend, llm.blocks
    drafts = f"draft {llm.config.draft} with {llm.config.schedule.draft_rows} rows"
    cache = f"cache of {size(blocks * backend.block_bytes(llm.spec))}, {blocks * PAGE} tokens"
    if len(workers) > 1:
        cache = f"workers {', '.join(workers)}, each with a {cache}"
    chosen = (
        []
        if (policy := llm.cache_policy) is None
        else [
            f"cache policy of prompts from {length} token{'s' * (length > 1)} on: {policy.described(length)}" for length in policy.lengths
        ]
    )
    return [
        f"{names}: backend {backend.name}, {drafts}, {llm.promise(own)}",
        f"{cache}; texts of up to {llm.max_model_len} tokens",
        *chosen,
    ]


def run(engine: EngineConfig, serve: ServeConfig, sockets: list[socket.socket]) -> int:
    """Serves on `sockets`, which listen already, until a signal. Then closes them. Returns 0, or 1 if the engine died."""
    ending = contextlib.ExitStack()
    try:
        policies = SamplingParams(**{seam: own for seam in POLICIES if (own := getattr(serve, seam)) is not None})
        if engine.cache.policy is not None and (both := next((seam for seam in CACHE if getattr(serve, seam)), None)):
            raise InvalidInput(f"cache_policy and {both} exclude each other: both are for requests that choose nothing")
        llm: Front
        if serve.on_ray:
            machines = ending.enter_context(connect(serve.ray_address, len(serve.stages) * (engine.model.threads or 1)))
            llm, host = actors_of(machines, engine, serve.stages, serve.router, policies, serve.step_timeout)
            made = server(llm, serve, host)
        elif len(serve.stages) > 1:
            llm, host = workers_of(engine, serve.stages, serve.router, policies, serve.step_timeout)
            made = server(llm, serve, host)
        else:
            llm = own = LLM(config=engine)
            own.engine.policies.check(policies)  # a conflict is an error now, not for the first client
            made = server(llm, serve)
        names = ", ".join([*made.service.names, *(f"{name} (adapter)" for name in llm.loras)])
        said = described(llm, names, made.service.host.workers, policies)
        if made.ignores_sigint:
            said.append("SIGINT is ignored, as in background jobs of a script: stop the server with SIGTERM")
        typer.echo("\n".join(line for one in said for line in fold(one, width())), err=True)
        with contextlib.suppress(KeyboardInterrupt):
            made.run(sockets)
    finally:
        ending.close()
        for one in sockets:
            one.close()
        if serve.uds is not None:
            serve.uds.unlink(missing_ok=True)
    sys.stderr.flush()
    return int(made.dead or not made.started)
