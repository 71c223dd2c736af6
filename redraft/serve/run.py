"""The process of a server: load, listen, and end in an orderly way."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from time import monotonic
from types import FrameType
from typing import Any

import typer
import uvicorn

from redraft.config import EngineConfig, SamplingParams
from redraft.llm import LLM
from redraft.serve.config import ServeConfig
from redraft.serve.errors import Refused
from redraft.serve.limits import patient
from redraft.serve.openai import Service, app

GRACE = 2.0  # seconds in which streams that were ended may tell so
TICK = 0.05


class Server(uvicorn.Server):
    """First signal: no new requests, those under way go on for `shutdown_timeout` seconds. Second: all ends now.

    SIGINT stays ignored where it was when the process started, as in background jobs of a script."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service
        self.dead = False
        self.ignores_sigint = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        service.shell.stopped = self._stopped

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
        """Waits for requests, while new ones are told to go elsewhere (503); then ends what is left with an error that its client can
        read."""
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
        ws="none",
        lifespan="on",
        server_header=False,
    )
    return Server(config, application.state.service)


def run(engine: EngineConfig, serve: ServeConfig) -> int:
    """Serves until a signal. 0, or 1 where the engine died."""
    llm = LLM(config=engine)
    policies = {seam: getattr(serve, seam) for seam in ("keep", "codec", "read", "depth")}
    llm.engine.policies.check(SamplingParams(**policies))  # clashes are told now, not to the first client
    made = server(llm, serve)
    names = ", ".join(made.service.names)
    drafts = f"draft {llm.config.draft}, {llm.config.schedule.draft_rows} rows"
    limit = f"texts of up to {llm.max_model_len} tokens"
    typer.echo(f"{names}: backend {llm.runner.backend.name}, {drafts}, {limit}, {llm.guarantee.label}", err=True)
    with contextlib.suppress(KeyboardInterrupt):
        made.run()
    if not made.started and not made.dead:
        return 1  # uvicorn has said why: the address is taken, mostly
    sys.stderr.flush()
    return int(made.dead)
