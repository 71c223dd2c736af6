"""A server as users run it, with uvicorn, in a thread of the test process."""

from __future__ import annotations

import asyncio
import threading
import time
from types import TracebackType
from typing import Any, Self

import openai

from redraft.serve.config import ServeConfig
from redraft.serve.run import server

PATIENCE = 300.0  # seconds; on an idle machine almost none are needed


def soon(what: Any) -> None:
    """Waits until `what()` is true."""
    until = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < until, "it did not come to be so"
        time.sleep(0.005)


class Live:
    """Serves `llm` on a free port within the block. Servers over siblings of one model may run together, but not be busy together."""

    def __init__(self, llm: Any, host: Any = None, **settings: Any) -> None:
        """llm: an LLM, or a model without weights for a `host`."""
        self.llm = llm
        self.server = server(llm, ServeConfig(port=0, log_level="error", access_log=False, shutdown_timeout=0, **settings), host)
        self.service = self.server.service
        self.thread = threading.Thread(target=self.server.run, name="server")

    def __enter__(self) -> Self:
        self.thread.start()
        soon(lambda: self.server.started or not self.thread.is_alive())
        self.url = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.server.should_exit = True
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()
        assert not self.service.shell.alive

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0, "timeout": PATIENCE, **options})

    def asynchronous(self, **options: Any) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0, "timeout": PATIENCE, **options})

    def rest(self, until: threading.Event) -> None:
        """The engine's thread does nothing before that."""
        loop = self.service.host.loop
        asyncio.run_coroutine_threadsafe(self.service.host.call(lambda: until.wait(PATIENCE)), loop).result(PATIENCE)

    def aborted(self) -> float:
        """The number of requests that were ended because nobody waited for them."""
        lines = self.service.metrics.exposition().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if "request_success_total{" in line and 'finished_reason="abort"' in line)

    def settle(self) -> None:
        """After any traffic: nothing runs, nothing waits, no page is in use."""
        engine = self.llm.engine
        soon(lambda: not self.service.shell.busy and not engine.has_work)
        assert self.service.shell.alive
        assert not engine.outputs
        for runner in (engine.runner, *engine.runner.draft_models.values()):
            runner.memory.check()
            assert runner.memory.used() == 0
