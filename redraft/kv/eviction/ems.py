"""Ranks slots by old and by new attention, keeps the best, merges those in between into the most similar kept ones, and drops the rest.

Yingxin Li, Ye Li, Yuan Meng, Xinzhu Ma, Zihan Geng, Shutao Xia, Zhi Wang: EMS: Adaptive Evict-then-Merge Strategy for Head-wise KV Cache
Compression Based on Global-Local Importance, 2024, arXiv 2412.08521.

1. The global score of a slot is the attention that it received from all rows, divided by the number of rows that see it. The local score
   is that from the last `window` rows.
2. Scale the local scores of a head to the mean of its global ones. A slot's score is the larger of both.
3. A head keeps the last `window` slots and the best others as centres, `budget` in all.
4. Of the rest, the lowest slots that together have no more than the part `sparse` of all scores are dropped.
5. The others join the centre with the largest product of the cosines of keys and of values, each at least 0, if it exceeds `similar`;
   otherwise they are dropped. Keys and values of the centre become the plain mean.
6. While the text grows, repeat after every `window` tokens. Global sums go on.

Differs: the paper's operators for scores and weights are partly unpublished: the maximum and the plain mean are choices; query heads of a
kv head choose together; cosines are those of rotated keys; a merged slot counts as one key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from redraft.card import Card, Guarantee
from redraft.core.sequence import UNLIMITED, Sequence
from redraft.core.tree import F64, I32, I64
from redraft.kv.eviction.eviction import OpenEviction
from redraft.kv.eviction.merge import Means, contents, cosines, evicted, joins
from redraft.kv.eviction.parts import AtContext, Even, Evicting, Mass, Selector
from redraft.kv.slots import Held, Kept
from redraft.options import Options, number, word


@dataclass(frozen=True)
class TwoMasses(Mass):
    """The attention from all rows, and that from the last ones."""

    statistics: ClassVar[tuple[str, ...]] = ("mass", "mass")


class EvictThenMerge(Evicting):
    """The opened policy for `count` lanes."""

    def __init__(self, method: EMS, count: int) -> None:
        super().__init__(
            count,
            trigger=AtContext(method.budget, method.window + 2, method.window),
            scorer=TwoMasses(UNLIMITED),
            selector=Selector(0, method.window),
            allocator=Even(),
        )
        self.method, self.merges = method, method.similar < 1

    def since(self, at: int) -> tuple[int, ...]:
        return 0, max(0, at - self.method.window)

    def decide(self, seq: Sequence, held: Held) -> Kept | None:
        if (kept := super().decide(seq, held)) is not None:
            seq.state[self].sums[1] = 0
        return kept

    def choose(self, seq: Sequence, sums: F64, lengths: I64, held: Held) -> Kept:
        scores, kept = np.zeros(sums.shape[1:]), self.trigger.kept(seq.context)
        for lane, (length, where) in enumerate(zip(lengths.tolist(), held.positions(), strict=True)):
            scores[lane, :length] = self.scores(sums[0, lane, :length], sums[1, lane, :length], seq.stored - where)
        slots = self.selector.select(self.selector.ranks([scores], lengths), np.full(self.count, kept))
        if not self.merges:
            return Kept(slots)
        lanes = enumerate(zip(slots, lengths.tolist(), strict=True))
        return Kept(slots, contents(slots, [self._merge(lane, own, scores[lane, :length], held) for lane, (own, length) in lanes], held))

    def scores(self, every: F64, last: F64, rows: I32) -> F64:
        """Of the slots of a lane; rows: how many rows see each of them. Those of the window are not compared."""
        others = slice(0, max(1, len(rows) - self.method.window))
        everyone = every / rows  # 1.
        scaled = last * (everyone[others].mean() / max(float(last[others].mean()), np.finfo(np.float64).tiny))  # 2.
        found: dict[str, F64] = {"both": np.maximum(everyone, scaled), "global": everyone, "local": last}
        return found[self.method.score]

    def _merge(self, lane: int, kept: I32, scores: F64, held: Held) -> Means:
        gone, centres = evicted(kept, len(scores)), kept[: -self.method.window]
        lowest = gone[np.argsort(scores[gone], kind="stable")]
        below = np.cumsum(scores[lowest]) <= self.method.sparse * scores[: len(scores) - self.method.window].sum()  # 4.
        gone = np.sort(lowest[~below])
        keys, values = (x[0] for x in held.read(lane))
        alike = np.maximum(cosines(keys[gone], keys[centres]), 0) * np.maximum(cosines(values[gone], values[centres]), 0)  # 5.
        near = alike.max(1) > self.method.similar if len(gone) else np.zeros(0, bool)
        return joins(centres, gone[near], alike.argmax(1)[near] if len(gone) else np.zeros(0, np.int64))


@dataclass(frozen=True)
class EMS(Options):
    """budget: slots that a kv head keeps, or the part of the prompt if it is 1 or less; window: the number of newest rows of the local
    score, which stay; similar: above which product of cosines a slot joins a centre, 1 to drop all; sparse: the part of all scores that is
    dropped; score: both, global or local."""

    budget: float = number(256.0, gt=0)
    window: int = number(32, ge=1)
    similar: float = number(0.6, ge=-1, le=1)
    sparse: float = number(0.01, ge=0, le=1)
    score: str = word("both", "global", "local")

    card: ClassVar[Card] = Card(
        "EMS",
        "Li, Li, Meng, Ma, Geng, Xia, Wang, EMS: Adaptive Evict-then-Merge Strategy for Head-wise KV Cache Compression Based on "
        "Global-Local Importance, 2024, arXiv 2412.08521",
        Guarantee.LOSSY,
        deviates="the larger of two scores and plain means, which are not published; a merged slot counts as one key",
        summary="Evicts, then merges by two scores; very small budgets",
        budget="budget={part}",
    )

    def open(self, runner: Any) -> OpenEviction:
        return EvictThenMerge(self, len(runner.spec.attention) * runner.spec.kv_heads)
