"""The requests under way of a server: from the event loop to the host that computes them, and the events back."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from time import monotonic

from redraft.core.sequence import Request
from redraft.engine.output import Event
from redraft.errors import RedraftError
from redraft.serve.errors import Refused
from redraft.serve.metrics import Metrics
from redraft.workers.host import Host

log = logging.getLogger("redraft.serve")


@dataclass(eq=False)
class Submission:
    """A running request, as the event loop sees it. Times are those of time.monotonic."""

    request: Request
    arrived: float = field(default_factory=monotonic)
    queue: asyncio.Queue[list[Event] | Exception] = field(default_factory=asyncio.Queue)
    worker: str = ""  # that computes it, or did last
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
    """`start` it in a running event loop. stopped: called in the event loop if nothing can be computed any more."""

    def __init__(self, host: Host, metrics: Metrics, *, max_queue: int, max_seqs: int, stopped: Callable[[], None] = lambda: None) -> None:
        self.host, self.metrics, self.max_queue, self.max_seqs, self.stopped = host, metrics, max_queue, max_seqs, stopped
        self.draining = False
        self._submissions: dict[str, Submission] = {}

    def start(self) -> None:
        self.host.start(self._deliver, self._dead)

    async def stop(self) -> None:
        await self.host.stop()

    @property
    def alive(self) -> bool:
        return self.host.alive

    @property
    def stalled(self) -> float:
        """Seconds since a worker began its current step or task, 0 if all wait."""
        return max((figures.busy for figures in self.host.figures().values()), default=0.0)

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
        return self.max_queue + self.host.free - self.queued

    async def submit(self, *requests: Request) -> list[Submission]:
        """Queues requests, all or none. Refused (429, 503) if there is no room, RedraftError if the engine refuses one."""
        if self.draining or not self.alive:
            raise Refused(503, "the server is shutting down", headers={"Retry-After": "5"})
        if self.room < len(requests):
            raise Refused(429, f"{self.max_queue} requests wait already: try again later", headers={"Retry-After": str(self._patience())})
        first = self.host.workers[0]
        submissions = [Submission(request, worker=first, left=request.params.n) for request in requests]
        self._submissions |= {submission.request.id: submission for submission in submissions}
        try:
            await self.host.add(requests)
        except RedraftError:  # they never began, so they are not counted
            for request in requests:
                self._submissions.pop(request.id, None)
            raise
        except BaseException:  # also if the client left before its requests were added
            self.forget(*submissions)
            raise
        return submissions

    def forget(self, *submissions: Submission) -> None:
        """Drops requests that ended or lost their client."""
        for submission in submissions:
            if self._submissions.pop(submission.request.id, None) is not None:
                self._ended(submission, "abort")
                self.host.abort(submission.request.id)

    def fail(self, error: Exception) -> None:
        """Ends every request with this error."""
        for submission in list(self._submissions.values()):
            self._fail(submission, error)

    def _patience(self) -> int:
        """Seconds until there may be room, estimated from the latest requests."""
        return max(1, min(60, round(self.metrics.recent * self.queued / self.max_seqs)))

    def _fail(self, submission: Submission, error: Exception) -> None:
        self._ended(submission, "error")
        submission.queue.put_nowait(error)
        if self._submissions.pop(submission.request.id, None) is not None:
            self.host.abort(submission.request.id)

    def _ended(self, submission: Submission, reason: str) -> None:
        """Counts it for the worker that has it, also if no event came from there."""
        submission.worker = self.host.worker(submission.request.id) or submission.worker
        self.metrics.ended(submission, reason)

    def _deliver(self, events: list[Event]) -> None:
        by_request: dict[str, list[Event]] = {}
        failed = [(event.request, event.error) for event in events if event.error is not None]
        for event in events:
            if event.error is None:
                by_request.setdefault(event.request.id, []).append(event)
        for name, some in by_request.items():
            if (submission := self._submissions.get(name)) is not None:
                submission.add(some)
                submission.worker = self.host.worker(name) or submission.worker
                self.metrics.observe(submission, some)
                if not submission.left:
                    del self._submissions[name]
                    self.metrics.ended(submission, str(some[-1].reason))
        for request, error in failed:
            if not isinstance(error, RedraftError):
                log.error("request %s failed", request.id, exc_info=error)
            if (submission := self._submissions.get(request.id)) is not None:
                self._fail(submission, error)

    def _dead(self, _: BaseException) -> None:
        self.fail(Refused(500, "the engine stopped"))
        self.stopped()
