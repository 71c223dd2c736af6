"""From measurements to rows: speeds, ratios, equality of texts, repetition. One row for each entry and category, and one over all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import zip_longest
from statistics import median

from redraft.bench.compare import Comparison, Entry, Mode, Run
from redraft.bench.divergence import Divergence, examine
from redraft.bench.gauge import Share
from redraft.card import Guarantee

GRAM = 8
LOW_REPEAT = 0.3
ENOUGH = 5  # outputs with little repetition that are needed to claim a speed-up for them


@dataclass(frozen=True)
class Row:
    """One line of the table. tokens_per_second and speedup are medians over the rounds, those that end in _low and _high the minimum and
    maximum. Speed-ups are None for the baseline and if none may be claimed (`withheld` says why).

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
    return [_row(comparison, e, category, found[e], lies) for category in chosen for e in range(len(comparison.entries))]


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
    wanted = [g for g, group in enumerate(groups) if category in (None, group.category)]
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
    ratios = _ratios(comparison, e, wanted) if claims else []
    steps = sum(run.steps for run in all_runs)
    speeds = [_speed(one, wanted) for one in comparison.runs[e]]
    kept = [sum(counts) for counts in zip_longest(*(run.by_depth for run in all_runs), fillvalue=0)]
    return Row(
        method=entry.method,
        mode=str(entry.mode),
        category=category,
        guarantee=entry.llm.guarantee.label,
        tokens_per_second=median(speeds),
        speedup=median(ratios) if ratios else None,
        speedup_low=min(ratios, default=None),
        speedup_high=max(ratios, default=None),
        mean_acceptance_length=1 + sum(run.accepted for run in all_runs) / steps if steps else 0.0,
        tokens_equal=not mine,
        first_divergence=mine[worst_first[0]] if worst_first else None,
        near_ties=sum(one.near_tie for one in mine.values()),
        divergences=len(mine),
        repeated_8gram_share=sum(map(repeated, texts)) / max(1, sum(map(len, texts))),
        peak_kv_bytes=max(run.peak for run in all_runs),
        outputs=sum(len(groups[g].prompts) for g in wanted),
        low_repeat_outputs=low_outputs,
        low_repeat_speedup=median(_ratios(comparison, e, little)) if ratios and low_outputs >= ENOUGH else None,
        withheld=withheld,
        acceptance_over_bound=comparison.bounds.get(e) if category is None else None,
        fault=fault,
        tokens_per_second_low=min(speeds),
        tokens_per_second_high=max(speeds),
        acceptance_by_depth=tuple(count / max(1, steps) for count in kept),
    )


def share(run: Run, i: int) -> float:
    """The part of conversation i's output that is in repeated 8-grams."""
    tokens = output(run, i)
    return repeated(tokens) / max(1, len(tokens))


def _speed(runs: Seq[Run], wanted: Seq[int]) -> float:
    """New tokens a second over some groups of one round."""
    return sum(runs[g].tokens for g in wanted) / sum(runs[g].seconds for g in wanted)


def _ratios(comparison: Comparison, e: int, wanted: Seq[int]) -> list[float]:
    """The speed-up over the plain loop in each round."""
    pairs = zip(comparison.runs[e], comparison.runs[0], strict=True)
    return [_speed(own, wanted) / _speed(plain, wanted) for own, plain in pairs]
