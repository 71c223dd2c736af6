"""Which drafter and how many draft rows are fastest for some prompts and a batch size on this machine, and why.

1. The time of a step is measured for several numbers of rows, with as many texts as the batch has and as many cached tokens as these
   prompts and their replies have on average.
2. Each drafter makes one pass over the prompts with the most rows. Of every decoding step its nodes and the accepted path are recorded.
   Drafters put likelier nodes first, so a smaller draft is taken to be the first nodes of the larger one.
3. That gives tokens a step for each text and number of rows, and with the time of such a step the expected speed. Texts of a batch that
   keep more drafts end earlier, and the last ones run alone.
4. The best few and auto are measured beside the plain loop, interleaved, as in compare.py.

Drafters that learn start with what they learned on the other half of the prompts, as a server does after similar requests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from statistics import mean, median
from time import perf_counter
from typing import Any

import numpy as np

from redraft.bench import compare as bench
from redraft.bench.compare import BASELINE, WARM_UP, CompareOptions, Comparison, Dialogue, Entry, Mode, PromptGroup, Tick
from redraft.bench.prompts import Prompt
from redraft.bench.results import Row
from redraft.bench.svg import Point
from redraft.core.cost import KNOTS
from redraft.core.distribution import Distribution
from redraft.core.plan import Accepted
from redraft.core.sequence import Sequence
from redraft.core.tree import F64, TokenTree
from redraft.engine.idle import forward_seconds
from redraft.errors import InvalidInput, PromptTooLong
from redraft.llm import LLM
from redraft.models.adapter import Adapter

AUTO = "auto"
ROWS = (1, 2, 3, 4, 6, 8, 12, 16)  # draft rows that are considered
STEPS = 32  # rows of a step that are timed at least
TIMES = 7  # how often each is timed
EACH = 2  # numbers of rows of one drafter that are measured at most
ALIKE = 1.1  # times as many nodes are drafted with two numbers of rows that are not measured both


@dataclass(frozen=True)
class TuneOptions(CompareOptions):
    """drafts: the candidates; best: how many pairs of drafter and rows are measured, auto beside them."""

    best: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.best < 1:
            raise InvalidInput(f"best = {self.best}: must be 1 or more")
        if self.rounds < 2:
            raise InvalidInput(f"rounds = {self.rounds}: must be 2 or more, because a winner must beat the spread")


@dataclass
class Record:
    """The decoding steps of one text. nodes, paths: of each step."""

    nodes: list[int] = field(default_factory=list)
    paths: list[tuple[int, ...]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(1 + len(path) for path in self.paths)

    def each(self, rows: int) -> float:
        """Tokens of a step with at most so many drafted rows."""
        return 1 + mean(sum(node < rows for node in path) for path in self.paths)


@dataclass
class Profile:
    """The decoding steps of one pass over the prompts. Also the verifier that records them.

    inner: the engine's verifier; batches: the texts that ran together; steps: of the engine; seconds: of these steps; forward, drafting,
    observing: the part of it for the model, for proposing and for learning; cached: tokens of all texts in all steps; total: of the whole
    pass, the reading of prompts too.
    """

    inner: Any = None
    batches: list[dict[int, Record]] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0
    forward: float = 0.0
    drafting: float = 0.0
    observing: float = 0.0
    cached: int = 0
    total: float = 0.0
    _texts: list[tuple[int, int]] = field(default_factory=list)  # of this step: number and cached tokens
    _last: float | None = None
    _spent: dict[str, float] = field(default_factory=dict)

    def accept(self, trees: Seq[TokenTree], distribution: Distribution) -> list[Accepted]:
        accepted: list[Accepted] = self.inner.accept(trees, distribution)
        now = perf_counter()
        if self._last is not None and all(root >= 0 for root in distribution.roots.tolist()):  # no prompt is read in this step
            self.steps += 1
            self.seconds += now - self._last
            self.forward += self._spent.get("forward", 0.0)
            self.drafting += self._spent.get("propose", 0.0)
            self.observing += self._spent.get("observe", 0.0)
            self.cached += sum(cached for _, cached in self._texts)
            if not (self.batches and any(text in self.batches[-1] for text, _ in self._texts)):
                self.batches.append({})
            for (text, _), tree, one in zip(self._texts, trees, accepted, strict=True):
                record = self.batches[-1].setdefault(text, Record())
                record.nodes.append(len(tree))
                record.paths.append(one.path)
        self._last, self._spent = now, {}
        return accepted

    def propose(self, propose: Callable[..., Any]) -> Callable[..., Any]:
        def run(seqs: Seq[Sequence], budgets: Any) -> Any:
            self._texts = [(seq.id, seq.stored) for seq in seqs]
            return propose(seqs, budgets)

        return self.timed("propose", run)

    def begin(self) -> None:
        """A text starts: the step is not counted."""
        self._last = None

    def timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            began = perf_counter()
            try:
                return call(*given)
            finally:
                self._spent[part] = self._spent.get(part, 0.0) + perf_counter() - began

        return run

    @property
    def records(self) -> list[Record]:
        return [record for batch in self.batches for record in batch.values()]

    @property
    def nodes(self) -> list[int]:
        return [count for record in self.records for count in record.nodes]

    @property
    def paths(self) -> list[tuple[int, ...]]:
        return [path for record in self.records for path in record.paths]

    @property
    def context(self) -> int:
        """Cached tokens of a text, on average."""
        return round(self.cached / max(1, len(self.nodes)))

    def kept(self, rows: int) -> float:
        """Drafted tokens that a text keeps in a step with so many rows."""
        return mean(sum(node < rows for node in path) for path in self.paths)

    def drafted(self, rows: int) -> float:
        return mean(min(count, rows) for count in self.nodes)

    @property
    def by_depth(self) -> list[float]:
        """The share of passes that kept i + 1 nodes or more."""
        paths = self.paths
        depths = range(1, max(map(len, paths), default=0) + 1)
        return [mean(len(path) >= depth for path in paths) for depth in depths]

    def course(self, rows: int, seconds: Callable[[F64, int], float]) -> tuple[float, float]:
        """The steps and the seconds of all batches if texts draft at most `rows` rows. seconds: the mean time of steps with these numbers
        of rows and so many texts."""
        steps = total = 0.0
        for batch in self.batches:
            ends = sorted(((record.tokens / record.each(rows), record) for record in batch.values()), key=lambda one: one[0])
            done = 0.0
            for i, (end, _) in enumerate(ends):
                alive = [record for _, record in ends[i:]]
                if end > done:
                    length = max(len(record.nodes) for record in alive)
                    made = sum(1 + np.minimum(np.resize(record.nodes, length), rows) for record in alive)
                    steps += end - done
                    total += (end - done) * seconds(np.asarray(made, np.float64), len(alive))
                done = end
        return steps, total


@contextmanager
def recorded(llm: LLM) -> Iterator[Profile]:
    """Records what `llm` generates inside."""
    verifiers: Any = llm.engine.verifier
    guard, runner = llm.engine.drafter.own, llm.runner
    found = Profile(verifiers.own)
    start = guard.begin

    def begin(*given: Any) -> None:
        found.begin()
        start(*given)

    vars(guard).update(begin=begin, propose=found.propose(guard.propose), observe=found.timed("observe", guard.observe))
    vars(runner).update(forward=found.timed("forward", runner.forward))
    verifiers.own = found
    try:
        yield found
    finally:
        verifiers.own = found.inner
        del vars(guard)["begin"], vars(guard)["propose"], vars(guard)["observe"], vars(runner)["forward"]


@dataclass(frozen=True)
class Candidate:
    """A drafter and its rows, with the expected figures. rows: None for a drafter that chooses them; tokens: of a text in a step; drafted:
    nodes of a text in a step; cost: of a step, drafting: part of it that the drafter needs, both in plain steps; speedup: over the plain
    loop, the reading of prompts too."""

    draft: str
    rows: int | None
    tokens: float
    drafted: float
    cost: float
    drafting: float
    speedup: float

    @property
    def name(self) -> str:
        return self.draft if self.rows is None else f"{self.draft}, {self.rows} row{'s' * (self.rows > 1)}"


def expected(draft: str, rows: int | None, profile: Profile, plain: Profile, curve: Seq[Point]) -> Candidate:
    """The speed from acceptance and cost. The forward pass takes longer by as much as `curve` says; the drafter's own time is added, which
    for proposing is in proportion to the nodes. What a plain step does beside the forward pass is in proportion to its texts."""
    most = rows or ROWS[-1]
    sizes, times = [point.x for point in curve], list(accumulate((point.y for point in curve), max))  # more rows never take less time

    def forward(made: F64, texts: int) -> float:
        return float(np.mean(np.interp(made, sizes, times)))

    unit = plain.forward / plain.course(0, forward)[1]  # the time of the curve in that of these steps
    outside = (plain.seconds - plain.forward) / len(plain.nodes)
    share = profile.drafted(most) / max(profile.drafted(ROWS[-1]), 1e-9)
    own = (profile.drafting * share + profile.observing) / len(profile.nodes)
    steps, seconds = profile.course(most, lambda made, texts: unit * forward(made, texts) + texts * (outside + own))
    step, drafting = plain.seconds / plain.steps, own * len(profile.nodes) / profile.steps
    total = plain.total - plain.seconds + seconds
    return Candidate(
        draft, rows, 1 + profile.kept(most), profile.drafted(most), seconds / steps / step, drafting / step, plain.total / total
    )


def chosen(found: Seq[Candidate], best: int) -> list[Candidate]:
    """The fastest by expectation, at most EACH of a drafter, and those that choose their rows themselves."""
    taken: list[Candidate] = []
    for one in sorted((one for one in found if one.rows is not None), key=lambda one: -one.speedup):
        same = [other for other in taken if other.draft == one.draft]
        alike = any(max(one.drafted, other.drafted) < ALIKE * min(one.drafted, other.drafted) for other in same)
        if len(taken) < best and len(same) < EACH and not alike:
            taken.append(one)
    return [*(one for one in found if one.rows is None), *taken]


@dataclass(frozen=True)
class Tuned:
    """curve: ms of a step by rows, with the batch's texts and plain.context cached tokens each; plain: the plain loop's pass; profiles: of
    each drafter; expectations: of all candidates; comparison: the plain loop and `candidates`, in this order."""

    curve: list[Point]
    plain: Profile
    profiles: dict[str, Profile]
    expectations: list[Candidate]
    candidates: list[Candidate]
    comparison: Comparison


def tune(llm: LLM, options: TuneOptions, prompts: Seq[Prompt], tick: Tick, announce: Callable[[float], None]) -> Tuned:
    """Measures everything. `llm` is the plain loop, loaded with prefix_sharing=False. announce: see `compare`."""
    fits = [prompt for prompt in prompts if len(Dialogue(prompt, llm.tokenizer).ids()) < llm.max_model_len]
    if not fits:
        raise PromptTooLong(f"none of the {len(prompts)} prompts fits the context: max_model_len = {llm.max_model_len}")
    params = llm.params(options.params)
    llm.engine.policies.check(params)
    most = max(1, min(ROWS[-1], llm.engine.scheduler.draft_total // options.batch))  # with less than one each, some texts have none
    groups = bench.split(fits, options.batch, params)
    bench.generate(llm, bench.shortened(groups[0], WARM_UP))
    plain_entry = Entry(BASELINE, Mode.BASELINE, llm, (None, None))
    plain = profiled(plain_entry, groups, tick)
    if not plain.steps:
        raise InvalidInput(f"max_tokens = {params.max_tokens}: every text ends after its first token, so there is nothing to draft")
    siblings, refused = bench.opened(llm, options)
    announce(plain.total * (2 * len(siblings) + options.rounds * (2 + options.best)))
    rows, texts = llm.engine.scheduler.draft_total + options.batch, max(map(len, plain.batches))
    curve = step_times(llm, rows, texts, plain.context, None if params.lora is None else llm.runner.adapters[params.lora])
    entries, profiles = {}, {}
    for draft, sibling in siblings.items():
        entries[draft] = opened(draft, sibling, groups, tick)
        profiles[draft] = profiled(entries[draft], groups, tick)
    found = [
        expected(draft, rows, profile, plain, curve)
        for draft, profile in profiles.items()
        for rows in ([None] if draft == AUTO else [rows for rows in ROWS if rows <= most])
        if profile.steps
    ]
    candidates = chosen(found, options.best)
    measured = [plain_entry]
    for one in candidates:
        entry = entries[one.draft]
        own = entry.llm if one.rows is None else llm.sibling(draft=one.draft, draft_rows=one.rows)
        measured.append(Entry(one.name, entry.mode, own, entry.states))
    runs, stopped = bench.measure_all(measured, groups, options.rounds, tick)
    groups = groups[: len(runs[0][0])]
    left_out = [prompt.id for prompt in prompts if prompt not in fits]
    comparison = Comparison(measured, groups, runs, left_out, bench.cut_short(groups, runs[0][0]), refused, stopped=stopped)
    return Tuned(curve, plain, profiles, found, candidates, comparison)


def opened(draft: str, llm: LLM, groups: Seq[PromptGroup], tick: Tick) -> Entry:
    """The drafter with what it learned on the other half of the prompts, after its own measurements of the machine."""
    empty = llm.engine.drafter.snapshot()
    bench.generate(llm, bench.shortened(groups[0], WARM_UP, 1))
    llm.calibrate()
    bench.restore(llm, empty)
    return bench.enter(draft, llm, groups, tick)[-1]


def profiled(entry: Entry, groups: Seq[PromptGroup], tick: Tick) -> Profile:
    with recorded(entry.llm) as profile:
        for group in groups:
            profile.total += bench.measure(entry.llm, group, entry.states[group.half]).seconds
            tick(f"{entry.method}: acceptance")
    return profile


def step_times(llm: LLM, rows: int, texts: int, cached: int, adapter: Adapter | None = None) -> list[Point]:
    """ms of a forward pass over `texts` texts with `cached` tokens each, or as many texts as rows, and with this adapter; of 1 to at least
    `rows` rows where the context and the memory hold them; the median of several turns, their minimum and maximum."""
    last = next((knot for knot in KNOTS if knot >= max(rows, STEPS)), KNOTS[-1])
    sizes = [knot for knot in KNOTS if knot <= last]
    times: dict[int, list[float]] = {size: [] for size in sizes}
    for turn in range(TIMES + 1):
        for size in sizes:
            seconds = forward_seconds(llm.engine, size, cached, min(size, texts), adapter)
            if turn and seconds is not None:  # the first one is not counted, nor what does not fit
                times[size].append(1000 * seconds)
    return [Point(size, median(found), min(found), max(found)) for size, found in times.items() if found]


def winner(rows: Seq[Row], rounds: int) -> Row | None:
    """The fastest that beats the plain loop in every round; None if none does, or if there is no spread. rows: over all prompts."""
    better = [row for row in rows if row.speedup is not None and row.speedup_low is not None and row.speedup_low > 1]
    return max(better, key=lambda row: row.speedup or 0.0, default=None) if rounds > 1 else None


def ticks(prompts: int, options: TuneOptions) -> int:
    """About how often `tick` is called, for a progress bar."""
    groups = -(-prompts // options.batch)
    return groups * (1 + 2 * len(options.drafts) + options.rounds * (2 + options.best))
