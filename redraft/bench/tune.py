"""Which drafter and how many draft rows are fastest for some prompts and a batch size on this machine, and why.

1. The time of a step is measured for several numbers of rows.
2. Each drafter makes one pass over the prompts with the most rows. Of every decoding step its nodes and the accepted path are recorded.
   Drafters put likelier nodes first, so a smaller draft is taken to be the first nodes of the larger one.
3. That gives tokens a step for each number of rows, and with the time of such a step the expected speed.
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
from redraft.core.tree import TokenTree
from redraft.engine.idle import forward_seconds
from redraft.errors import InvalidInput, PromptTooLong
from redraft.llm import LLM

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
class Profile:
    """The decoding steps of one pass over the prompts. Also the verifier that records them.

    inner: the engine's verifier; nodes, paths: of each text in each step; steps: of the engine; seconds: of these steps; forward, drafting,
    observing: the part of it for the model, for proposing and for learning; total: of the whole pass, the reading of prompts too.
    """

    inner: Any = None
    nodes: list[int] = field(default_factory=list)
    paths: list[tuple[int, ...]] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0
    forward: float = 0.0
    drafting: float = 0.0
    observing: float = 0.0
    total: float = 0.0
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
            self.nodes += map(len, trees)
            self.paths += (one.path for one in accepted)
        self._last, self._spent = now, {}
        return accepted

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
    def width(self) -> float:
        """Texts of a step."""
        return len(self.nodes) / max(1, self.steps)

    def kept(self, rows: int) -> float:
        """Drafted tokens that a text keeps in a step with so many rows."""
        return mean(sum(node < rows for node in path) for path in self.paths)

    def drafted(self, rows: int) -> float:
        return mean(min(count, rows) for count in self.nodes)

    @property
    def by_depth(self) -> list[float]:
        """The share of passes that kept i + 1 nodes or more."""
        depths = range(1, max(map(len, self.paths), default=0) + 1)
        return [mean(len(path) >= depth for path in self.paths) for depth in depths]


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

    vars(guard).update(begin=begin, propose=found.timed("propose", guard.propose), observe=found.timed("observe", guard.observe))
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
    for proposing is in proportion to the nodes."""
    most = rows or ROWS[-1]
    sizes, times = [point.x for point in curve], list(accumulate((point.y for point in curve), max))  # more rows never take less time
    width, step, forward = plain.width, plain.seconds / plain.steps, plain.forward / plain.steps
    made = np.interp([width * (1 + min(count, most)) for count in profile.nodes], sizes, times)
    slower = float(np.mean(made) / np.interp(width, sizes, times))
    share = profile.drafted(most) / max(profile.drafted(ROWS[-1]), 1e-9)
    own = (profile.drafting * share + profile.observing) / profile.steps
    seconds = step + forward * (slower - 1) + own
    tokens = 1 + profile.kept(most)
    total = plain.total - plain.seconds + plain.steps / tokens * seconds
    return Candidate(draft, rows, tokens, profile.drafted(most), seconds / step, own / step, plain.total / total)


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
    """curve: ms of a step by rows; plain: the plain loop's pass; profiles: of each drafter; expectations: of all candidates;
    comparison: the plain loop and `candidates`, in this order."""

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
    most = min(ROWS[-1], llm.engine.scheduler.draft_total // options.batch)
    if most < 1:
        raise InvalidInput(
            f"batch = {options.batch}: more than draft_total = {llm.engine.scheduler.draft_total}, which leaves no draft row for each text"
        )
    groups = bench.split(fits, options.batch, params)
    bench.generate(llm, bench.shortened(groups[0], WARM_UP))
    plain_entry = Entry(BASELINE, Mode.BASELINE, llm, (None, None))
    plain = profiled(plain_entry, groups, tick)
    if not plain.steps:
        raise InvalidInput(f"max_tokens = {params.max_tokens}: every text ends after its first token, so there is nothing to draft")
    siblings, refused = bench.opened(llm, options)
    announce(plain.total * (2 * len(siblings) + options.rounds * (2 + options.best)))
    curve = step_times(llm, llm.engine.scheduler.draft_total + options.batch)
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


def step_times(llm: LLM, rows: int) -> list[Point]:
    """ms of a forward pass without cache, of 1 to at least `rows` rows where the context and the memory hold them; the median of several
    turns, their minimum and maximum."""
    last = next((knot for knot in KNOTS if knot >= max(rows, STEPS)), KNOTS[-1])
    sizes = [knot for knot in KNOTS if knot <= min(last, llm.max_model_len)]
    times: dict[int, list[float]] = {size: [] for size in sizes}
    for turn in range(TIMES + 1):
        for size in sizes:
            seconds = forward_seconds(llm.engine, size)
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
