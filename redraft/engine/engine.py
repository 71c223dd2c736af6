"""One step: draft, verify, keep. Start reading at `Engine.step`."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq
from contextlib import ExitStack
from time import monotonic
from typing import Any, NamedTuple

from redraft.core.batch import Batch
from redraft.core.plan import StepPlan, StepResult
from redraft.core.sequence import PLAIN, FinishReason, Request, Sequence
from redraft.core.taps import Taps
from redraft.core.tree import TokenTree
from redraft.draft.drafter import OpenDrafter
from redraft.engine.admission import Admission
from redraft.engine.arrivals import Arrivals
from redraft.engine.chunks import ChunkTexts
from redraft.engine.departures import Departures, travels
from redraft.engine.faults import Faults
from redraft.engine.holds import Holds
from redraft.engine.idle import forward_seconds
from redraft.engine.opened import Opened
from redraft.engine.output import Event, Outputs, Progress
from redraft.engine.parcel import Parcel, Source
from redraft.engine.policies import Policies
from redraft.engine.speculation import Drafters, Verifiers
from redraft.kv.reuse.chunks import FILLER
from redraft.kv.table import PageTable
from redraft.models.runner import Runner
from redraft.models.tokenizer import Decoder
from redraft.sample.processors.processor import TextError
from redraft.sample.sampler import Sampler
from redraft.sched.draft_memory import DraftMemory
from redraft.sched.scheduler import Scheduler
from redraft.verify.verifier import Verifier, opened

LOGIT = 4  # bytes, at least


class Begun(NamedTuple):
    """A step between its halves. batch: for the forward pass, which returns what `taps` asks for."""

    plan: StepPlan
    trees: list[TokenTree]
    batch: Batch
    taps: Taps


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
        clock: Callable[[], float] = monotonic,
        parks: bool = False,
        draft_memory: int | None = None,
    ) -> None:
        """`decode` turns ids into text without special tokens, `decode_all` with them; None: outputs have no text. `draft`:
        the drafter's name in the statistics. clock: gives the time in seconds. parks: the default of add(). draft_memory: the most bytes
        that the drafts of a step may take, None for no limit of their own."""
        self.runner, self.memory = runner, runner.memory
        self.scheduler, self.sampler = scheduler, sampler
        self.draft_memory: DraftMemory | None = None
        if draft_memory is not None:  # backends without numbers have no limit
            row = runner.spec.vocab * max(LOGIT, runner.backend.dtype.itemsize)
            self.draft_memory = DraftMemory(draft_memory, row, runner.memory.paged.store.block_bytes)
        self.opened = Opened(self._in_use)  # methods that requests chose
        verifier = opened(verifier, runner)
        self.drafter, self.verifier = Drafters(drafter, runner, sampler, verifier, self.opened, draft), Verifiers(verifier)
        self.policies = Policies(runner, self.opened)
        self.admission = Admission(runner, sampler, self.drafter, self.policies, max_model_len=max_model_len, spells=decode is not None)
        self.max_model_len, self.eos, self.clock = max_model_len, frozenset(eos), clock
        self.departures, self.arrivals, self.parks = Departures(runner), Arrivals(runner), parks
        self.holds = Holds(runner)
        self.chunk_texts = ChunkTexts(runner.memory, max_model_len - 1, self.arrivals.on_disk)
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
        self.blocked = False  # whether the waiting texts lack memory that parked ones hold

    @property
    def table(self) -> PageTable:
        """The page table of the layers that own pages, to inspect."""
        return self.runner.table

    # ---- the step

    def step(self, only: Sequence | None = None) -> list[Event]:
        """Runs one step and returns its events. If a part raises an Exception for one text, an Event with the error ends that request,
        and the others continue. Ctrl-C and other BaseExceptions are raised, and no text is lost. `only`: this text runs alone, see
        `isolate`."""
        begun = None
        try:
            begun = self.begin(only)
            if begun is None:
                return self.emit()
            out = self.runner.forward(begun.batch, begun.taps)  # returns what sampler, drafter and policies request
        except BaseException as error:
            return self.isolate(error, begun, only)
        return self.end(begun, out, only)

    def begin(self, only: Sequence | None = None) -> Begun | None:
        """The first half of a step: plans, drafts and reserves memory for the forward pass. None if there is nothing to run. Until `end`,
        requests may be added, but not aborted."""
        waiting, running = self._queues(only)
        if any(seq.reason for seq in running):
            return None  # an interrupt came after the last commit: report its results first
        self.sync(running)  # for new sequences that start at a sync point, and after an interrupt
        plan = self.enact(self._plan(waiting, running))  # pages freed, sequences moved, shared prefixes attached
        if self.draft_memory is not None:
            plan = self.draft_memory.cut(plan, self.memory, logits=self.taps(plan).logits)
        if not plan.work:
            self.blocked = bool(self.departures.parked) and not self.running
            return None
        try:
            trees = self.drafter.propose(plan.work, plan.budgets)  # an empty tree without a budget or a draft
            pages = self.memory.reserve(plan.work, trees)  # every sequence's tentative tail
            batch = Batch.pack(plan.work, trees, pages)  # pending tokens and draft of every sequence
            return Begun(plan, trees, batch, self.taps(plan))
        except BaseException:
            self._discard(plan)
            raise

    def end(self, begun: Begun, out: Any, only: Sequence | None = None) -> list[Event]:
        """The second half: verifies the draft, keeps the accepted path and returns the events. out: of the forward pass."""
        (plan, trees, batch, _), work = begun, begun.plan.work
        try:
            distribution = self.sampler.distribution(out, batch, work, trees)  # lazy: rows are computed when a verifier visits them
            accepted = self.outputs.cut(work, self.verifier.accept(work, trees, distribution))  # at the end of the text
            surprises = distribution.surprises(accepted)
            moves = self.memory.commit(work, accepted)  # keeps the accepted path and frees the rest; tokens and stored advance
        except BaseException as error:
            return self.isolate(error, begun, only)
        for seq, surprise in surprises:
            seq.surprise = surprise
        result = StepResult(work, trees, batch, accepted, out, distribution)
        self.outputs.record(result)
        try:
            self.memory.move(moves)
        except BaseException as error:  # unknown which keys were moved, so all start again
            for seq in plan.seqs:
                if seq.reason is None:
                    self._preempt(seq)
            return self.isolate(error, None, only)
        self.drafter.observe(result)
        self.policies.observe(result, self.faults)
        self.sync(plan.seqs)  # publishes full pages; at sync points policies decide and n > 1 forks
        return self.emit()

    # ---- parts of the step

    def _plan(self, waiting: Seq[Sequence], running: Seq[Sequence]) -> StepPlan:
        """What the scheduler chooses. Changes nothing, but that prefixes are held no longer where texts lack their memory."""
        if self.holds and self._spare() < 0:
            self.holds.release()
        ready = self.chunk_texts.ready(self.faults.without(waiting))
        given = ready, self.faults.without(running), self.memory, 0 if self.departures.parked else 1
        plan = self.scheduler.plan(*given)
        if self.holds and not (plan.work or plan.admit):
            self.holds.release()
            plan = self.scheduler.plan(*given)
        return plan

    def enact(self, plan: StepPlan) -> StepPlan:
        """Frees preempted sequences, which wait again in arrival order. Opens admitted sequences and attaches the prefixes that `plan`
        matched. Returns the plan without sequences that failed."""
        for seq in plan.preempt:
            self._preempt(seq)
        for seq, matched in sorted(plan.admit, key=lambda one: one[0].arrives > 0):  # what arrives may take pages that match others
            self.faults.call(seq, self._admit, seq, matched)
        return plan.only(self.faults.without(plan.seqs)) if self.faults.found else plan

    def _admit(self, seq: Sequence, matched: int) -> None:
        self._start(seq, matched)
        self.waiting.remove(seq)
        self._run(seq)
        if seq.request.admitted is None:
            seq.request.admitted = self.clock()
        if seq.request.cached_tokens is None:
            seq.request.cached_tokens = seq.stored
            miss = self.table.prefix.miss(seq.request.prompt, seq.request.salt)
            seq.request.miss = None if seq.request.chunks and miss is not None and miss.cached == FILLER else miss

    def taps(self, plan: StepPlan) -> Taps:
        seqs = plan.seqs
        drafts = self.drafter.taps(seqs) | self.verifier.taps(seqs)
        return self.sampler.needs(plan.work) | drafts | self.outputs.taps(seqs) | self.policies.taps(seqs)

    def sync(self, seqs: Iterable[Sequence]) -> None:
        """Publishes full pages and lets policies decide. A request for n texts forks once all but the last prompt token is stored. If
        pages for a fork are missing, the sibling waits and later finds its prompt in the prefix cache."""
        for seq in self.faults.without(list(seqs)):
            if seq.synced != seq.stored or seq.cache is not PLAIN:  # policies may still have to decide
                self.faults.call(seq, self._sync, seq)

    def _sync(self, seq: Sequence) -> None:
        self.memory.publish(seq)
        self.holds.keep(seq)
        if seq.cache is not PLAIN:
            self.policies.sync(seq)
            if seq.cache.reuse is not None:
                self.policies.reuse.take_over(seq, self._spare())
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
            # a text with one lane lists the full pages of its sibling; else it may take as much as a new text
            listed = seq.stored if child.cache.shares else 0
            wanted = self.memory.need(child, child.prompt_len + 1, listed)
            if len(self.running) < self.scheduler.max_seqs and self._spare() >= wanted:
                self._fork(seq, child)
                self.waiting.remove(child)
                self._run(child)

    def emit(self) -> list[Event]:
        """Returns the new events of every text. Frees finished sequences, parks those that leave and ends failed requests."""
        leaving = []
        for seq in self.faults.without(self.running):
            if (event := self.faults.call(seq, self.outputs.event, seq)) is not None:
                if not seq.request.hidden:
                    self.events.append(event)
                if seq.request.leaves and event.reason is None:
                    leaving.append(seq)
        for seq in [seq for seq in self.faults.without(self.running) if seq.reason]:
            self._leave(seq)
        self._park(leaving)
        for request, error in list(self.faults.found.values()):
            self.abort(request.id)
            if not request.hidden:  # those that wait for it are computed without it
                self.events.append(Event.failed(request, error))
        events, self.events = self.events, []
        return events

    def isolate(self, error: BaseException, begun: Begun | None, only: Sequence | None) -> list[Event]:
        """Finds the texts at fault after a step that failed as a whole. If the error does not name one, each running text makes a step
        alone, then each waiting text until one runs. Texts that fail alone are at fault. If no text can step, the first waiting text
        is at fault. begun: the step, if it had begun and was not committed."""
        if begun is not None:
            self._discard(begun.plan)
        if not isinstance(error, Exception):
            raise error
        if (guilty := error.seq if isinstance(error, TextError) else only) is not None:
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

    def _discard(self, plan: StepPlan) -> None:
        for seq in plan.seqs:
            self.memory.discard(seq)

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

    def add(self, request: Request, progress: Seq[Progress] = (), *, parks: bool | None = None) -> None:
        """Checks a request and queues its first sequence. On InvalidInput (PromptTooLong) nothing has changed. progress: of each of its
        texts, if it began in another engine; its events continue after that, and its texts are the same. parks: its texts leave this
        engine after the event with their first new tokens; see ready(). None: as the engine's own `parks`."""
        seqs = self.admission.admit(request, progress)
        if request.arrived is None:
            request.arrived = self.clock()
        for text in self.chunk_texts.lacking(request) if not progress else ():
            self.add(text, parks=False)
        for seq in seqs:
            self.outputs.open(seq)
            if progress:
                self.outputs.resume(seq, progress[seq.index].stats)
            self._wait(seq)
        self.blocked = False
        request.leaves = self.parks if parks is None else parks

    def arrange(self) -> None:
        """Lets the scheduler order the requests that wait as one batch: all of it is known now. What their prompts share is held."""
        if groups := self.scheduler.groups(self.waiting, self.table.page):
            for group, members in groups:
                for seq in members:
                    seq.request.group = group if group.prefix and self.table.sharing else None
            self.waiting = deque(sorted((seq for _, members in groups for seq in members), key=_priority))

    def abort(self, request_id: str) -> bool:
        """Ends all texts of a request at once and frees their memory. Returns False if there is no such request. Errors of its parts
        are not reported."""
        found, self.blocked = self.departures.forget(request_id), False
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

    def forget_prefixes(self) -> int:
        """Frees the published pages that no text lists, and returns their number. On disk there are none after it."""
        if self.runner.disk is not None:
            self.runner.disk.clear()
        return self.table.forget()

    @property
    def has_work(self) -> bool:
        """Whether a step may do something. Parked texts are no work, nor are those that wait for the memory of parked ones."""
        return bool(self.running or self.faults.found or self.events or (self.waiting and not self.blocked))

    # ---- requests change engines

    def ready(self) -> list[str]:
        """The requests whose texts are all parked or ended, each once. Their pages stay until forget()."""
        return self.departures.ready()

    def release(self, request_id: str) -> Parcel:
        """What another engine needs to go on with a request that ready() named. May be called again until forget(). InvalidInput if there
        is no such request."""
        return self.departures.release(request_id)

    def forget(self, request_id: str) -> None:
        """Frees the pages of a released request, if it is still here."""
        self.departures.forget(request_id)
        self.blocked = False

    def adopt(self, parcel: Parcel, source: Source) -> None:
        """Goes on with a request that another engine released. Its texts wait like others. When one is admitted, the pages that the
        prefix cache lacks are copied from `source`; if that fails, the text is computed again. See settled(). Unsupported if the parcel
        comes from another model, InvalidInput as for add(); then nothing has changed."""
        parcel.check(self.runner)
        self.add(parcel.request, parcel.progress, parks=False)
        for seq, stored in zip(parcel.request.sequences, parcel.stored, strict=True):
            if stored is not None:
                seq.stored = seq.arrives = len(seq.tokens) - 1
                seq.sync_point, seq.stored = self.admission.sync_point(seq), 0
                self.arrivals.expect(seq, stored, source)
        self.arrivals.settle(parcel.request.id)

    def settled(self) -> list[str]:
        """The adopted requests that do not need their source any more, each once."""
        return self.arrivals.settled()

    def _park(self, seqs: Iterable[Sequence]) -> None:
        for seq in seqs:
            self.departures.park(seq, self.outputs.progress(seq))
            self.outputs.close(seq)
            self.running.remove(seq)
            self.faults.call(seq, self._end if travels(seq) else self._stop, seq)
            self.drafter.release(seq)
            self.holds.leave(seq, (*self.waiting, *self.running))
        for request in self.departures.unready():
            if not any(seq.request is request for seq in self.running):
                for seq in [seq for seq in self.waiting if seq.request is request]:  # it lacked memory: another engine computes it
                    self.departures.park(seq, self.outputs.progress(seq))
                    self._leave(seq)
                    self.blocked = False
                self.departures.settle(request)

    # ---- parts of both

    def _wait(self, seq: Sequence) -> None:
        """Queues it after all of the same or higher priority."""
        self.arrivals.look(seq)
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
        self.arrivals.look(seq)

    def _spare(self) -> int:
        """Free blocks beyond what running texts need for their pending tokens."""
        return self.memory.available() - sum(self.memory.need(seq, seq.pending) for seq in self.running)

    def _start(self, seq: Sequence, matched: int) -> None:
        self.arrivals.open(seq, matched)
        try:
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
        self._end(seq)

    def _end(self, seq: Sequence) -> None:
        """Ends plugin states."""
        with ExitStack() as ends:  # all run, even if one raises
            ends.callback(seq.state.clear)
            if self.sampler in seq.state:
                ends.callback(self.sampler.end, seq.state[self.sampler])
            ends.callback(self.drafter.end, seq)
            ends.callback(self.policies.end, seq)

    def _leave(self, seq: Sequence) -> None:
        """Removes a sequence that finished or was aborted."""
        self.outputs.close(seq)
        self.arrivals.drop(seq)
        if seq in self.running:
            self.running.remove(seq)
            self.faults.call(seq, self._stop, seq)
        else:
            self.waiting.remove(seq)
        self.drafter.release(seq)
        self.holds.leave(seq, (*self.waiting, *self.running))
        for text in self.chunk_texts.ended(seq.request):
            self.abort(text)

    def _in_use(self) -> Iterator[Any]:
        for seq in (*self.waiting, *self.running):
            yield from self.drafter.parts(seq)
            yield from self.policies.parts(seq)


def _priority(seq: Sequence) -> int:
    return seq.request.priority
