"""Texts on their way to a worker: admitted with their memory, but without rows until their pages have been copied.

Unless the link blocks, pages are copied beside the steps of the worker, from the moment on at which the text is offered and memory is
there. A text runs from the first step on that begins after its copy.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq

from redraft.core.plan import StepPlan
from redraft.core.sequence import Sequence
from redraft.sched.scheduler import Pages, Scheduler
from redraft.sim.link import Link


class Transit:
    """A scheduler around another one. due: when the pages of a text are here; made_room: the texts that lost their pages because
    others need the memory, which texts on their way or parked ones hold. They are computed again."""

    def __init__(self, scheduler: Scheduler, link: Link, clock: Callable[[], float]) -> None:
        self.scheduler, self.link, self.clock, self.max_seqs = scheduler, link, clock, scheduler.max_seqs
        self.due: dict[Sequence, float] = {}
        self.made_room: list[Sequence] = []
        self._offered: dict[Sequence, float] = {}  # texts that no plan has seen yet, and since when they are offered
        self._admitted: list[tuple[Sequence, float]] = []  # by the last plan, and when their pages are here
        self._acknowledged: list[tuple[float, str]] = []  # when a request needs its source no more
        self._free = 0.0  # when the link is idle

    def order(self, running: Seq[Sequence]) -> Iterable[Sequence]:
        return self.scheduler.order(running)

    def offer(self, seqs: Iterable[Sequence]) -> None:
        """Texts are parked at another worker."""
        self._offered |= dict.fromkeys(seqs, self.clock())

    def lose(self, seqs: Iterable[Sequence]) -> None:
        """They need their pages no more."""
        for seq in seqs:
            self._offered.pop(seq, None)

    def plan(self, waiting: Seq[Sequence], running: Seq[Sequence], memory: Pages, least: int = 1) -> StepPlan:
        here = [seq for seq in running if seq not in self.due] if self.due else running
        self._admitted, self.made_room = [], self._victims(here, memory)
        if self.made_room:
            return StepPlan([], [], [], list(self.made_room))
        plan = self.scheduler.plan(waiting, here, memory, least)
        if not any(seq.arrives for seq, _ in plan.admit):
            return plan
        admit = plan.admit[: self.max_seqs - len(running)]
        self._admitted = self._copies(admit)
        later = {seq for seq, _ in plan.admit[len(admit) :]}
        if not self.link.blocking:
            later.update(seq for seq, at in self._admitted if at > self.clock())
        kept = [(work, budget) for work, budget in zip(plan.work, plan.budgets, strict=True) if work.seq not in later]
        return StepPlan([work for work, _ in kept], [budget for _, budget in kept], admit, plan.preempt)

    def _victims(self, here: Seq[Sequence], memory: Pages) -> list[Sequence]:
        """Texts that must go before the scheduler can plan: the last one on its way, or all that run if not even the first fits."""
        if not here or sum(memory.need(seq, seq.pending) for seq in here) <= memory.available():
            return []
        if self.due:
            return [list(self.due)[-1]]
        first, *others = here
        fits = memory.need(first, first.pending) <= memory.available() + sum(map(memory.gain, others))
        return [] if fits else list(reversed(here))

    def _copies(self, admit: Seq[tuple[Sequence, int]]) -> list[tuple[Sequence, float]]:
        """When the copies of admitted texts end, one after the other."""
        found, now, free = [], self.clock(), self._free
        for seq, matched in admit:
            if seq.arrives:
                start = now if self.link.blocking else self._offered.get(seq, now)
                if seconds := self.link.seconds(seq.arrives - matched):
                    free = max(free, start) + seconds
                found.append((seq, free if seconds else now))
        return found

    def begin(self) -> float:
        """The last plan was carried out. Returns the seconds in which its copies stop the worker."""
        now, stopped = self.clock(), 0.0
        for seq in self.made_room:
            self.due.pop(seq, None)
        for seq, at in self._admitted:
            self._free = max(self._free, at)
            heapq.heappush(self._acknowledged, (max(at, now), seq.request.id))
            if self.link.blocking:
                stopped = max(stopped, at - now)
            elif at > now:
                self.due[seq] = at
        self._offered.clear()  # the others lacked memory, so their copies cannot begin before they are admitted
        self._admitted, self.made_room = [], []
        return stopped

    def next(self) -> float | None:
        """When the next copy ends."""
        return self._acknowledged[0][0] if self._acknowledged else None

    def arrived(self, now: float) -> list[str]:
        """The requests whose source is not needed any more, each once."""
        found = []
        while self._acknowledged and self._acknowledged[0][0] <= now:
            found.append(heapq.heappop(self._acknowledged)[1])
        self.due = {seq: at for seq, at in self.due.items() if at > now}
        return found
