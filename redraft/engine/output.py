"""The new tokens of each text: cut where the text ends, recorded, and reported as events."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from itertools import repeat
from typing import NamedTuple

import numpy as np

from redraft.core.distribution import TopLogprobs
from redraft.core.plan import Accepted, StepResult, Work
from redraft.core.sequence import FinishReason, Pooling, Request, Sequence
from redraft.core.taps import NO_TAPS, Taps
from redraft.core.tree import TokenTree
from redraft.engine.faults import SafeCalls
from redraft.engine.text import Reader, Stop
from redraft.models.runner import Runner
from redraft.models.tokenizer import Decoder
from redraft.sample.sampler import NotNumbers


@dataclass(slots=True)
class Stats:
    """Drafting statistics of one text. steps: passes that drew a token; drafted: nodes checked; accepted: nodes kept; fault: the
    drafter that failed and its error, if the text continued without drafts; drafts: passes that checked at least one node;
    by_depth[i]: passes that kept i + 1 nodes or more; by_drafter: (nodes checked, nodes kept) of each drafter; stopped: for each drafter
    that did not pay, the passes that it did not draft for; surprise: see Sequence, so that another engine can go on with a text."""

    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    fault: str = ""
    drafts: int = 0
    by_depth: list[int] = field(default_factory=list)
    by_drafter: dict[str, tuple[int, int]] = field(default_factory=dict)
    stopped: dict[str, int] = field(default_factory=dict)
    surprise: float = 0.0

    def count(self, tree: TokenTree, path: Seq[int], names: Seq[str], stopped: Seq[str] = ()) -> None:
        """Adds one pass that drew a token."""
        self.steps += 1
        for name in stopped:
            self.stopped[name] = self.stopped.get(name, 0) + 1
        tree = tree.without_vectors()
        if not len(tree):
            return
        self.drafts += 1
        self.drafted += len(tree)
        self.accepted += len(path)
        self.by_depth += [0] * (len(path) - len(self.by_depth))
        for depth in range(len(path)):
            self.by_depth[depth] += 1
        if tree.origins is None:
            checked, kept = Counter({0: len(tree)}), Counter({0: len(path)})
        else:
            origins = tree.origins.tolist()
            checked, kept = Counter(origins), Counter(origins[node] for node in path)
        for origin, count in checked.items():
            before = self.by_drafter.get(names[origin], (0, 0))
            self.by_drafter[names[origin]] = before[0] + count, before[1] + kept[origin]

    def copy(self) -> Stats:
        return replace(self, by_depth=list(self.by_depth), by_drafter=dict(self.by_drafter), stopped=dict(self.stopped))

    @property
    def mean_acceptance_length(self) -> float:
        return 1 + self.accepted / self.steps if self.steps else 0.0


@dataclass(frozen=True, slots=True)
class Provenance:
    """The origin of a token. step: the pass that drew it, from 1; drafter: which one proposed it, empty if the model drew it without a
    draft. The first token of a step also has tree: the draft; names: its drafters; path: the nodes that were kept."""

    step: int
    drafter: str
    tree: TokenTree | None = None
    names: Seq[str] = ()
    path: tuple[int, ...] = ()


class Progress(NamedTuple):
    """What a text has that began in another engine: the new tokens and the statistics of the last event that was received of it. ended:
    whether that event was its last."""

    tokens: list[int]
    stats: Stats
    ended: bool = False


@dataclass(frozen=True, slots=True)
class Event:
    """New tokens of one text. drafted[i]: whether tokens[i] was an accepted draft; reason: in the last event of the text; provenance:
    one entry a token, if requested; error: what ended the whole request early, no event of the request follows it; stop: the stop
    string that ended the text, None without one."""

    request: Request
    index: int
    tokens: list[int]
    text: str
    drafted: list[bool]
    logprobs: list[TopLogprobs]
    reason: FinishReason | None
    stats: Stats
    provenance: list[Provenance] = field(default_factory=list)
    error: Exception | None = None
    stop: str | None = None

    @classmethod
    def failed(cls, request: Request, error: Exception) -> Event:
        return cls(request, 0, [], "", [], [], None, Stats(), error=error)


def checked(events: list[Event]) -> list[Event]:
    """Returns the events. Raises the first error in them instead, if there is one."""
    for event in events:
        if event.error is not None:
            raise event.error
    return events


@dataclass(slots=True)
class Output:
    """The output of a sequence and how much of it was reported. Internal to the engine; plugins do not see it."""

    reader: Reader | None  # None without a tokenizer
    stats: Stats = field(default_factory=Stats)
    reported_tokens: int = 0
    drafted: list[bool] = field(default_factory=list)
    logprobs: list[TopLogprobs] = field(default_factory=list)
    provenance: list[Provenance] = field(default_factory=list)
    stop: Stop | None = None  # the stop string that ended the text


class Outputs:
    """The outputs of all live texts. limit: tokens of prompt and output that a sequence may have; finished: whether a processor ends a
    text after these new tokens; names: the names of a sequence's drafters; stopped: those that do not
    draft at the moment; decode, decode_all, eos: see Engine."""

    def __init__(
        self,
        runner: Runner,
        safe: SafeCalls,
        *,
        eos: frozenset[int],
        decode: Decoder | None,
        decode_all: Decoder | None,
        limit: Callable[[Sequence], int],
        finished: Callable[[Sequence, Seq[int]], bool],
        names: Callable[[Sequence], Seq[str]],
        stopped: Callable[[Sequence], Seq[str]],
    ) -> None:
        self.runner, self.safe, self.eos = runner, safe, eos
        self.decode, self.decode_all = decode, decode_all
        self.limit, self.finished, self.names, self.stopped = limit, finished, names, stopped
        self._of: dict[int, Output] = {}

    def __len__(self) -> int:
        return len(self._of)

    def __iter__(self) -> Iterator[Output]:
        return iter(self._of.values())

    def open(self, seq: Sequence) -> None:
        self._of[seq.id] = Output(None if self.decode is None else Reader(seq.request.prompt, seq.params, self.decode, self.decode_all))

    def resume(self, seq: Sequence, stats: Stats) -> None:
        """The tokens that `seq` has were reported by another engine. What is kept of a token until it is reported is left empty."""
        output, count, seq.surprise = self._of[seq.id], seq.generated, stats.surprise
        output.stats, output.reported_tokens, output.drafted = stats.copy(), count, [False] * count
        if seq.params.logprobs is not None:
            output.logprobs = [TopLogprobs(0, 0.0, 0, ())] * count
        if seq.params.provenance:
            output.provenance = [Provenance(0, "")] * count
        if output.reader is not None:
            output.reader.take(seq.tokens, ended=False)

    def progress(self, seq: Sequence) -> Progress:
        """What another engine needs to go on with it."""
        return Progress(seq.tokens[seq.prompt_len :], self._of[seq.id].stats.copy())

    def close(self, seq: Sequence) -> None:
        del self._of[seq.id]

    # ---- where texts end

    def cut(self, work: Seq[Work], accepted: Seq[Accepted]) -> list[Accepted]:
        """Cuts each path where its text ends. This comes before anything is committed, observed or counted."""
        return [self._cut(w.seq, found) if found.tokens else found for w, found in zip(work, accepted, strict=True)]

    def _cut(self, seq: Sequence, found: Accepted) -> Accepted:
        params, output, before = seq.params, self._of[seq.id], seq.generated
        last = self.limit(seq) - seq.prompt_len if params.max_tokens is None else min(self.limit(seq) - seq.prompt_len, params.max_tokens)
        stops = output.reader.search(seq.tokens, found.tokens) if params.stop and output.reader else repeat(None)
        output.stop = None
        for i, (_, stop) in enumerate(zip(found.tokens, stops, strict=False)):
            new = before + i + 1
            reason = FinishReason.LENGTH if new == last else None
            if new >= params.min_tokens:
                if stop is not None:
                    output.stop, reason = stop, FinishReason.STOP
                elif self._stops(seq, found.tokens[: i + 1]):
                    reason = FinishReason.STOP
            if reason is not None:
                return Accepted(found.path[:i], found.tokens[: i + 1], reason)
        return found

    def _stops(self, seq: Sequence, new: tuple[int, ...]) -> bool:
        """Whether the last of these new tokens ends the text."""
        params, token = seq.params, new[-1]
        return token in params.stop_token_ids or (token in self.eos and not params.ignore_eos) or self.finished(seq, new)

    # ---- what was just committed

    def taps(self, seqs: Seq[Sequence]) -> Taps:
        """What `record` needs from a forward pass."""
        return Taps(frozenset({self._last_layer})) if any(seq.request.wants.pooling for seq in seqs) else NO_TAPS

    @property
    def _last_layer(self) -> int:
        return len(self.runner.spec.layers) - 1

    def record(self, result: StepResult) -> None:
        """Records statistics, reasons and log-probabilities of a committed step."""
        for s, (w, tree, found) in enumerate(zip(result.work, result.trees, result.accepted, strict=True)):
            w.seq.reason = found.reason
            self.safe.call(w.seq, self._record, w, s, tree, found, result)

    def _record(self, w: Work, s: int, tree: TokenTree, found: Accepted, result: StepResult) -> None:
        params, wants = w.seq.params, w.seq.request.wants
        if wants.prompt_logprobs is not None:
            self._record_prompt(w, s, result, wants.prompt_logprobs)
        if wants.pooling:
            self._record_hidden(w, s, result, wants.pooling)
        if not found.tokens:
            return
        output = self._of[w.seq.id]
        output.stats.fault, output.stats.surprise, names = w.seq.fault, w.seq.surprise, self.names(w.seq)
        output.stats.count(tree, found.path, names, self.stopped(w.seq))
        if params.provenance:
            output.provenance += _provenance(output.stats.steps, tree, found, names)
        output.drafted += [True] * len(found.path) + [False]
        if params.logprobs is not None:
            root = int(result.batch.roots[s])
            rows = [root, *(root + 1 + node for node in found.path)]
            output.logprobs += result.distribution.logprobs(rows, found.tokens, params.logprobs)

    def _record_prompt(self, w: Work, s: int, result: StepResult, k: int) -> None:
        """Each prompt row gives the entry of the next token. Rows that run again after preemption add nothing."""
        seq, entries, batch = w.seq, w.seq.request.prompt_logprobs, result.batch
        if not entries:
            entries += [None] * seq.prompt_len
        first, last = int(batch.starts[s]), int(batch.tree_starts[s])
        begin, end = np.searchsorted(batch.logit_rows, [first, last]).tolist()
        tokens = {place: int(batch.positions[batch.logit_rows[place]]) + 1 for place in range(begin, end)}
        new = {place: at for place, at in tokens.items() if at < seq.prompt_len and entries[at] is None}
        for at, found in zip(new.values(), result.distribution.logprobs([*new], [seq.tokens[at] for at in new.values()], k), strict=True):
            entries[at] = found

    def _record_hidden(self, w: Work, s: int, result: StepResult, pooling: Pooling) -> None:
        """Pools the prompt's hidden states after the final norm: the last row, or the sum of all rows. The sum is added row by row in
        float64, so that chunks do not change it. Rows that run again after preemption count once."""
        request, first = w.seq.request, int(result.batch.starts[s])
        if not w.seq.pending:
            w.seq.reason = FinishReason.LENGTH
        if w.seq.index:
            return
        total, count = request.pooled or (None, 0)
        positions = result.batch.positions[first : int(result.batch.tree_starts[s])]
        new = np.flatnonzero((positions >= count) & (positions < w.seq.prompt_len))
        if not len(new) or (pooling is Pooling.LAST and w.seq.pending):
            return
        hidden = result.out.hidden[self._last_layer]
        rows = self.runner.normed(hidden[first + int(new[0]) : first + int(new[-1]) + 1])
        before = [] if total is None or pooling is Pooling.LAST else [total]
        found = rows[-1] if pooling is Pooling.LAST else np.add.reduce([*before, *rows])
        if not np.isfinite(found).all():
            raise NotNumbers(w.seq)
        request.pooled = found, int(positions[new[-1]]) + 1

    # ---- events

    def event(self, seq: Sequence) -> Event | None:
        """The new tokens and text since the last event; None without any."""
        output = self._of[seq.id]
        return self._event(seq, output) if output.reported_tokens < seq.generated or seq.reason else None

    def _event(self, seq: Sequence, output: Output) -> Event:
        reported, ended = output.reported_tokens, seq.reason is not None
        text, stop = "", output.stop if seq.reason is FinishReason.STOP else None
        if output.reader is not None:
            text = output.reader.take(seq.tokens, ended=ended, stop=stop, include=seq.params.include_stop_str_in_output)
        output.reported_tokens = seq.generated
        new = slice(reported, seq.generated)
        tokens = seq.tokens[seq.prompt_len + reported :]
        rest = output.drafted[new], output.logprobs[new], seq.reason, output.stats, output.provenance[new]
        return Event(seq.request, seq.index, tokens, text, *rest, stop=stop and stop.string)


def _provenance(step: int, tree: TokenTree, found: Accepted, names: Seq[str]) -> list[Provenance]:
    """The provenance of one step's tokens: the path and the bonus token."""
    origins = [0] * len(tree) if tree.origins is None else tree.origins.tolist()
    drafters = [*(names[origins[node]] for node in found.path), ""]
    made = [Provenance(step, drafter) for drafter in drafters[: len(found.tokens)]]
    tree = tree.without_vectors()
    shown = tree if tree.distributions is None else replace(tree, distributions=None)  # they may be as large as the vocabulary
    return [replace(made[0], tree=shown, names=names, path=found.path), *made[1:]]
