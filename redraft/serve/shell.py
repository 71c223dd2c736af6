"""The asynchronous shell around the synchronous engine: one thread steps it, the event loop receives its events.

Only that thread touches the engine. Other code gives it tasks, which it runs between two steps, so that a cancelled request holds no
page after the current step.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import Any

from redraft.core.sequence import Request
from redraft.engine.engine import Engine
from redraft.engine.output import Event
from redraft.errors import RedraftError
from redraft.serve.errors import Refused
from redraft.serve.metrics import Metrics

log = logging.getLogger("redraft.serve")
LONGEST_STEP = 10.0  # seconds to wait for it at the end; a thread that hangs must not keep the process


@dataclass(eq=False)
class Submission:
    """A running request, as the event loop sees it. Times are those of time.monotonic."""

    request: Request
    arrived: float = field(default_factory=monotonic)
    queue: asyncio.Queue[list[Event] | Exception] = field(default_factory=asyncio.Queue)
    left: int = 0  # texts that are not finished
    first: float | None = None  # when the first token was there
    last: dict[int, float] = field(default_factory=dict)  # of each text: when its latest token was there
    tokens: int = 0
    gaps: list[float] = field(default_factory=list)  # seconds between tokens; those of one step came at once

    async def events(self) -> AsyncIterator[list[Event]]:
        """The events of one step at a time, until all texts are finished. Raises the error that ended the request early."""
        unread = self.request.params.n  # not `left`, which counts what is still in the queue
        while unread:
            received = await self.queue.get()
            if isinstance(received, Exception):
                raise received
            unread -= sum(event.reason is not None for event in received)
            yield received

    def add(self, events: list[Event]) -> None:
        now = monotonic()
        for event in events:
            self.left -= event.reason is not None
            count = len(event.tokens)
            self.tokens += count
            if count and event.index in self.last:
                self.gaps.append(now - self.last[event.index])
            if count:
                self.first = self.first or now
                self.last[event.index] = now
        self.queue.put_nowait(events)


class Shell:
    """`start` it in a running event loop. stopped: called in the event loop if the thread dies."""

    def __init__(self, engine: Engine, metrics: Metrics, *, max_queue: int, stopped: Callable[[], None] = lambda: None) -> None:
        self.engine, self.metrics, self.max_queue, self.stopped = engine, metrics, max_queue, stopped
        self.draining = False
        self.died: BaseException | None = None
        self._submissions: dict[str, Submission] = {}
        self._tasks: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._end = False
        self._busy_since: float | None = None  # when the current step or task began; None: the thread waits
        self._calls: set[asyncio.Future[Any]] = set()
        self._thread = threading.Thread(target=self._main, name="redraft-engine", daemon=True)

    # ---- in the event loop

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self.died is None and self._thread.is_alive()

    @property
    def stalled(self) -> float:
        """Seconds since the thread began its current step or task, 0 if it waits."""
        since = self._busy_since
        return 0.0 if since is None else monotonic() - since

    @property
    def busy(self) -> int:
        """The number of requests that are not finished."""
        return len(self._submissions)

    @property
    def queued(self) -> int:
        """The number of requests that did not run yet."""
        return sum(submission.request.admitted is None for submission in self._submissions.values())

    @property
    def room(self) -> int:
        """How many requests may still be queued: those that can run at once do not wait."""
        return self.max_queue + max(0, self.engine.scheduler.max_seqs - len(self.engine.running)) - self.queued

    async def submit(self, *requests: Request) -> list[Submission]:
        """Queues requests, all or none. Refused (429, 503) if there is no room, RedraftError if the engine refuses one."""
        if self.draining or not self.alive:
            raise Refused(503, "the server is shutting down", headers={"Retry-After": "5"})
        if self.room < len(requests):
            raise Refused(429, f"{self.max_queue} requests wait already: try again later", headers={"Retry-After": str(self._patience())})
        submissions = [Submission(request, left=request.params.n) for request in requests]
        self._submissions |= {submission.request.id: submission for submission in submissions}
        try:
            await self.call(lambda: self._add(requests))
        except RedraftError:  # they never began, so they are not counted
            for request in requests:
                self._submissions.pop(request.id, None)
            raise
        except BaseException:  # also if the client left before its requests were added
            self.forget(*submissions)
            raise
        return submissions

    def _add(self, requests: Seq[Request]) -> None:
        try:
            for request in requests:
                self.engine.add(request)
        except BaseException:
            for request in requests:
                self.engine.abort(request.id)
            raise

    def forget(self, *submissions: Submission) -> None:
        """Drops requests that ended or lost their client."""
        for submission in submissions:
            if self._submissions.pop(submission.request.id, None) is not None:
                self.metrics.ended(submission, "abort")
                self._abort(submission)

    async def call(self, task: Callable[[], Any]) -> Any:
        """The result of `task`, or its error. The engine's thread runs it between two steps."""
        if not self.alive:
            raise Refused(503, "the engine stopped")
        done: asyncio.Future[Any] = self._loop.create_future()
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

        self._do(run)
        return await done

    def fail(self, error: Exception) -> None:
        """Ends every request with this error."""
        for submission in list(self._submissions.values()):
            self._fail(submission, error)

    async def stop(self) -> None:
        """Ends the thread after the current step."""
        self._end = True
        self._do(lambda: None)
        await asyncio.to_thread(self._thread.join, LONGEST_STEP)

    def _patience(self) -> int:
        """Seconds until there may be room, estimated from the latest requests."""
        return max(1, min(60, round(self.metrics.recent * self.queued / max(1, self.engine.scheduler.max_seqs))))

    def _fail(self, submission: Submission, error: Exception) -> None:
        self.metrics.ended(submission, "error")
        submission.queue.put_nowait(error)
        if self._submissions.pop(submission.request.id, None) is not None:
            self._abort(submission)

    def _abort(self, submission: Submission) -> None:
        def abort() -> None:
            try:
                self.engine.abort(submission.request.id)
            except Exception:  # if ending one request raises, the others continue
                log.exception("request %s did not end well", submission.request.id)

        self._do(abort)

    def _deliver(self, events: list[Event]) -> None:
        by_request: dict[str, list[Event]] = {}
        failed = [(event.request, event.error) for event in events if event.error is not None]
        for event in events:
            if event.error is None:
                by_request.setdefault(event.request.id, []).append(event)
        for name, some in by_request.items():
            if (submission := self._submissions.get(name)) is not None:
                submission.add(some)
                self.metrics.observe(submission, some)
                if not submission.left:
                    del self._submissions[name]
                    self.metrics.ended(submission, str(some[-1].reason))
        for request, error in failed:
            if not isinstance(error, RedraftError):
                log.error("request %s failed", request.id, exc_info=error)
            if (submission := self._submissions.get(request.id)) is not None:
                self._fail(submission, error)

    def _dead(self, error: BaseException) -> None:
        stopped = Refused(500, "the engine stopped")
        self.fail(stopped)
        for done in list(self._calls):
            if not done.done():
                done.set_exception(stopped)
        self.stopped()

    # ---- from anywhere

    def _do(self, task: Callable[[], Any]) -> None:
        with self._wake:
            self._tasks.append(task)
            self._wake.notify()

    # ---- the engine's thread

    def _post(self, what: Callable[..., None], *about: Any) -> None:
        """Calls it in the event loop, unless that has ended during a step that took too long."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(what, *about)

    def _main(self) -> None:
        try:
            while not self._end:
                self._busy_since = None
                if not self._tasks and not self.engine.has_work:
                    more = self.engine.idle()
                    with self._wake:
                        while not (self._tasks or self.engine.has_work or more):
                            self._wake.wait()
                while self._tasks:
                    self._busy_since = monotonic()
                    self._tasks.popleft()()
                if self.engine.has_work and not self._end:
                    self._busy_since = monotonic()
                    self._step()
        except BaseException as error:
            self.died = error
            log.critical("the engine's thread died", exc_info=error)
            self._post(self._dead, error)

    def _step(self) -> None:
        if events := self.engine.step():  # copies, because this thread continues to change the statistics
            self._post(self._deliver, [replace(event, stats=event.stats.copy()) for event in events])
