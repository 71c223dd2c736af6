"""One simulated worker: a real engine on simulated time, which may run several equal steps at once.

While every text of a worker draws one token a step, nobody is admitted, no text ends and memory lasts, the steps differ in their cost
alone. The worker then lets this time pass without the engine. At its end, or when a request comes in between, the engine does all steps
up to there as one step with a draft. Times, memory and texts are those of single steps.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Sequence as Seq
from itertools import islice
from typing import Any, cast

import numpy as np

from redraft.core.plan import Budget, StepPlan, Work
from redraft.core.sequence import Request, Sequence
from redraft.core.tree import F64, I64
from redraft.engine.engine import Begun, Engine
from redraft.engine.output import Event
from redraft.kv.paged import Paged
from redraft.kv.prefix import Node
from redraft.sched.router import FIRST
from redraft.sched.scheduler import Pages, Scheduler
from redraft.sim.forced import Ahead, ForcedSampler, ForcedVerifier
from redraft.sim.link import FREE, Link
from redraft.sim.runner import Cost, CostRunner
from redraft.sim.transit import Transit

MOST = 128  # steps at once; more save nothing


class Leaping:
    """The scheduler as the engine calls it. steps: how many steps the next plan stands for, in which every running text
    draws a token and nothing else happens; 0 asks the scheduler itself."""

    def __init__(self, scheduler: Transit) -> None:
        self.scheduler, self.max_seqs, self.steps = scheduler, scheduler.max_seqs, 0

    def plan(self, waiting: Seq[Sequence], running: Seq[Sequence], memory: Pages, least: int = 1) -> StepPlan:
        if not self.steps:
            return self.scheduler.plan(waiting, running, memory, least)
        budget = Budget(self.steps - 1, self.steps - 1)
        return StepPlan([Work(seq, 1) for seq in self.scheduler.order(running)], [budget] * len(running))


class Worker:
    """times: when each step ended, in seconds of simulated time. spans: pairs of steps; the first of a pair, and each later one before the
    second, drew a token of the same text. gaps: the other times between two tokens of a text. seconds: the time of all steps. most: the
    most steps at once, 1 for none.
    stages: see redraft.sched.router.Load. link: the way of texts that come from other workers.
    beside: a worker with the same pool; then neither may run several steps at once."""

    def __init__(
        self,
        index: int,
        cost: Cost,
        scheduler: Scheduler,
        *,
        blocks: int,
        context: int,
        sharing: bool = True,
        most: int = MOST,
        stages: tuple[int, ...] = FIRST,
        link: Link = FREE,
        beside: Worker | None = None,
    ) -> None:
        self.index, self.cost, self.most, self.now, self.stages = index, cost, most, 0.0, stages
        memory: Paged | None = None if beside is None else beside.runner.memory
        self.runner: CostRunner = CostRunner(cost, blocks, context, sharing=sharing, memory=memory)
        self.transit = Transit(scheduler, link, lambda: self.now)
        self.scheduler = Leaping(self.transit)
        parts: Any = self.runner, self.scheduler, Ahead(), ForcedVerifier(), ForcedSampler()
        self.engine = Engine(*parts, max_model_len=context, clock=lambda: self.now)
        if beside is not None:
            self.engine.admission._ids = 1 << 40  # the table tells sequences apart by their ids
        self.times, self.spans, self.gaps = array("d"), array("q"), array("d")
        self.seconds = self._start = 0.0
        self._begun: Begun | None = None
        self._ends: list[float] = []  # of the steps under way

    @property
    def ends(self) -> float | None:
        """When the steps under way end, None if there are none."""
        return self._ends[-1] if self._ends else None

    def add(self, request: Request, now: float, parks: bool = False) -> float | None:
        """A request arrives. parks: it leaves after its first token. When the steps under way end, which may now be earlier,
        None if there are none. Raises InvalidInput for a request that the engine refuses."""
        self.now = now
        self.engine.add(request, parks=parks)
        return self.cut(now)

    def adopt(self, request_id: str, source: Worker, now: float) -> float | None:
        """A request comes that `source` has parked. Returns and raises as add() does."""
        self.now = now
        parcel = source.engine.release(request_id)
        self.engine.adopt(parcel, source.engine.memory)
        self.transit.offer(parcel.request.sequences)
        return self.cut(now)

    def lose(self, request_id: str) -> None:
        """An adopted request that waits is computed from its tokens, without its source."""
        lost = [seq for seq in self.engine.waiting if seq.request.id == request_id]
        for seq in lost:
            self.engine.arrivals.drop(seq)
            seq.arrives = 0
        self.transit.lose(lost)

    def cut(self, now: float) -> float | None:
        """Ends the steps under way with the first one that ends at `now` or later, and returns when that is."""
        if self._begun is None:
            del self._ends[bisect_left(self._ends, now) + 1 :]
        return self.ends

    def begin(self, now: float) -> float | None:
        """Begins the next steps and returns when the last of them ends, None if there is nothing to do."""
        assert not self._ends, f"worker {self.index}: a step is under way"
        self.now = self._start = now
        if not self.engine.has_work:
            return None
        if (steps := self._ahead()) > 1:
            self.transit.begin()
            self._ends = self._leap(now, steps)
            return self.ends
        copies = 0.0
        while True:
            self._begun = begun = self.engine.begin()
            made_room = self.transit.made_room
            copies += self.transit.begin()
            if begun is not None:
                self._ends = [now + copies + self.runner.forward(begun.batch, begun.taps)]
                return self.ends
            if not made_room:
                assert self.engine.memory.used(), f"worker {self.index}: {len(self.engine.waiting)} requests wait and none can run"
                return None

    def end(self) -> list[Event]:
        """The steps under way end. The events have as many tokens as steps of `times`, the last of which are theirs."""
        begun, steps = self._begun, len(self._ends)
        self.now = self._ends[-1]
        if begun is None:
            self.scheduler.steps = steps
            begun = self.engine.begin()
            self.scheduler.steps = 0
            assert begun is not None and not begun.plan.admit
        events = self.engine.end(begun, None)
        self.engine.settled()  # Transit says when
        self.times.extend(self._ends)
        self.seconds += self.now - self._start
        self._begun, self._ends = None, []
        for event in events:
            if event.error is not None:
                raise event.error
        return events

    def gap_counts(self) -> list[tuple[F64, I64]]:
        """Pairs of arrays: times between two tokens of a text, and how many there were of each."""
        edges, size = np.array(self.spans, np.int64).reshape(-1, 2), len(self.times) + 1
        counts = np.cumsum(np.bincount(edges[:, 0] + 1, minlength=size) - np.bincount(edges[:, 1], minlength=size))[1:-1]
        gaps, seen = np.diff(np.array(self.times)), counts > 0
        return [(gaps[seen], counts[seen]), (np.array(self.gaps), np.ones(len(self.gaps), np.int64))]

    # ---- several steps at once

    def _ahead(self) -> int:
        """How many steps pass in which every text draws a token, none ends before the last one, and nothing else happens. 0 or 1: the
        next step is another one."""
        engine, running, memory = self.engine, self.engine.running, self.runner.memory
        if self.most == 1 or not running or self.transit.due or any(seq.pending != 1 or not seq.generated for seq in running):
            return 1
        if engine.waiting:  # memory only shrinks and nobody ends, so who is not admitted now is not admitted later
            plan = self.scheduler.plan(engine.waiting, running, cast(Any, memory))
            if plan.admit or plan.preempt or len(plan.work) < len(running):
                return 1
        steps = min(self.most, *(seq.sync_point - seq.stored for seq in running))
        cursors = self.engine.table.cursors(running)
        if not all(node.alive for node in cursors):
            return 1  # who publishes its pages again, and when, decides whose pages are shared
        free = memory.available() - len(self.engine.table.prefix.idle)
        if (needed := self._need(steps)) <= free:
            return steps
        most = free + self._leaves(needed - free, cursors)
        if needed <= most:
            return steps
        return bisect_right(range(steps + 1), most, key=self._need) - 1

    def _need(self, steps: int) -> int:
        return sum(self.runner.memory.need(seq, steps) for seq in self.engine.running)

    def _leaves(self, count: int, cursors: list[Node]) -> int:
        """How many idle pages, at most `count`, can be evicted in order while each is a leaf and no running text publishes below it.
        Otherwise it matters what is published first."""
        prefix, kept = self.engine.table.prefix, set(cursors)
        gone: set[Node] = set()
        for page in islice(prefix.idle, count):
            node = prefix.nodes[page]
            if node in kept or not gone.issuperset(node.children.values()):
                break
            gone.add(node)
        return len(gone)

    def _leap(self, now: float, steps: int) -> list[float]:
        """When each of these steps ends."""
        texts = len(self.engine.running)
        cells, ends = sum(seq.stored for seq in self.engine.running), []
        for _ in range(steps):
            cells += texts
            now += self.cost.seconds(texts, texts, float(cells), float(cells))
            ends.append(now)
        return ends
