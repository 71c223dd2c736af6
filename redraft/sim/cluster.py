"""Workers, a router and arrivals on simulated time. Events happen in order of time; at one time, requests arrive before steps end.

Where workers are split, a request is computed in a chain of two stages: its prompt and first token at one worker, the rest at another one,
which pulls the pages that it lacks when it has memory. The first worker keeps them until then.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from math import inf, isnan, nan

import numpy as np

from redraft.engine.output import Event
from redraft.errors import InvalidInput
from redraft.sched.router import Load, OpenRouter
from redraft.sim.forced import ForcedRequest
from redraft.sim.records import Record, Records
from redraft.sim.worker import Worker

LAST = 1  # the stage after the prompt


@dataclass(slots=True)
class Journey:
    """A request on its way. place: its worker; to: the one that goes on after the prompt, None while that is not known; start, stop: the
    last steps of its worker in a row that each drew a token of it. first, second, last, longest: see Record, of the tokens before
    `start`."""

    request: ForcedRequest
    arrived: float
    place: int
    to: int | None = None
    start: int = 0
    stop: int = 0
    first: float = nan
    second: float = nan
    last: float = nan
    longest: float = 0.0

    def draw(self, worker: Worker, count: int) -> bool:
        """The last `count` steps of the worker drew a token each. Whether they are the first."""
        stop = len(worker.times)
        begins = not self.stop and isnan(self.first)
        if self.stop != stop - count:
            self.close(worker)
            self.start = stop - count
        self.stop = stop
        return begins

    def close(self, worker: Worker) -> None:
        """Takes over the times of the steps in a row."""
        if not self.stop:
            return
        times = np.array(worker.times[self.start : self.stop])
        first, last = float(times[0]), float(times[-1])
        if isnan(self.first):
            self.first = first
        else:
            self.second = first if isnan(self.second) else self.second
            self.longest = max(self.longest, first - self.last)
            worker.gaps.append(first - self.last)
        if len(times) > 1:
            self.second = float(times[1]) if isnan(self.second) else self.second
            self.longest = max(self.longest, float(np.diff(times).max()))
            worker.spans.extend((self.start, self.stop))
        self.last, self.start, self.stop = last, 0, 0


class Front:
    """What the router knows of the workers: a record of the requests that they were sent, as a server's front has it."""

    def __init__(self, router: OpenRouter, workers: Seq[Worker]) -> None:
        self.router, self.page = router, workers[0].engine.table.page
        self.loads = [Load(free_blocks=worker.runner.memory.blocks, stages=worker.stages) for worker in workers]
        self.split = any(LAST in load.stages for load in self.loads)

    def send(self, request: ForcedRequest, now: float) -> Journey:
        """Chooses the worker of the prompt. If the router places any stage anywhere, also the one of the rest."""
        place = self.router.route(request, self.loads)
        journey = Journey(request, now, place)
        self._change(place, len(request.prompt), 0, -self.blocks(request))
        if self.split and self.router.any_stage:
            self.hand_over(journey)
        elif not self.split or LAST in self.loads[place].stages:
            journey.to = place
        return journey

    def hand_over(self, journey: Journey) -> int:
        """Chooses the worker that goes on after the prompt."""
        journey.to = to = self.router.route(journey.request, self.loads, LAST)
        if to != journey.place:
            self._change(to, 0, 1, -self.blocks(journey.request))
        return to

    def draws(self, journey: Journey) -> None:
        """The first token was drawn."""
        self._change(journey.place, -len(journey.request.prompt), journey.to == journey.place, 0)

    def leaves(self, request: ForcedRequest, place: int) -> None:
        """A worker needs the memory of the prompt no more."""
        self._change(place, 0, 0, self.blocks(request))

    def ends(self, journey: Journey) -> None:
        """It ended at its worker."""
        if journey.to is not None and journey.to != journey.place:  # with its first token
            self._change(journey.to, 0, -1, self.blocks(journey.request))
        self._change(journey.place, 0, -(journey.to == journey.place), self.blocks(journey.request))

    def refused(self, journey: Journey) -> None:
        """No worker has it."""
        self.draws(journey)
        self.ends(journey)

    def blocks(self, request: ForcedRequest) -> int:
        """The most blocks that it can come to need."""
        return -(-(len(request.prompt) + len(request.output)) // self.page)

    def _change(self, place: int, queued_tokens: int, running: int, free_blocks: int) -> None:
        old = self.loads[place]
        self.loads[place] = old._replace(
            queued_tokens=old.queued_tokens + queued_tokens,
            running=old.running + running,
            free_blocks=old.free_blocks + free_blocks,
        )


class Cluster:
    """Workers behind one router. now: seconds of simulated time; copied, found: tokens that went from one worker to another one, and those
    that the receiver had; lost: hand-overs that gave up their pages because no worker could go on."""

    def __init__(self, workers: Seq[Worker], router: OpenRouter) -> None:
        self.workers, self.front, self.records, self.now = workers, Front(router, workers), Records(), 0.0
        self.lost = 0
        self._events: list[tuple[float, int]] = []  # when the steps or a copy of a worker end; out of date if the worker says another time
        self._live: dict[str, Journey] = {}
        self._parked: dict[str, tuple[ForcedRequest, int]] = {}  # and the worker that has their pages
        self._free: set[int] = set()  # workers that may begin a step now

    @property
    def copied(self) -> int:
        return sum(worker.engine.arrivals.copied for worker in self.workers)

    @property
    def found(self) -> int:
        return sum(worker.engine.arrivals.found for worker in self.workers)

    def run(self, arrivals: Iterable[tuple[float, ForcedRequest]]) -> Records:
        """Runs until the last request has ended. arrivals: in order of time, in seconds."""
        coming = iter(arrivals)
        at, request = next(coming, (inf, None))
        while self._events or request is not None or self._unlock():
            self.now = now = min(at, self._events[0][0] if self._events else inf)
            while request is not None and at <= now:
                self._arrive(request)
                at, request = next(coming, (inf, None))
            while self._events and self._events[0][0] == now:
                self._end(heapq.heappop(self._events)[1])
            for place in sorted(self._free):
                self._await(place, self.workers[place].begin(now))
                self._await(place, self.workers[place].transit.next())
            self._free.clear()
        assert not self._live, f"{len(self._live)} requests neither ended nor were refused"
        for worker in self.workers:
            self.records.gaps += worker.gap_counts()
        return self.records

    def _unlock(self) -> bool:
        """If workers wait for each other's memory, the request that was parked first loses its pages. Whether there was one."""
        if not (name := next(iter(self._parked), None)):
            return False
        self.lost += 1
        to = self._live[name].place
        self.workers[to].lose(name)
        self._settle(*self._parked.pop(name), name)
        self._await(to, self.now)
        for place in self._free:
            self._await(place, self.now)
        return True

    def _arrive(self, request: ForcedRequest) -> None:
        journey = self.front.send(request, self.now)
        try:
            ends = self.workers[journey.place].add(request, self.now, parks=journey.to != journey.place)
        except InvalidInput:
            self._refuse(journey)
            return
        self._live[request.id] = journey
        self._sent(journey.place, ends)

    def _refuse(self, journey: Journey) -> None:
        request = journey.request
        self.front.refused(journey)
        self.records.add(Record(int(request.id), journey.arrived, prompt=len(request.prompt), output=len(request.output)))

    def _sent(self, place: int, ends: float | None) -> None:
        """A worker was sent a request and says when its steps end."""
        if ends is None:
            self._free.add(place)
        else:
            self._await(place, ends)

    def _await(self, place: int, ends: float | None) -> None:
        if ends is not None:
            heapq.heappush(self._events, (ends, place))

    def _end(self, place: int) -> None:
        worker = self.workers[place]
        for name in worker.transit.arrived(self.now):
            self._settle(*self._parked.pop(name), name)
        if worker.ends == self.now:
            for event in worker.end():
                self._take(event, worker)
            for name in worker.engine.ready():
                self._hand_over(self._live[name], worker)
        if worker.ends is None:
            self._free.add(place)

    def _take(self, event: Event, worker: Worker) -> None:
        journey = self._live[event.request.id]
        if journey.draw(worker, len(event.tokens)):
            self.front.draws(journey)
        if event.reason is not None:
            self._finish(journey, worker)

    def _hand_over(self, journey: Journey, source: Worker) -> None:
        """The prompt is done and the first token drawn."""
        journey.close(source)
        to = self.front.hand_over(journey) if journey.to is None else journey.to
        self._parked[journey.request.id] = journey.request, journey.place
        ends = self.workers[to].adopt(journey.request.id, source, self.now)
        journey.place = to
        self._sent(to, ends)

    def _settle(self, request: ForcedRequest, place: int, name: str) -> None:
        """Another worker has the pages of a request."""
        worker = self.workers[place]
        worker.engine.forget(name)
        self.front.leaves(request, place)
        if worker.ends is None:
            self._free.add(place)

    def _finish(self, journey: Journey, worker: Worker) -> None:
        journey.close(worker)
        request = journey.request
        del self._live[request.id]
        request.sequences.clear()  # else only the garbage collector frees them
        self.front.ends(journey)
        self.records.add(
            Record(
                int(request.id),
                journey.arrived,
                journey.place,
                len(request.prompt),
                len(request.output),
                request.cached_tokens or 0,
                journey.first,
                journey.second,
                journey.last,
                journey.longest,
            )
        )
