"""The host with one engine, in a thread of this process."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

from redraft.core.sequence import Request
from redraft.engine.output import Event
from redraft.errors import Unavailable
from redraft.llm import LLM
from redraft.workers.host import Figures
from redraft.workers.thread import EngineThread

NAME = "0"  # of the only worker
STOPPED = "the engine stopped"


class Local:
    """`start` it in a running event loop."""

    workers: tuple[str, ...] = (NAME,)

    def __init__(self, llm: LLM) -> None:
        self.llm, self.engine = llm, llm.engine
        self.thread = EngineThread(llm.engine, self._events, lambda error: self._post(self._died, error))
        self._calls: set[asyncio.Future[Any]] = set()

    async def prepare(self) -> None:
        """Nothing is left to do."""

    def start(self, deliver: Callable[[list[Event]], None], dead: Callable[[BaseException], None]) -> None:
        self.loop, self._deliver, self._dead = asyncio.get_running_loop(), deliver, dead
        self.thread.start()

    async def stop(self) -> None:
        await asyncio.to_thread(self.thread.stop)

    async def restart(self) -> None:
        """The only worker stays."""

    @property
    def alive(self) -> bool:
        return self.thread.alive

    @property
    def free(self) -> int:
        return max(0, self.engine.scheduler.max_seqs - len(self.engine.running))

    def figures(self) -> dict[str, Figures]:
        return {NAME: Figures.of(self.engine, self.thread.busy)}

    def worker(self, request_id: str) -> str:
        return NAME

    async def add(self, requests: Seq[Request]) -> None:
        def add() -> None:
            try:
                for request in requests:
                    self.engine.add(request)
            except BaseException:
                for request in requests:
                    self.engine.abort(request.id)
                raise

        await self.call(add)

    def abort(self, request_id: str) -> None:
        self.thread.abort(request_id)

    async def forget_prefixes(self) -> int:
        return int(await self.call(self.engine.forget_prefixes))

    async def load_lora(self, name: str, folder: Path) -> None:
        await asyncio.to_thread(self.llm.load_lora, name, folder)

    async def unload_lora(self, name: str) -> None:
        self.llm.unload_lora(name)

    async def call(self, task: Callable[[], Any]) -> Any:
        """The result of `task`, or its error. The engine's thread runs it between two steps."""
        if not self.alive:
            raise Unavailable(STOPPED)
        done: asyncio.Future[Any] = self.loop.create_future()
        self._calls.add(done)
        done.add_done_callback(self._calls.discard)

        def settle(value: Any, error: BaseException | None) -> None:
            if not done.done():
                done.set_result(value) if error is None else done.set_exception(error)

        def run() -> None:
            try:
                value, error = task(), None
            except Exception as raised:
                value, error = None, raised
            self._post(settle, value, error)

        self.thread.do(run)
        return await done

    def _post(self, what: Callable[..., None], *about: Any) -> None:
        """Calls it in the event loop, unless that has ended during a step that took too long."""
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(what, *about)

    def _events(self, events: list[Event]) -> None:
        self._post(self._deliver, events)

    def _died(self, error: BaseException) -> None:
        for done in list(self._calls):
            if not done.done():
                done.set_exception(Unavailable(STOPPED))
        self._dead(error)
