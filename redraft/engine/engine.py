"""One step: draft, verify, keep. The page a newcomer reads first is `Engine.step`."""

from __future__ import annotations

import secrets
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from time import monotonic

import numpy as np

from redraft.core.batch import Batch
from redraft.core.law import TopLogprobs
from redraft.core.noise import sample_seed
from redraft.core.plan import Accepted, StepPlan, StepResult, Work
from redraft.core.sequence import NEVER, FinishReason, Lanes, Pooling, Request, Sequence
from redraft.core.taps import Taps
from redraft.core.tree import TokenTree
from redraft.draft.drafter import OpenDrafter
from redraft.engine.policies import Policies
from redraft.engine.speculation import Drafters, Verifiers
from redraft.engine.text import Decode, Text, find_stop, held_back
from redraft.errors import InvalidInput, OutOfMemory, PromptTooLong
from redraft.models.runner import Runner
from redraft.sample.sampler import NotNumbers, Sampler
from redraft.sched.scheduler import Scheduler
from redraft.verify.verifier import Verifier


@dataclass(slots=True)
class Stats:
    """What drafting did for one text. steps: passes that drew a token; drafted: nodes checked; accepted: of them kept;
    fault: which drafter failed and how, where the text went on without drafts; drafts: passes that checked any; by_depth[i]:
    passes that kept i + 1 nodes or more; by_drafter: nodes checked and kept of each."""

    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    fault: str = ""
    drafts: int = 0
    by_depth: list[int] = field(default_factory=list)
    by_drafter: dict[str, tuple[int, int]] = field(default_factory=dict)

    def count(self, tree: TokenTree, path: Seq[int], names: Seq[str]) -> None:
        """One pass that drew a token."""
        self.steps += 1
        if not len(tree):
            return
        self.drafts += 1
        self.drafted += len(tree)
        self.accepted += len(path)
        self.by_depth += [0] * (len(path) - len(self.by_depth))
        for depth in range(len(path)):
            self.by_depth[depth] += 1
        origins = np.zeros(len(tree), np.int64) if tree.origins is None else tree.origins.astype(np.int64)
        for origin in set(origins.tolist()):
            checked, kept = self.by_drafter.get(names[origin], (0, 0))
            own = origins == origin
            self.by_drafter[names[origin]] = checked + int(own.sum()), kept + int(own[list(path)].sum())

    def copy(self) -> Stats:
        return replace(self, by_depth=list(self.by_depth), by_drafter=dict(self.by_drafter))

    @property
    def mean_acceptance_length(self) -> float:
        return 1 + self.accepted / self.steps if self.steps else 0.0


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a token is from. step: the pass that drew it, from 1; drafter: who proposed it, empty where the model drew it undrafted;
    tree, names, path: of the step's first token, what was drafted, by whom, and the nodes that were kept."""

    step: int
    drafter: str
    tree: TokenTree | None = None
    names: Seq[str] = ()
    path: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Event:
    """News of one text. drafted[i]: whether tokens[i] was an accepted draft; the last event carries the reason. provenance: one a
    token where the request asked."""

    request: Request
    index: int
    tokens: list[int]
    text: str
    drafted: list[bool]
    logprobs: list[TopLogprobs]
    reason: FinishReason | None
    stats: Stats
    provenance: list[Provenance] = field(default_factory=list)


@dataclass(slots=True)
class Output:
    """What was found for a sequence and how much of it was told. The engine's own; plugins never see it."""

    text: Text
    stats: Stats = field(default_factory=Stats)
    told_tokens: int = 0
    told_text: int = 0
    drafted: list[bool] = field(default_factory=list)
    logprobs: list[TopLogprobs] = field(default_factory=list)
    provenance: list[Provenance] = field(default_factory=list)
    stop: tuple[int, int] | None = None  # where the stop string that ended the text lies in it


class Engine:
    """Sequences, their memory and the parts of a step. Synchronous, single-threaded, and never names a method."""

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
        if runner.memory.slabs * runner.memory.paged.table.page < max_model_len:
            raise OutOfMemory(f"a pool of {runner.memory.slabs} pages cannot hold one sequence of max_model_len = {max_model_len} tokens")
        self.runner, self.memory = runner, runner.memory
        self.scheduler, self.sampler = scheduler, sampler
        self.drafter, self.verifier = Drafters(drafter, runner, sampler, verifier, draft), Verifiers(verifier)
        self.policies = Policies(runner)
        self.max_model_len, self.eos = max_model_len, frozenset(eos)
        self.decode, self.decode_all = decode, decode_all
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.outputs: dict[int, Output] = {}
        self.preemptions = 0
        self.blamed: list[tuple[Sequence, Exception]] = []  # whose part raised in the last step, and what, as far as it is known
        self.news: list[Event] = []  # what a step that raised had to tell
        self._ids = 0

    # ---- the step

    def step(self, only: Sequence | None = None) -> list[Event]:
        """`only`: this text runs alone, see `settle`. What the part of one text raises ends the step for that text; the others'
        step is done, and then it raises."""
        self.blamed = []
        waiting: Seq[Sequence]
        waiting, running = (self.waiting, self.running) if only is None else ([only], []) if only in self.waiting else ((), [only])
        if any(seq.reason for seq in running):
            return self.emit()  # a part raised behind the last commit: what was found is told first
        self.cross(list(running))  # newcomers that start at their border, and where a part raised before this
        self._raise()
        plan = self.scheduler.plan(waiting, running, self.memory)  # pure: who runs, is admitted, is preempted
        self.enact(plan)  # pages freed, sequences moved, shared prefixes attached
        self._raise()
        if not plan.work:
            return self.emit()
        try:
            trees = self.drafter.propose(plan.work, plan.budgets)  # budget 0, or nothing to say: an empty tree
            pages = self.memory.reserve(plan.work, trees)  # every sequence's tentative tail
            batch = Batch.pack(plan.work, trees, pages)  # chain(pending) + draft, for every sequence
            out = self.runner.forward(batch, self.taps(plan))  # the union of what sampler, drafter and policies ask for
            law = self.sampler.law(out, batch, plan.work, trees)  # lazy: rows are computed when a verifier visits them
            accepted = self.finish(plan.work, self.verifier.accept(plan.work, trees, law))  # cut at end of text, stop, max_tokens, context
            moves = self.memory.commit(plan.work, accepted)  # path kept, siblings freed; tokens and stored advance
        except BaseException as error:
            self.blamed += [(error.seq, error)] if isinstance(error, NotNumbers) else []
            for seq in plan.seqs:
                self.memory.discard(seq)
            raise
        result = StepResult(plan.work, trees, batch, accepted, out, law)
        self.record(result)
        try:
            self.memory.move(moves)
        except BaseException:  # nobody knows which keys lie where they should
            for seq in plan.seqs:
                if seq.reason is None:
                    self._preempt(seq)
            raise
        self.drafter.observe(result)
        self.policies.observe(result, self.blamed)
        self.cross(plan.seqs)  # full pages are published; borders reached: a policy decides, n > 1 forks
        return self.emit()

    # ---- what the step is made of

    def enact(self, plan: StepPlan) -> None:
        """Frees the preempted, who wait again in arrival order; opens the admitted and attaches what `plan` counted."""
        for seq in plan.preempt:
            self._preempt(seq)
        for seq, matched in plan.admit:
            try:
                self._start(seq, matched)
            except Exception as error:
                self.blamed.append((seq, error))
                continue
            self.waiting.remove(seq)
            self._run(seq)
            if seq.request.admitted is None:
                seq.request.admitted = monotonic()
            if seq.request.cached_tokens is None:
                seq.request.cached_tokens = matched
                seq.request.miss = self.memory.paged.table.prefix.miss(seq.request.prompt, seq.request.salt)

    def taps(self, plan: StepPlan) -> Taps:
        pooled = any(seq.request.pool for seq in plan.seqs)
        hidden = frozenset({len(self.runner.spec.layers) - 1} if pooled else ())
        return self.sampler.needs(plan.work) | self.drafter.taps(plan.seqs) | Taps(hidden, attention=self.policies.watch(plan.seqs))

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
            w.seq.reason = found.reason
            try:
                self._record(w, s, tree, found, result)
            except Exception as error:
                self.blamed.append((w.seq, error))

    def _record(self, w: Work, s: int, tree: TokenTree, found: Accepted, result: StepResult) -> None:
        params = w.seq.params
        if params.prompt_logprobs is not None:
            self._record_prompt(w, s, result)
        if w.seq.request.pool:
            self._record_hidden(w, s, result)
        if not found.tokens:
            return
        output = self.outputs[w.seq.id]
        output.stats.fault, names = w.seq.fault, self.drafter.of(w.seq).names
        output.stats.count(tree, found.path, names)
        if params.provenance:
            output.provenance += _provenance(output.stats.steps, tree, found, names)
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

    def _record_hidden(self, w: Work, s: int, result: StepResult) -> None:
        """The prompt's hidden states behind the final norm: the last row, or the sum of all, added one by one in float64 so that
        chunks change nothing. Rows that run again after preemption count once."""
        request, first = w.seq.request, int(result.batch.starts[s])
        if not w.seq.pending:
            w.seq.reason = FinishReason.LENGTH
        if w.seq.index:
            return
        total, count = request.pooled or (None, 0)
        positions = result.batch.positions[first : int(result.batch.tree_starts[s])]
        new = np.flatnonzero((positions >= count) & (positions < w.seq.prompt_len))
        if not len(new) or (request.pool is Pooling.LAST and w.seq.pending):
            return
        hidden = result.out.hidden[len(self.runner.spec.layers) - 1]
        rows = self.runner.normed(hidden[first + int(new[0]) : first + int(new[-1]) + 1])
        before = [] if total is None or request.pool is Pooling.LAST else [total]
        found = rows[-1] if request.pool is Pooling.LAST else np.add.reduce([*before, *rows])
        if not np.isfinite(found).all():
            raise NotNumbers(w.seq)
        request.pooled = found, int(positions[new[-1]]) + 1

    def cross(self, seqs: Iterable[Sequence]) -> None:
        """Publishes pages that became full; policies decide. At the border behind all but the last prompt token, a request for
        n texts forks; without pages for a fork, the sibling waits and finds its prompt in the prefix cache."""
        for seq in seqs:
            try:
                self.memory.publish(seq)
                self.policies.cross(seq)
                if seq.request.reuse:
                    self.policies.take_over(seq, self._spare())
                if seq.stored == seq.prompt_len - 1 and len(seq.request.sequences) < seq.params.n:
                    self._branch(seq)
                seq.border = self._border(seq)
            except Exception as error:
                self.blamed.append((seq, error))

    def _branch(self, seq: Sequence) -> None:
        children = []
        for index in range(len(seq.request.sequences), seq.params.n):  # a fork that raises leaves the siblings waiting
            children.append(self._sequence(seq.request, index))
            self._wait(children[-1])
        for child in children:
            # a fork of shared lanes copies the last page and soon fills it; of others, at worst all that a new text would take
            wanted = 2 if child.lanes is Lanes.SHARED else self.memory.need(child, child.prompt_len + 1)
            if len(self.running) < self.scheduler.max_seqs and self._spare() >= wanted:
                self._fork(seq, child)
                self.waiting.remove(child)
                self._run(child)

    def emit(self) -> list[Event]:
        """News of every text since it was last told, but of those to blame; what finished is freed."""
        blamed = {seq.id for seq, _ in self.blamed}
        for seq in self.running:
            output = self.outputs[seq.id]
            if (output.told_tokens < seq.generated or seq.reason) and seq.id not in blamed:
                try:
                    self.news.append(self._event(seq, output))
                except Exception as error:
                    self.blamed.append((seq, error))
        if any(seq.reason for seq in self.running):
            blamed = {seq.id for seq, _ in self.blamed}
            for seq in [seq for seq in self.running if seq.reason and seq.id not in blamed]:
                self.running.remove(seq)
                del self.outputs[seq.id]
                try:
                    self._stop(seq)
                except Exception as error:
                    self.blamed.append((seq, error))
        self._raise()
        events, self.news = self.news, []
        return events

    def _raise(self) -> None:
        if self.blamed:
            raise self.blamed[0][1]

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
        told_of = output.drafted[new], output.logprobs[new], seq.reason, output.stats, output.provenance[new]
        return Event(seq.request, seq.index, tokens, text, *told_of)

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
        self.drafter.check(request.params)
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
        if (need := self.memory.need(seq, total)) > self.memory.slabs:
            del self.outputs[seq.id]
            request.sequences.clear()
            raise InvalidInput(
                f"{total} tokens need {need} pages in the form that this request chose, the pool has {self.memory.slabs}: ask for fewer"
                " max_tokens, or give the pool more memory"
            )
        self._wait(seq)

    def _wait(self, seq: Sequence) -> None:
        """Behind all that are as urgent."""
        self.waiting.insert(bisect_right(self.waiting, seq.request.priority, key=_priority), seq)

    def _run(self, seq: Sequence) -> None:
        """The last is the first to be preempted."""
        self.running.insert(bisect_right(self.running, seq.request.priority, key=_priority), seq)

    def settle(self, error: Exception) -> tuple[list[Event], list[tuple[Request, Exception]]]:
        """After a step that raised: the requests to blame are ended, nobody else. Where it is not known who they are, each text
        that runs takes a step alone, or else those that wait, until one runs. Returns news, and who was to blame for what. A step
        that would raise forever is the fault of the first that waits."""
        guilty = list(self.blamed)
        events, self.news = self.news, []
        for seq in () if guilty else [*self.running, *self.waiting]:
            if seq in self.waiting and self.running:
                break
            if seq not in self.waiting and seq not in self.running:
                continue  # ended meanwhile
            try:
                self._make_room(seq)
                events += self.step(seq)
            except Exception as own:
                guilty += self.blamed or [(seq, own)]
        if not guilty and not events and not self.running:
            guilty = [(seq, error) for seq in list(self.waiting)[:1]]
        ended: dict[str, tuple[Request, Exception]] = {}
        for seq, raised in guilty:
            ended.setdefault(seq.request.id, (seq.request, raised))
            self.abort(seq.request.id)
        events, self.news = events + self.news, []
        return events, list(ended.values())

    def _make_room(self, seq: Sequence) -> None:
        """So that a text that runs can take a step alone, the last others go where pages lack."""
        others = [other for other in self.running if other is not seq and other.reason is None] if seq in self.running else []
        while others and self.memory.need(seq, seq.pending) > self.memory.available():
            self._preempt(others.pop())

    def _preempt(self, seq: Sequence) -> None:
        """It waits again, before all that came later."""
        self.running.remove(seq)
        self.waiting.insert(bisect_left(self.waiting, seq.request.priority, key=_priority), seq)
        self.preemptions += 1
        try:
            self._stop(seq)
        except Exception as error:
            self.blamed.append((seq, error))

    def abort(self, request_id: str) -> bool:
        """Ends all texts of a request at once and frees what they hold; False when there is no such request. Nobody is left to
        hear what their parts raise."""
        found = False
        for seq in [s for s in (*self.waiting, *self.running) if s.request.id == request_id]:
            found = True
            del self.outputs[seq.id]
            if seq in self.running:
                self.running.remove(seq)
                with suppress(Exception):
                    self._stop(seq)
            else:
                self.waiting.remove(seq)
            seq.reason = FinishReason.ABORT
        return found

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def _sequence(self, request: Request, index: int) -> Sequence:
        assert request.params.seed is not None
        self._ids += 1
        seq = Sequence(self._ids, request, index, list(request.prompt), len(request.prompt), sample_seed(request.params.seed, index), 0)
        self.policies.fit(seq)
        self.drafter.fit(seq)
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
        return self.memory.available() - sum(self.memory.need(seq, seq.pending) for seq in self.running)

    def _limit(self, request: Request) -> int:
        """Tokens of prompt and output. A policy for which the context has no end is taken at its word where max_tokens is given."""
        endless = request.params.max_tokens is not None and self.policies.endless(request.params)
        return NEVER if endless else self.max_model_len

    def _start(self, seq: Sequence, matched: int) -> None:
        self.memory.open(seq)
        try:
            if matched:
                self.memory.attach(seq, matched)
            seq.state[self.sampler] = self.sampler.begin(seq)
            self.policies.begin(seq)
            self.drafter.begin(seq)
        except BaseException:
            self._stop(seq)
            raise

    def _fork(self, seq: Sequence, child: Sequence) -> None:
        self.memory.fork(seq, child)
        try:
            child.state[self.sampler] = self.sampler.fork(seq.state[self.sampler], child)
            self.policies.fork(seq, child)
            self.drafter.fork(seq, child)
        except BaseException:
            self._stop(child)  # it waits and starts from its tokens, as after preemption
            raise

    def _stop(self, seq: Sequence) -> None:
        """Plugin states end and pages go; the tokens stay, so a preempted sequence can start again."""
        self.memory.free(seq)
        seq.stored = 0
        with ExitStack() as ends:  # from the last to the first, whichever raises
            ends.callback(seq.state.clear)
            if self.sampler in seq.state:
                ends.callback(self.sampler.end, seq.state[self.sampler])
            ends.callback(self.drafter.end, seq)
            ends.callback(self.policies.end, seq)
        with suppress(Exception):  # a policy that cannot say raises again where the text runs, and is blamed there
            seq.border = self._border(seq)

    def _decoder(self, seq: Sequence) -> Decode:
        decode = self.decode if seq.params.skip_special_tokens else self.decode_all
        assert decode is not None
        return decode


def _priority(seq: Sequence) -> int:
    return seq.request.priority


def _provenance(step: int, tree: TokenTree, found: Accepted, names: Seq[str]) -> list[Provenance]:
    """Of the tokens of one step: the path's and the bonus."""
    origins = [0] * len(tree) if tree.origins is None else tree.origins.tolist()
    drafters = [*(names[origins[node]] for node in found.path), ""]
    told = [Provenance(step, drafter) for drafter in drafters[: len(found.tokens)]]
    shown = tree if tree.laws is None else replace(tree, laws=None)  # which may hold rows of the vocabulary's size
    return [replace(told[0], tree=shown, names=names, path=found.path), *told[1:]]
