"""From measurements to rows: speeds, ratios, equality of texts, repetition. One row for each entry and category, and one over all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from itertools import groupby, zip_longest
from statistics import median

import numpy as np

from redraft import registry
from redraft.bench.compare import Comparison, Entry, Mode, Run
from redraft.bench.divergence import Divergence, examine
from redraft.bench.gauge import Share
from redraft.card import Guarantee

GRAM = 8
LOW_REPEAT = 0.3
ENOUGH = 5  # outputs with little repetition that are needed to claim a speed-up for them
DRAWS = 2000
CHOOSER = "auto"  # the method that is meant to be as fast as the best of the others

Measure = Callable[[Run], tuple[int, float]]  # tokens of a run and their seconds


def whole(run: Run) -> tuple[int, float]:
    return run.tokens, run.seconds


def generation(run: Run) -> tuple[int, float]:
    return run.generated, run.generating


@dataclass(frozen=True)
class Beside:
    """The ratio to the fastest other method of the same category and state: median, minimum and maximum of the rounds; bound: as in
    Speed."""

    method: str
    mode: str
    ratio: float
    low: float
    high: float
    bound: float | None


@dataclass(frozen=True)
class Speed:
    """tokens_per_second and speedup are medians over the rounds, those that end in _low and _high the minimum and maximum. speedup_bound:
    the 95 % lower bound (one-sided) of the ratio over all texts and rounds, by bootstrap over the texts, in a batch over its groups; None
    for fewer than two. beside: for the method that chooses."""

    tokens_per_second: float
    tokens_per_second_low: float
    tokens_per_second_high: float
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    speedup_bound: float | None = None
    beside: Beside | None = None


@dataclass(frozen=True)
class Row:
    """One line of the table. Speeds are those of Speed, prompts included; generation: without the reading of prompts, None if no text has
    a second token. Speed-ups are None for the baseline and if none may be claimed (`withheld` says why).

    tokens_equal: all texts equal those of the plain loop in all rounds; first_divergence: else the first text that differs, faults
    before near-ties; near_ties: texts that differ within the tolerance. repeated_8gram_share: of this entry's tokens.
    low_repeat_outputs: prompts whose plain text has a share under 0.3, in a batch only if all of them do; low_repeat_speedup: over
    those, None with fewer than five. fault: why some text continued without drafts. acceptance_over_bound: over all prompts, if it was
    requested and the verifier tests sampled drafts. acceptance_by_depth[i]: the share of passes that kept i + 1 nodes or more.
    """

    method: str
    mode: str
    category: str | None
    guarantee: str
    tokens_per_second: float
    speedup: float | None
    speedup_low: float | None
    speedup_high: float | None
    mean_acceptance_length: float
    tokens_equal: bool
    first_divergence: Divergence | None
    near_ties: int
    divergences: int
    repeated_8gram_share: float
    peak_kv_bytes: int
    outputs: int
    low_repeat_outputs: int
    low_repeat_speedup: float | None
    withheld: str | None = None
    fault: str | None = None
    acceptance_over_bound: Share | None = None
    tokens_per_second_low: float = 0.0
    tokens_per_second_high: float = 0.0
    acceptance_by_depth: tuple[float, ...] = ()
    speedup_bound: float | None = None
    beside: Beside | None = None
    generation: Speed | None = None

    @property
    def besides(self) -> list[tuple[str, Beside]]:
        """What is measured, and the fastest other method in it."""
        alone = None if self.generation is None else self.generation.beside
        return [(what, one) for what, one in (("generation", alone), ("with prompt", self.beside)) if one is not None]


def repeated(tokens: Seq[int], n: int = GRAM) -> int:
    """How many tokens are part of an n-gram that occurs more than once in the text. All its occurrences count."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    counts = Counter(grams)
    covered = {i + k for i, gram in enumerate(grams) if counts[gram] > 1 for k in range(n)}
    return len(covered)


def output(run: Run, i: int) -> list[int]:
    """All tokens generated in a conversation, turn after turn."""
    return [token for turn in run.conversations[i] for token in turn.tokens]


def rows(comparison: Comparison) -> list[Row]:
    """All entries over all prompts, then by category if there are several."""
    categories = list(dict.fromkeys(group.category for group in comparison.groups))
    found = [divergences(comparison, e) for e in range(len(comparison.entries))]
    lies = {
        entry.method
        for entry, texts in zip(comparison.entries, found, strict=True)
        if promises(comparison, entry) and any(not one.near_tie for one in texts.values())
    }
    chosen: list[str | None] = [None, *(categories if len(categories) > 1 else [])]
    every = [_row(comparison, e, category, found[e], lies) for category in chosen for e in range(len(comparison.entries))]
    return [row for _, part in groupby(every, key=lambda row: row.category) for row in _compared(comparison, list(part))]


def _compared(comparison: Comparison, part: Seq[Row]) -> list[Row]:
    """The rows of one category; the chooser's have the fastest of the others beside them."""
    wanted = _wanted(comparison, part[0].category)
    found = list(part)
    for e, row in enumerate(part):
        if registry.parse(row.method)[0] != CHOOSER or row.speedup is None:
            continue
        others = [o for o, one in enumerate(part) if o and registry.parse(one.method)[0] != CHOOSER and one.mode in (row.mode, Mode.SAME)]

        def beside(measure: Measure, of: Callable[[Row], Speed | Row | None], e: int = e, others: Seq[int] = others) -> Beside | None:
            speeds = {o: speed.speedup for o in others if (speed := of(part[o])) is not None and speed.speedup is not None}
            if not speeds or of(part[e]) is None:
                return None
            best = max(speeds, key=lambda o: speeds[o] or 0.0)
            ratios = _ratios(comparison, e, wanted, measure, best)
            low = _bound(comparison, e, wanted, measure, best)
            return Beside(part[best].method, part[best].mode, median(ratios), min(ratios), max(ratios), low)

        alone = row.generation and replace(row.generation, beside=beside(generation, lambda one: one.generation))
        found[e] = replace(row, beside=beside(whole, lambda one: one), generation=alone)
    return found


def _wanted(comparison: Comparison, category: str | None) -> list[int]:
    return [g for g, group in enumerate(comparison.groups) if category in (None, group.category)]


def promises(comparison: Comparison, entry: Entry) -> bool:
    """Whether the entry's guarantee promises the tokens of the plain loop."""
    greedy = comparison.groups[0].params[0].greedy
    return entry.llm.guarantee <= (Guarantee.SAME_TEXT_GREEDY if greedy else Guarantee.SAME_TEXT)


def divergences(comparison: Comparison, e: int) -> dict[tuple[int, int], Divergence]:
    """(group, prompt in it) -> the worst first divergence over the rounds. Later turns are not compared, because their prompts differ."""
    found: dict[tuple[int, int], Divergence] = {}
    seen: dict[tuple[int, int, tuple[int, ...]], Divergence] = {}  # most rounds give the same texts
    plain_llm = comparison.entries[0].llm
    for plain_round, own_round in zip(comparison.runs[0], comparison.runs[e], strict=True):
        for g, (plain, own) in enumerate(zip(plain_round, own_round, strict=True)):
            group = comparison.groups[g]
            for i, (expected, got) in enumerate(zip(plain.conversations, own.conversations, strict=True)):
                turn = next((t for t, (a, b) in enumerate(zip(expected, got)) if a.tokens != b.tokens), None)
                if turn is None:
                    continue
                key = (g, i, tuple(got[turn].tokens))
                if key not in seen:
                    a, b = expected[turn], got[turn]
                    seen[key] = examine(plain_llm, group.prompts[i].id, turn, a.prompt, a.tokens, b.tokens, group.params[i])
                if (g, i) not in found or not seen[key].near_tie:
                    found[g, i] = seen[key]
    return found


def _row(comparison: Comparison, e: int, category: str | None, found: dict[tuple[int, int], Divergence], lies: set[str]) -> Row:
    entry, groups = comparison.entries[e], comparison.groups
    wanted = _wanted(comparison, category)
    plain = comparison.runs[0]
    little = [g for g in wanted if all(share(plain[0][g], i) < LOW_REPEAT for i in range(len(groups[g].prompts)))]
    low_outputs = sum(len(groups[g].prompts) for g in little)
    all_runs = [one[g] for one in comparison.runs[e] for g in wanted]
    texts = [output(run, i) for run in all_runs for i in range(len(run.conversations))]
    mine = {place: one for place, one in found.items() if place[0] in wanted}
    worst_first = sorted(mine, key=lambda place: (mine[place].near_tie, place))
    withheld = "its tokens differ from the plain loop's in this run" if entry.method in lies else None
    fault = next((run.fault for run in all_runs if run.fault), None)
    if fault is not None and withheld is None:
        withheld = "some texts continued without drafts"
    claims = entry.mode is not Mode.BASELINE and withheld is None
    steps = sum(run.steps for run in all_runs)
    total = _measured(comparison, e, wanted, whole, claims)
    assert total is not None
    kept = [sum(counts) for counts in zip_longest(*(run.by_depth for run in all_runs), fillvalue=0)]
    return Row(
        method=entry.method,
        mode=str(entry.mode),
        category=category,
        guarantee=entry.llm.guarantee.label,
        mean_acceptance_length=1 + sum(run.accepted for run in all_runs) / steps if steps else 0.0,
        tokens_equal=not mine,
        first_divergence=mine[worst_first[0]] if worst_first else None,
        near_ties=sum(one.near_tie for one in mine.values()),
        divergences=len(mine),
        repeated_8gram_share=sum(map(repeated, texts)) / max(1, sum(map(len, texts))),
        peak_kv_bytes=max(run.peak for run in all_runs),
        outputs=sum(len(groups[g].prompts) for g in wanted),
        low_repeat_outputs=low_outputs,
        low_repeat_speedup=median(_ratios(comparison, e, little, whole)) if claims and low_outputs >= ENOUGH else None,
        withheld=withheld,
        acceptance_over_bound=comparison.bounds.get(e) if category is None else None,
        fault=fault,
        acceptance_by_depth=tuple(count / max(1, steps) for count in kept),
        generation=_measured(comparison, e, wanted, generation, claims),
        **vars(total),
    )


def share(run: Run, i: int) -> float:
    """The part of conversation i's output that is in repeated 8-grams."""
    tokens = output(run, i)
    return repeated(tokens) / max(1, len(tokens))


def _measured(comparison: Comparison, e: int, wanted: Seq[int], measure: Measure, claims: bool) -> Speed | None:
    """None if a round has nothing to measure. claims: whether there is a speed-up."""
    if not all(_speed(one, wanted, measure) for runs in (comparison.runs[0], comparison.runs[e]) for one in runs):
        return None
    speeds = [_speed(one, wanted, measure) for one in comparison.runs[e]]
    found = Speed(median(speeds), min(speeds), max(speeds))
    if not claims:
        return found
    ratios = _ratios(comparison, e, wanted, measure)
    low = _bound(comparison, e, wanted, measure)
    return replace(found, speedup=median(ratios), speedup_low=min(ratios), speedup_high=max(ratios), speedup_bound=low)


def _speed(runs: Seq[Run], wanted: Seq[int], measure: Measure) -> float:
    """New tokens a second over some groups of one round; 0 without any."""
    tokens, seconds = map(sum, zip(*(measure(runs[g]) for g in wanted), strict=True))
    return tokens / seconds if seconds else 0.0


def _ratios(comparison: Comparison, e: int, wanted: Seq[int], measure: Measure, base: int = 0) -> list[float]:
    """The speed-up over the entry `base`, the plain loop, in each round."""
    pairs = zip(comparison.runs[e], comparison.runs[base], strict=True)
    return [_speed(own, wanted, measure) / _speed(plain, wanted, measure) for own, plain in pairs]


def _bound(comparison: Comparison, e: int, wanted: Seq[int], measure: Measure, base: int = 0) -> float | None:
    """The 5th percentile of the pooled ratio over DRAWS draws of groups, with all their rounds. The draws are the same at each call."""

    def totals(entry: int) -> np.ndarray:  # f64[groups, 2]: tokens and seconds of all rounds
        return np.array([np.sum([measure(one[g]) for one in comparison.runs[entry]], 0) for g in wanted])

    own, plain = totals(e), totals(base)
    own, plain = (found[(own[:, 1] > 0) & (plain[:, 1] > 0)] for found in (own, plain))
    if len(own) < 2:
        return None
    drawn = np.random.default_rng(0).integers(0, len(own), (DRAWS, len(own)))
    (a, s), (b, t) = own[drawn].sum(1).T, plain[drawn].sum(1).T
    return float(np.percentile(a / s / (b / t), 5))
