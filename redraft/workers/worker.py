"""A worker: an engine that takes messages and sends messages, wherever it runs."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from time import monotonic
from typing import Any, Protocol

from redraft.core.sequence import Request
from redraft.engine.output import Event
from redraft.engine.parcel import Parcel, Source
from redraft.llm import LLM
from redraft.workers.host import Figures
from redraft.workers.message import (
    Abort,
    About,
    Add,
    Adopt,
    Call,
    Parked,
    Piece,
    Pieces,
    Ready,
    Reply,
    Settled,
    State,
    WorkerError,
    plain,
)
from redraft.workers.thread import EngineThread

log = logging.getLogger("redraft.workers")
TICK = 0.25  # seconds between two messages about the state
SOURCES = 64  # other workers whose pages stay open, at most


class ClosableSource(Source, Protocol):
    def close(self) -> None: ...


class Worker:
    """send: takes a message to the front, from any thread; it raises OSError if the front is gone. ended: called if the engine's thread
    dies. source: where other workers find the pages of this one; open: makes the source of another worker's pages of what that worker gave
    as its `source`."""

    def __init__(
        self,
        llm: LLM,
        send: Callable[[Any], None],
        ended: Callable[[], None],
        source: str = "",
        open: Callable[[LLM, str], ClosableSource] | None = None,
    ) -> None:
        self.llm, self.engine, self.send, self.ended, self.source, self._open = llm, llm.engine, send, ended, source, open
        self.thread = EngineThread(llm.engine, self._deliver, lambda _: ended(), self._stepped)
        self._sources: dict[str, ClosableSource] = {}  # for the engine's thread
        self._builder = ThreadPoolExecutor(1, "redraft-grammar")
        self._arrived: dict[str, float] = {}
        self._running: dict[str, Request] = {}  # those of which the front does not know yet that they were admitted
        self._reported: set[str] = set()  # the front has what is known about them
        self._stop = threading.Event()

    def start(self) -> None:
        self.thread.start()
        self.send(Ready(Figures.of(self.engine), self.source))
        threading.Thread(target=self._report, name="redraft-state", daemon=True).start()

    def take(self, message: Add | Adopt | Abort | Call) -> None:
        match message:
            case Add(job=job) | Adopt(job=job) if job.params.structured_outputs is not None:
                self._builder.submit(self._build, message)  # a grammar, in another thread, so that nothing waits for it
            case Add() | Adopt():
                self.thread.do(lambda: self._add(message))
            case Abort(key):
                self._builder.submit(self._abort, key)  # after its grammar was built
            case Call(number, name, arguments):
                self._call(number, name, arguments)

    def stop(self) -> None:
        self._stop.set()
        self._builder.shutdown(cancel_futures=True)
        self.thread.stop()
        if (disk := self.llm.runner.disk) is not None:
            disk.flush()

    # ---- calls of the front, by name

    def forget_prefixes(self) -> int:
        return self.engine.forget_prefixes()

    def check(self) -> tuple[int, int]:
        """The blocks and the texts that the engine holds. AssertionError if an invariant of the memory is broken."""
        self.engine.memory.check()
        return self.engine.memory.used(), len(self.engine.outputs)

    def load_lora(self, name: str, folder: str) -> None:
        self.llm.load_lora(name, folder)

    def unload_lora(self, name: str) -> None:
        self.llm.unload_lora(name)

    # ---- requests

    def _build(self, message: Add | Adopt) -> None:
        try:
            self.llm.sampler.check(message.job.params)
        except Exception as error:
            self._reply(message.number, error=error)
            return
        self.thread.do(lambda: self._add(message))

    def _add(self, message: Add | Adopt) -> None:
        job = message.job
        request, self._arrived[job.key] = job.request(), monotonic()
        try:
            match message:
                case Add(parks=parks):
                    self.engine.add(request, job.progress, parks=parks)
                case Adopt(parcel=parcel, source=source):
                    self.engine.adopt(Parcel.of(request, parcel), self._source(source))
        except Exception as error:
            self._forget(job.key)
            self._reply(message.number, error=error)
            return
        self._running[job.key] = request
        self._reply(message.number)

    def _abort(self, key: str) -> None:
        self.thread.abort(key)
        self.thread.do(lambda: self._forget(key))  # no event of it comes after that

    def _source(self, name: str) -> ClosableSource:
        """The pages of another worker. Those of workers that are gone are closed."""
        assert self._open is not None, "this worker adopts nothing"
        if name not in self._sources:
            while len(self._sources) >= SOURCES and not self.engine.arrivals.awaited:
                self._sources.pop(next(iter(self._sources))).close()
            self._sources[name] = self._open(self.llm, name)
        return self._sources[name]

    def _stepped(self) -> None:
        for key in self.engine.ready():
            self.send(Parked(key, self.engine.release(key).numbers()))
        for key in self.engine.settled():
            self.send(Settled(key))

    def _forget(self, key: str) -> None:
        self._arrived.pop(key, None)
        self._running.pop(key, None)
        self._reported.discard(key)

    def _call(self, number: int, name: str, arguments: tuple[Any, ...]) -> None:
        """In the engine's thread what touches it, else in a thread of its own."""

        def call() -> None:
            try:
                self._reply(number, getattr(self, name)(*arguments))
            except Exception as error:
                self._reply(number, error=error)

        if name in ("forget_prefixes", "check"):
            self.thread.do(call)
        else:
            threading.Thread(target=call, daemon=True).start()

    def _reply(self, number: int, value: Any = None, error: Exception | None = None) -> None:
        self.send(Reply(number, value, None if error is None else plain(error)))

    # ---- events

    def _deliver(self, events: list[Event]) -> None:
        pieces = []
        for event in events:
            key, last = event.request.id, event.reason is not None or event.error is not None
            about = About.of(event.request, self._arrived.get(key, 0.0)) if last or key not in self._reported else None
            self._reported.add(key)
            pieces.append(Piece.of(event, about))
            if isinstance(pieces[-1].error, WorkerError):
                log.error("request %s failed", key, exc_info=event.error)
            if event.error is not None or all(seq.reason for seq in event.request.sequences):
                self._forget(key)
        self.send(Pieces(pieces))

    def _report(self) -> None:
        while not self._stop.wait(TICK):
            admitted = [key for key, request in list(self._running.items()) if request.admitted is not None]
            for key in admitted:
                self._running.pop(key, None)
            try:
                self.send(State(Figures.of(self.engine, self.thread.busy), admitted))
            except OSError:
                return
