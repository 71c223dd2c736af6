"""One step: draft, verify, keep. Start reading at `Engine.step`."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from contextlib import ExitStack
from time import monotonic
from typing import Any

from redraft.core.batch import Batch
from redraft.core.plan import StepPlan, StepResult
from redraft.core.sequence import PLAIN, FinishReason, Lanes, Request, Sequence
from redraft.core.taps import Taps
from redraft.draft.drafter import OpenDrafter
from redraft.engine.admission import Admission
from redraft.engine.faults import Faults
from redraft.engine.idle import forward_seconds
from redraft.engine.opened import Opened
from redraft.engine.output import Event, Outputs
from redraft.engine.policies import Policies
from redraft.engine.speculation import Drafters, Verifiers
from redraft.kv.table import PageTable
from redraft.models.runner import Runner
from redraft.models.tokenizer import Decoder
from redraft.sample.sampler import NotNumbers, Sampler
from redraft.sched.scheduler import Scheduler
from redraft.verify.verifier import Verifier


class Engine:
    """Sequences, their memory and the parts of a step. It is synchronous and single-threaded. It names no method."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        drafter: OpenDrafter,
        verifier: Verifier,
        sampler: Sampler,
        *,
        max_model_len: int,
        eos: Iterable[int] = (),
        decode: Decoder | None = None,
        decode_all: Decoder | None = None,
        draft: str | None = None,
    ) -> None:
        """`decode` turns ids into text without special tokens, `decode_all` with them; None: outputs have no text. `draft`:
        the drafter's name in the statistics."""
        self.runner, self.memory = runner, runner.memory
        self.scheduler, self.sampler = scheduler, sampler
        self.opened = Opened(self._in_use)  # methods that requests chose
        self.drafter, self.verifier = Drafters(drafter, runner, sampler, verifier, self.opened, draft), Verifiers(verifier)
        self.policies = Policies(runner, self.opened)
        self.admission = Admission(runner, sampler, self.drafter, self.policies, max_model_len=max_model_len, spells=decode is not None)
        self.max_model_len, self.eos = max_model_len, frozenset(eos)
        self.faults = Faults()
        self.outputs = Outputs(
            runner,
            self.faults,
            eos=self.eos,
            decode=decode,
            decode_all=decode_all,
            limit=self.admission.limit,
            finished=sampler.finished,
            names=self.drafter.names,
            stopped=self.drafter.stopped,
        )
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.events: list[Event] = []  # not returned yet; an interrupt loses none
        self.preemptions = 0

    @property
    def table(self) -> PageTable:
        """The page table of the layers that own pages, to inspect."""
        return self.runner.table

    # ---- the step

    def step(self, only: Sequence | None = None) -> list[Event]:
        """Runs one step and returns its events. If a part raises an Exception for one text, an Event with the error ends that request,
        and the others continue. Ctrl-C and other BaseExceptions are raised, and no text is lost. `only`: this text runs alone, see
        `isolate`."""
        waiting, running = self._queues(only)
        plan = StepPlan([], [])
        if any(seq.reason for seq in running):
            return self.emit()  # an interrupt came after the last commit: report its results first
        try:
            self.sync(running)  # for new sequences that start at a sync point, and after an interrupt
            plan = self.scheduler.plan(self.faults.without(waiting), self.faults.without(running), self.memory)  # changes nothing yet
            plan = self.enact(plan)  # pages freed, sequences moved, shared prefixes attached
            if not plan.work:
                return self.emit()
            trees = self.drafter.propose(plan.work, plan.budgets)  # an empty tree without a budget or a draft
            pages = self.memory.reserve(plan.work, trees)  # every sequence's tentative tail
            batch = Batch.pack(plan.work, trees, pages)  # pending tokens and draft of every sequence
            out = self.runner.forward(batch, self.taps(plan))  # returns what sampler, drafter and policies request
            distribution = self.sampler.distribution(out, batch, plan.work, trees)  # lazy: rows are computed when a verifier visits them
            accepted = self.outputs.cut(plan.work, self.verifier.accept(plan.work, trees, distribution))  # at the end of the text
            moves = self.memory.commit(plan.work, accepted)  # keeps the accepted path and frees the rest; tokens and stored advance
        except BaseException as error:
            for seq in plan.seqs:
                self.memory.discard(seq)
            return self.isolate(error, only)
        result = StepResult(plan.work, trees, batch, accepted, out, distribution)
        self.outputs.record(result)
        try:
            self.memory.move(moves)
        except BaseException as error:  # unknown which keys were moved, so all start again
            for seq in plan.seqs:
                if seq.reason is None:
                    self._preempt(seq)
            return self.isolate(error, only)
        self.drafter.observe(result)
        self.policies.observe(result, self.faults)
        self.sync(plan.seqs)  # publishes full pages; at sync points policies decide and n > 1 forks
        return self.emit()

    # ---- parts of the step

    def enact(self, plan: StepPlan) -> StepPlan:
        """Frees preempted sequences, which wait again in arrival order. Opens admitted sequences and attaches the prefixes that `plan`
        matched. Returns the plan without sequences that failed."""
        for seq in plan.preempt:
            self._preempt(seq)
        for seq, matched in plan.admit:
            self.faults.call(seq, self._admit, seq, matched)
        return plan.only(self.faults.without(plan.seqs)) if self.faults.found else plan

    def _admit(self, seq: Sequence, matched: int) -> None:
        self._start(seq, matched)
        self.waiting.remove(seq)
        self._run(seq)
        if seq.request.admitted is None:
            seq.request.admitted = monotonic()
        if seq.request.cached_tokens is None:
            seq.request.cached_tokens = matched
            seq.request.miss = self.table.prefix.miss(seq.request.prompt, seq.request.salt)

    def taps(self, plan: StepPlan) -> Taps:
        seqs = plan.seqs
        requested = self.sampler.needs(plan.work) | self.drafter.taps(seqs) | self.outputs.taps(seqs)
        watched = self.policies.watch(seqs)
        return requested | Taps(attention=watched) if watched else requested

    def sync(self, seqs: Iterable[Sequence]) -> None:
        """Publishes full pages and lets policies decide. A request for n texts forks once all but the last prompt token is stored. If
        pages for a fork are missing, the sibling waits and later finds its prompt in the prefix cache."""
        for seq in self.faults.without(list(seqs)):
            if seq.synced != seq.stored or seq.cache is not PLAIN:  # policies may still have to decide
                self.faults.call(seq, self._sync, seq)

    def _sync(self, seq: Sequence) -> None:
        self.memory.publish(seq)
        if seq.cache is not PLAIN:
            self.policies.sync(seq)
            if seq.cache.reuse is not None:
                self.policies.take_over(seq, self._spare())
        if seq.stored == seq.prompt_len - 1 and len(seq.request.sequences) < seq.params.n:
            self._branch(seq)
        seq.sync_point, seq.synced = self.admission.sync_point(seq), seq.stored

    def _branch(self, seq: Sequence) -> None:
        children = []
        for index in range(len(seq.request.sequences), seq.params.n):  # all wait first, so if a fork raises, they stay queued
            children.append(self.admission.sequence(seq.request, index))
            self.outputs.open(children[-1])
            self._wait(children[-1])
        for child in children:
            # with shared lanes a fork copies the last page and soon fills it; else it may take as much as a new text
            wanted = 2 if child.cache.lanes is Lanes.SHARED else self.memory.need(child, child.prompt_len + 1)
            if len(self.running) < self.scheduler.max_seqs and self._spare() >= wanted:
                self._fork(seq, child)
                self.waiting.remove(child)
                self._run(child)

    def emit(self) -> list[Event]:
        """Returns the new events of every text. Frees finished sequences and ends failed requests."""
        for seq in self.faults.without(self.running):
            if (event := self.faults.call(seq, self.outputs.event, seq)) is not None:
                self.events.append(event)
        for seq in [seq for seq in self.faults.without(self.running) if seq.reason]:
            self._leave(seq)
        for request, error in list(self.faults.found.values()):
            self.abort(request.id)
            self.events.append(Event.failed(request, error))
        events, self.events = self.events, []
        return events

    def isolate(self, error: BaseException, only: Sequence | None) -> list[Event]:
        """Finds the texts at fault after a step that failed as a whole. If the error does not name one, each running text makes a step
        alone, then each waiting text until one runs. Texts that fail alone are at fault. If no text can step, the first waiting text
        is at fault."""
        if not isinstance(error, Exception):
            raise error
        if (guilty := error.seq if isinstance(error, NotNumbers) else only) is not None:
            self.faults.add(guilty, error)
            return self.emit()
        before = len(self.events)
        for seq in [*self.running, *self.waiting]:
            if seq in self.waiting and self.running:
                break
            if seq in self.waiting or seq in self.running:  # else it ended meanwhile
                self._make_room(seq)
                self.events = self.step(seq)
        if len(self.events) == before and not self.running and self.waiting:
            self.faults.add(self.waiting[0], error)
        return self.emit()

    def _make_room(self, seq: Sequence) -> None:
        """If `seq` runs and lacks pages for a step, preempts other sequences, the last first."""
        others = [other for other in self.running if other is not seq and other.reason is None] if seq in self.running else []
        while others and self.memory.need(seq, seq.pending) > self.memory.available():
            self._preempt(others.pop())

    def _queues(self, only: Sequence | None) -> tuple[Seq[Sequence], list[Sequence]]:
        """The waiting and the running sequences of this step."""
        if only is None:
            return self.waiting, list(self.running)
        return ([only], []) if only in self.waiting else ([], [only])

    # ---- requests come and go

    def add(self, request: Request) -> None:
        """Checks a request and queues its first sequence. On InvalidInput (PromptTooLong) nothing has changed."""
        seq = self.admission.admit(request)
        self.outputs.open(seq)
        self._wait(seq)

    def abort(self, request_id: str) -> bool:
        """Ends all texts of a request at once and frees their memory. Returns False if there is no such request. Errors of its parts
        are not reported."""
        found = False
        for seq in [s for s in (*self.waiting, *self.running) if s.request.id == request_id]:
            found = True
            self._leave(seq)
            seq.reason = FinishReason.ABORT
        self.faults.found.pop(request_id, None)
        return found

    def idle(self) -> bool:
        """Uses a moment without requests for what the drafter wants to measure, one step of the model at most. Returns whether there is
        more to do."""
        return not self.has_work and self.drafter.own.idle(lambda rows, cached: forward_seconds(self, rows, cached))

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running or self.faults.found or self.events)

    def _wait(self, seq: Sequence) -> None:
        """Queues it after all of the same or higher priority."""
        self.waiting.insert(bisect_right(self.waiting, seq.request.priority, key=_priority), seq)

    def _run(self, seq: Sequence) -> None:
        """The last sequence is preempted first."""
        self.running.insert(bisect_right(self.running, seq.request.priority, key=_priority), seq)

    def _preempt(self, seq: Sequence) -> None:
        """Stops a running sequence. It waits again, before those that came later."""
        self.running.remove(seq)
        self.waiting.insert(bisect_left(self.waiting, seq.request.priority, key=_priority), seq)
        self.preemptions += 1
        self.faults.call(seq, self._reset, seq)

    def _spare(self) -> int:
        """Free blocks beyond what running texts need for their pending tokens."""
        return self.memory.available() - sum(self.memory.need(seq, seq.pending) for seq in self.running)

    def _start(self, seq: Sequence, matched: int) -> None:
        self.memory.open(seq)
        try:
            if matched:
                self.memory.attach(seq, matched)
            seq.state[self.sampler] = self.sampler.begin(seq)
            self.policies.begin(seq)
            self.drafter.begin(seq)
        except BaseException:
            self._reset(seq)
            raise

    def _fork(self, seq: Sequence, child: Sequence) -> None:
        self.memory.fork(seq, child)
        try:
            child.state[self.sampler] = self.sampler.fork(seq.state[self.sampler], child)
            self.policies.fork(seq, child)
            self.drafter.fork(seq, child)
        except BaseException:
            self._reset(child)  # it waits and starts again from its tokens, as after preemption
            raise

    def _reset(self, seq: Sequence) -> None:
        """Drops all that is stored. The text can start again from its tokens."""
        self._stop(seq)
        seq.sync_point = self.admission.sync_point(seq)

    def _stop(self, seq: Sequence) -> None:
        """Ends plugin states and frees pages. The tokens stay."""
        self.memory.free(seq)
        seq.stored, seq.synced = 0, -1
        with ExitStack() as ends:  # all run, even if one raises
            ends.callback(seq.state.clear)
            if self.sampler in seq.state:
                ends.callback(self.sampler.end, seq.state[self.sampler])
            ends.callback(self.drafter.end, seq)
            ends.callback(self.policies.end, seq)

    def _leave(self, seq: Sequence) -> None:
        """Removes a sequence that finished or was aborted."""
        self.outputs.close(seq)
        if seq in self.running:
            self.running.remove(seq)
            self.faults.call(seq, self._stop, seq)
        else:
            self.waiting.remove(seq)
        self.drafter.release(seq)

    def _in_use(self) -> Iterator[Any]:
        for seq in (*self.waiting, *self.running):
            yield from self.drafter.parts(seq)
            yield from self.policies.parts(seq)


def _priority(seq: Sequence) -> int:
    return seq.request.priority
