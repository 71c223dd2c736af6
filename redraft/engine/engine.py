"""One step: draft, verify, keep. The page a newcomer reads first is `Engine.step`."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from redraft import registry
from redraft.core.batch import Batch
from redraft.core.law import TopLogprobs
from redraft.core.noise import sample_seed
from redraft.core.plan import Accepted, StepPlan, StepResult, Work
from redraft.core.sequence import NEVER, FinishReason, Lanes, Request, Sequence
from redraft.core.taps import Taps
from redraft.draft.drafter import OpenDrafter
from redraft.engine.guard import Guard
from redraft.engine.policies import Policies
from redraft.engine.text import Decode, Text, find_stop, held_back
from redraft.errors import InvalidInput, OutOfMemory, PromptTooLong, Unsupported
from redraft.models.runner import Runner
from redraft.sample.sampler import Sampler
from redraft.sched.scheduler import Scheduler
from redraft.verify.verifier import Verifier


@dataclass(slots=True)
class Stats:
    """What drafting did for one text. steps: passes that drew a token; drafted: nodes checked; accepted: of them kept;
    fault: which drafter failed and how, where the text went on without drafts."""

    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    fault: str = ""

    @property
    def mean_acceptance_length(self) -> float:
        return 1 + self.accepted / self.steps if self.steps else 0.0


@dataclass(frozen=True, slots=True)
class Event:
    """News of one text. drafted[i]: whether tokens[i] was an accepted draft; the last event carries the reason."""

    request: Request
    index: int
    tokens: list[int]
    text: str
    drafted: list[bool]
    logprobs: list[TopLogprobs]
    reason: FinishReason | None
    stats: Stats


@dataclass(slots=True)
class Output:
    """What was found for a sequence and how much of it was told. The engine's own; plugins never see it."""

    text: Text
    stats: Stats = field(default_factory=Stats)
    told_tokens: int = 0
    told_text: int = 0
    drafted: list[bool] = field(default_factory=list)
    logprobs: list[TopLogprobs] = field(default_factory=list)
    stop: tuple[int, int] | None = None  # where the stop string that ended the text lies in it


class Engine:
    """Sequences, a page table and the parts of a step. Synchronous, single-threaded, and never names a method."""

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
        decode: Decode | None = None,
        decode_all: Decode | None = None,
        draft: str | None = None,
    ) -> None:
        """`decode` turns ids into text without special tokens, `decode_all` with them; None: outputs have no text. `draft`:
        what the drafter is called in the statistics."""
        if unfit := drafter.kinds - verifier.undoes:
            kinds = ", ".join(sorted(kind.name for kind in unfit))
            fit = [name for name in registry.METHODS["verify"] if drafter.kinds <= registry.method("verify", name).undoes]  # type: ignore[attr-defined]
            own, drawn = registry.name_of(type(verifier)), draft or type(drafter).__name__
            raise Unsupported(f"verifier {own} cannot undo children made {kinds}, as {drawn} makes them; these can: {', '.join(fit)}")
        if runner.table.slabs * runner.table.page < max_model_len:
            raise OutOfMemory(f"a pool of {runner.table.slabs} pages cannot hold one sequence of max_model_len = {max_model_len} tokens")
        self.runner, self.table, self.store = runner, runner.table, runner.store
        self.scheduler, self.drafter, self.verifier, self.sampler = scheduler, Guard(drafter, runner.spec.vocab, draft), verifier, sampler
        self.policies = Policies(runner)
        self.max_model_len, self.eos = max_model_len, frozenset(eos)
        self.decode, self.decode_all = decode, decode_all
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.outputs: dict[int, Output] = {}
        self.preemptions = 0
        self._ids = 0

    # ---- the step

    def step(self) -> list[Event]:
        if any(seq.reason for seq in self.running):
            return self.emit()  # a part raised behind the last commit: what was found is told first
        self.cross(list(self.running))  # newcomers that start at their border, and where a part raised before this
        plan = self.scheduler.plan(self.waiting, self.running, self.table)  # pure: who runs, is admitted, is preempted
        self.enact(plan)  # pages freed, sequences moved, shared prefixes attached
        if not plan.work:
            return self.emit()
        try:
            trees = self.drafter.propose(plan.seqs, plan.budgets)  # budget 0, or nothing to say: an empty tree
            pages = self.table.reserve(plan.work, trees)  # every sequence's tentative tail
            self.store.zero(pages.fresh)
            batch = Batch.pack(plan.work, trees, pages)  # chain(pending) + draft, for every sequence
            out = self.runner.forward(batch, self.taps(plan))  # the union of what sampler, drafter and policies ask for
            law = self.sampler.law(out, batch, plan.work, trees)  # lazy: rows are computed when a verifier visits them
            accepted = self.finish(plan.work, self.verifier.accept(trees, law))  # cut at end of text, stop, max_tokens, context
        except BaseException:
            for seq in plan.seqs:
                self.table.discard(seq)
            raise
        self.store.move(self.table.commit(plan.work, accepted))  # path kept, siblings freed; tokens and stored advance
        result = StepResult(plan.work, trees, batch, accepted, out, law)
        self.record(result)
        self.drafter.observe(result)
        self.policies.observe(result)
        self.cross(plan.seqs)  # full pages are published; borders reached: a policy decides, n > 1 forks
        return self.emit()

    # ---- what the step is made of

    def enact(self, plan: StepPlan) -> None:
        """Frees the preempted, who wait again in arrival order; opens the admitted and attaches what `plan` counted."""
        for seq in plan.preempt:
            self.running.remove(seq)
            self._stop(seq)
            self.waiting.appendleft(seq)
            self.preemptions += 1
        for seq, matched in plan.admit:
            self._start(seq, matched)
            self.waiting.remove(seq)
            self.running.append(seq)
            if seq.request.cached_tokens is None:
                seq.request.cached_tokens = matched
                seq.request.miss = self.table.prefix.miss(seq.request.prompt, seq.request.salt)

    def taps(self, plan: StepPlan) -> Taps:
        return self.sampler.needs(plan.work) | self.drafter.taps | Taps(attention=self.policies.watch(plan.seqs))

    def finish(self, work: Seq[Work], accepted: Seq[Accepted]) -> list[Accepted]:
        """Cuts each path before anything is committed, observed or counted; after it, no code shortens a sequence."""
        return [self._cut(w.seq, found) if found.tokens else found for w, found in zip(work, accepted, strict=True)]

    def _cut(self, seq: Sequence, found: Accepted) -> Accepted:
        params, text, start = seq.params, self.outputs[seq.id].text, self.outputs[seq.id].text.first
        tail = [*seq.tokens[start:], *found.tokens] if params.stop else []
        for i, token in enumerate(found.tokens):
            new = seq.generated + i + 1
            reason = None
            if params.stop:
                before = len(text.done)
                text = text.extend(tail[: len(seq.tokens) - start + i + 1], self._decoder(seq), start=start)
                if new >= params.min_tokens:
                    self.outputs[seq.id].stop = stop = find_stop(text.done, params.stop, before)
                    reason = FinishReason.STOP if stop else None
            if new >= params.min_tokens and (token in params.stop_token_ids or (token in self.eos and not params.ignore_eos)):
                reason = FinishReason.STOP
            if reason is None and (new == params.max_tokens or seq.prompt_len + new == self._limit(seq.request)):
                reason = FinishReason.LENGTH
            if reason is not None:
                return Accepted(found.path[:i], found.tokens[: i + 1], reason)
        return found

    def record(self, result: StepResult) -> None:
        """Statistics, reasons and log-probabilities of what was just committed."""
        for s, (w, tree, found) in enumerate(zip(result.work, result.trees, result.accepted, strict=True)):
            params = w.seq.params
            if params.prompt_logprobs is not None:
                self._record_prompt(w, s, result)
            if not found.tokens:
                continue
            output, w.seq.reason = self.outputs[w.seq.id], found.reason
            output.stats.steps += 1
            output.stats.fault = w.seq.fault
            output.stats.drafted += len(tree)
            output.stats.accepted += len(found.path)
            output.drafted += [True] * len(found.path) + [False]
            if params.logprobs is not None:
                root = int(result.batch.roots[s])
                rows = [root, *(root + 1 + node for node in found.path)]
                output.logprobs += result.law.logprobs(rows, found.tokens, params.logprobs)

    def _record_prompt(self, w: Work, s: int, result: StepResult) -> None:
        """Each prompt row tells of the token behind it; a part that runs again after preemption is not told again."""
        seq, told, k = w.seq, w.seq.request.prompt_logprobs, w.seq.params.prompt_logprobs
        first, last = int(result.batch.starts[s]), int(result.batch.tree_starts[s])
        wanted = [r for r in range(first, last) if len(told) <= int(result.batch.positions[r]) + 1 < seq.prompt_len]
        if not told:
            told.append(None)
            wanted = [r for r in range(first, last) if int(result.batch.positions[r]) + 1 < seq.prompt_len]
        if wanted and k is not None:
            place = {row: i for i, row in enumerate(result.batch.logit_rows.tolist())}
            ids = [seq.tokens[int(result.batch.positions[r]) + 1] for r in wanted]
            told += result.law.logprobs([place[r] for r in wanted], ids, k)

    def cross(self, seqs: Iterable[Sequence]) -> None:
        """Publishes pages that became full; policies decide. At the border behind all but the last prompt token, a request for
        n texts forks; without pages for a fork, the sibling waits and finds its prompt in the prefix cache."""
        for seq in seqs:
            self.table.publish(seq)
            self.policies.cross(seq)
            if seq.request.reuse:
                self.policies.take_over(seq, self._spare())
            if seq.stored == seq.prompt_len - 1 and len(seq.request.sequences) < seq.params.n:
                self._branch(seq)
            seq.border = self._border(seq)

    def _branch(self, seq: Sequence) -> None:
        children = [self._sequence(seq.request, index) for index in range(1, seq.params.n)]
        self.waiting += children  # a fork that raises leaves the siblings waiting
        for child in children:
            # a fork of shared lanes copies the last page and soon fills it; of others, at worst all that a new text would take
            wanted = 2 if child.lanes is Lanes.SHARED else self.table.need(child, child.prompt_len + 1)
            if len(self.running) < self.scheduler.max_seqs and self._spare() >= wanted:
                self._fork(seq, child)
                self.waiting.remove(child)
                self.running.append(child)

    def emit(self) -> list[Event]:
        """News of every text since it was last told; what finished is freed."""
        events = []
        for seq in self.running:
            output = self.outputs[seq.id]
            if output.told_tokens < seq.generated:
                events.append(self._event(seq, output))
        if any(seq.reason for seq in self.running):
            for seq in [seq for seq in self.running if seq.reason]:
                self.running.remove(seq)
                self._stop(seq)
                del self.outputs[seq.id]
        return events

    def _event(self, seq: Sequence, output: Output) -> Event:
        told, ended = output.told_tokens, seq.reason is not None
        text = ""
        if self.decode is not None:
            start = output.text.first
            tail = seq.tokens[start:]
            for end in range(seq.prompt_len + told + 1 - start, len(tail) + 1):  # one by one, whatever the step's size
                output.text = output.text.extend(tail[:end], self._decoder(seq), start=start, last=ended and end == len(tail))
            done, stops = output.text.done, seq.params.stop
            end = len(done)
            if output.stop is not None and seq.reason is FinishReason.STOP:
                end = output.stop[1] if seq.params.include_stop_str_in_output else output.stop[0]
            elif stops and not ended:
                end -= held_back(done, stops)
            text = done[output.told_text : end]
            output.told_text = max(output.told_text, end)
        output.told_tokens = seq.generated
        new = slice(told, seq.generated)
        tokens = seq.tokens[seq.prompt_len + told :]
        return Event(seq.request, seq.index, tokens, text, output.drafted[new], output.logprobs[new], seq.reason, output.stats)

    # ---- requests come and go

    def add(self, request: Request) -> None:
        """Checks a request and queues its first sequence. InvalidInput (PromptTooLong) changes nothing."""
        vocab, prompt = self.runner.spec.vocab, request.prompt
        if not prompt:
            raise InvalidInput("prompt is empty: at least one token is needed")
        for i, token in enumerate(prompt):
            if type(token) is not int or not 0 <= token < vocab:
                raise InvalidInput(f"prompt_token_ids[{i}] = {token!r}: not a token id in 0..{vocab - 1}")
        self.policies.check(request.params, request.reuse)
        if len(prompt) >= self._limit(request):
            raise PromptTooLong(f"prompt has {len(prompt)} tokens: max_model_len = {self.max_model_len} leaves no room for a new one")
        for i, token in enumerate(request.before):
            if type(token) is not int or not 0 <= token < vocab:
                raise InvalidInput(f"before[{i}] = {token!r}: not a token id in 0..{vocab - 1}")
        if request.context is not None and not 1 <= request.context <= len(prompt):
            raise InvalidInput(f"context = {request.context}: 1 to {len(prompt)}, the tokens of the prompt, is allowed")
        for token in request.params.stop_token_ids:
            if not 0 <= token < vocab:
                raise InvalidInput(f"stop_token_ids: {token} is not a token id in 0..{vocab - 1}")
        if isinstance(request.params.prediction, str):
            raise InvalidInput("prediction is a text, and this engine has no tokenizer; give token ids")
        for i, token in enumerate(request.params.prediction or ()):
            if not 0 <= token < vocab:
                raise InvalidInput(f"prediction[{i}] = {token}: not a token id in 0..{vocab - 1}")
        if request.params.stop and self.decode is None:
            raise InvalidInput("stop needs a tokenizer, and this engine has none; use stop_token_ids")
        self.sampler.check(request.params)
        if request.params.seed is None:
            request.params = request.params.but(seed=secrets.randbits(63))
        seq = self._sequence(request, 0)
        total = min(self._limit(request), len(prompt) + (request.params.max_tokens or self.max_model_len))
        if (need := self.table.need(seq, total)) > self.table.slabs:
            del self.outputs[seq.id]
            request.sequences.clear()
            raise InvalidInput(
                f"{total} tokens need {need} pages in the form that this request chose, the pool has {self.table.slabs}: ask for fewer"
                " max_tokens, or give the pool more memory"
            )
        self.waiting.append(seq)

    def abort(self, request_id: str) -> bool:
        """Ends all texts of a request at once and frees what they hold; False when there is no such request."""
        found = False
        for seq in [s for s in (*self.waiting, *self.running) if s.request.id == request_id]:
            found = True
            if seq in self.running:
                self.running.remove(seq)
                self._stop(seq)
            else:
                self.waiting.remove(seq)
            seq.reason = FinishReason.ABORT
            del self.outputs[seq.id]
        return found

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def _sequence(self, request: Request, index: int) -> Sequence:
        assert request.params.seed is not None
        self._ids += 1
        seq = Sequence(self._ids, request, index, list(request.prompt), len(request.prompt), sample_seed(request.params.seed, index), 0)
        self.policies.fit(seq)
        request.sequences.append(seq)
        seq.border = self._border(seq)
        self.outputs[seq.id] = Output(Text.start(seq.prompt_len))
        return seq

    def _border(self, seq: Sequence) -> int:
        """The next value of `stored` that no step may cross."""
        request = seq.request
        border = self._limit(request) - 1
        if request.params.max_tokens is not None:
            border = min(border, seq.prompt_len + request.params.max_tokens - 1)
        if seq.index == 0 and len(request.sequences) < request.params.n and seq.stored < seq.prompt_len:
            border = seq.prompt_len - 1
        return min(border, self.policies.border(seq))

    def _spare(self) -> int:
        """Slabs that no text in progress needs."""
        return self.table.available() - sum(self.table.need(seq, seq.pending) for seq in self.running)

    def _limit(self, request: Request) -> int:
        """Tokens of prompt and output. A policy for which the context has no end is taken at its word where max_tokens is given."""
        endless = request.params.max_tokens is not None and self.policies.endless(request.params)
        return NEVER if endless else self.max_model_len

    def _start(self, seq: Sequence, matched: int) -> None:
        self.table.open(seq)
        try:
            if matched:
                self.table.attach(seq, matched)
            seq.state[self.sampler] = self.sampler.begin(seq)
            self.policies.begin(seq)
            self.drafter.begin(seq)
        except BaseException:
            self._stop(seq)
            raise

    def _fork(self, seq: Sequence, child: Sequence) -> None:
        self.store.move([self.table.fork(seq, child)])
        try:
            child.state[self.sampler] = self.sampler.fork(seq.state[self.sampler], child)
            self.policies.fork(seq, child)
            self.drafter.fork(seq, child)
        except BaseException:
            self._stop(child)  # it waits and starts from its tokens, as after preemption
            raise

    def _stop(self, seq: Sequence) -> None:
        """Plugin states end and pages go; the tokens stay, so a preempted sequence can start again."""
        self.table.free(seq)
        seq.stored = 0
        self.policies.end(seq)
        seq.border = self._border(seq)
        self.drafter.end(seq)
        if self.sampler in seq.state:
            self.sampler.end(seq.state[self.sampler])
        seq.state.clear()

    def _decoder(self, seq: Sequence) -> Decode:
        decode = self.decode if seq.params.skip_special_tokens else self.decode_all
        assert decode is not None
        return decode
