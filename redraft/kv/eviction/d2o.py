"""Layers with peaked attention keep fewer slots, and an evicted slot joins the kept one with the most similar key.

Zhongwei Wan, Xinjian Wu, Yu Zhang, Yi Xin, Chaofan Tao, Zhihong Zhu, Xin Wang, Siqi Luo, Jing Xiong, Longyue Wang, Mi Zhang: D2O: Dynamic
Discriminative Operations for Efficient Long-Context Inference of Large Language Models, 2024, arXiv 2406.13035.

1. Add up the attention that every row gave to each slot of a head. F is the variance of these sums over the slots, averaged over the heads
   of a layer.
2. At the end of the prompt a layer gets the share softmax(-F) of all layers' slots. Its budget does not change later.
3. A head keeps the first `sinks` slots, the newest, which are the part `newest` of its budget, and those with the largest sums.
4. u is the largest cosine of an evicted key and a kept one. The threshold of a head is the mean of u at its first eviction, and moves by
   `smooth` towards the mean of u at later ones.
5. An evicted slot with u at or above the threshold joins that kept slot, others are lost. In the mean that replaces keys and values a slot
   that joins has the weight exp(u), the kept slot exp(1).
6. While the text grows, repeat steps 3 to 5 after every `drop` tokens.

Differs: `drop` tokens are evicted at once (in the paper one after each token); variances are scaled to 0..1 over the heads of all layers,
because the softmax of plain ones gives one layer everything; query heads of a kv head choose together; cosines are those of rotated keys;
every layer is compressed (the released code spares three).
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from math import ceil, e
from typing import Any, ClassVar

import numpy as np

from redraft.card import Card, Guarantee
from redraft.core.sequence import UNLIMITED, Sequence
from redraft.core.tree import F64, I32, I64
from redraft.kv.eviction.eviction import OpenEviction
from redraft.kv.eviction.merge import Means, contents, cosines, evicted, joins
from redraft.kv.eviction.parts import AtContext, Evicting, Mass, Selector, Tally
from redraft.kv.slots import Held, Kept
from redraft.options import Options, number


@dataclass(frozen=True)
class ByVariance:
    """Layers of `heads` heads each share all slots by softmax(-F)."""

    heads: int
    least: int

    def longest(self, kept: int) -> int:
        """F is between 0 and 1, so no share exceeds e times the even one."""
        return ceil(e * kept) + 1

    def shares(self, kept: int, keys: Seq[F64], ranks: I64, lengths: I64) -> I64:
        spread = np.array([sums[:length].var() for sums, length in zip(keys[0], lengths.tolist(), strict=True)])
        spread = (spread - spread.min()) / max(float(np.ptp(spread)), np.finfo(np.float64).tiny)
        parts = np.exp(-spread.reshape(-1, self.heads).mean(1))
        return np.repeat(whole(parts, kept * len(parts), self.least, int(lengths.min())), self.heads)


def whole(parts: F64, total: int, least: int, most: int) -> I64:
    """Integers from `least` to `most` with this sum, in proportion to `parts` where these bounds allow it. least <= total / n <= most."""
    found, free = np.full(len(parts), least), total - least * len(parts)
    while free:
        wants = np.where(found < most, parts, 0.0)
        exact = free * wants / wants.sum()
        more = np.minimum(np.floor(exact).astype(np.int64), most - found)
        if not more.any():  # by the largest remainders
            order = np.argsort(-np.where(found < most, exact, -1.0), kind="stable")[: min(free, int((found < most).sum()))]
            more[order] = 1
        found, free = found + more, free - int(more.sum())
    return found


@dataclass(eq=False)
class Running(Tally):
    """budgets: slots of each lane, None before the first decision; thresholds: f64[lanes], NaN before the first."""

    budgets: I64 | None = None
    thresholds: F64 = field(default_factory=lambda: np.zeros(0))


class Discriminating(Evicting):
    """The opened policy."""

    def __init__(self, method: D2O, layers: int, heads: int) -> None:
        least = method.sinks + 2
        super().__init__(
            layers * heads,
            trigger=AtContext(method.budget, 2 * least, method.drop),
            scorer=Mass(UNLIMITED),
            selector=Selector(method.sinks, 1, 0.0),
            allocator=ByVariance(heads, least),
        )
        self.method, self.merges = method, method.merge

    def begin(self, seq: Sequence) -> Running:
        start = super().begin(seq)
        return Running(start.stored, start.lengths, start.sums, None, np.full(self.count, np.nan))

    def fork(self, state: Tally, seq: Sequence) -> Tally:
        copied = super().fork(state, seq)
        assert isinstance(copied, Running)
        copied.thresholds = copied.thresholds.copy()
        return copied

    def choose(self, seq: Sequence, sums: F64, lengths: I64, held: Held) -> Kept:
        state: Running = seq.state[self]
        if state.budgets is None:
            kept = self.trigger.kept(seq.context)
            even = np.full(self.count, kept)
            state.budgets = self.allocator.shares(kept, [sums[0]], even, lengths) if self.method.adaptive else even
        slots = []
        for mass, length, budget in zip(sums[0], lengths.tolist(), state.budgets.tolist(), strict=True):  # 3.
            newest = Selector(self.method.sinks, 1, self.method.newest)
            ranks = newest.ranks([mass[None]], np.array([length]), budget)
            slots += newest.select(ranks, np.array([budget]))
        if not self.merges:
            return Kept(slots)
        lost = [evicted(kept, length) for kept, length in zip(slots, lengths.tolist(), strict=True)]
        each = [self._merge(state.thresholds, lane, *both, held) for lane, both in enumerate(zip(slots, lost, strict=True))]
        return Kept(slots, contents(slots, each, held))

    def _merge(self, thresholds: F64, lane: int, kept: I32, gone: I32, held: Held) -> Means:
        keys = held.read(lane)[0][0]
        alike = cosines(keys[gone], keys[kept])
        target, best = alike.argmax(1), alike.max(1)  # 4.
        if len(gone):
            mean, before = float(best.mean(dtype=np.float64)), thresholds[lane]
            thresholds[lane] = mean if np.isnan(before) else self.method.smooth * mean + (1 - self.method.smooth) * before
        near = best >= thresholds[lane]  # 5.
        return joins(kept, gone[near], target[near], e, np.exp(best[near].astype(np.float64)))


@dataclass(frozen=True)
class D2O(Options):
    """budget: slots that a kv head keeps on average, or the part of the prompt if it is 1 or less; newest: the part of them for the last
    tokens; sinks: the number of first tokens that always stay; smooth: how far a threshold moves at an eviction; drop: tokens between two
    evictions; adaptive: whether layers get different budgets; merge: whether evicted slots join others, false to drop them."""

    budget: float = number(0.2, gt=0)
    newest: float = number(0.5, ge=0, lt=1)
    sinks: int = number(4, ge=0)
    smooth: float = number(0.5, ge=0, le=1)
    drop: int = number(64, ge=1)
    adaptive: bool = True
    merge: bool = True

    card: ClassVar[Card] = Card(
        "D2O",
        "Wan, Wu, Zhang, Xin, Tao, Zhu, Wang, Luo, Xiong, Wang, Zhang, D2O: Dynamic Discriminative Operations for Efficient "
        "Long-Context Inference of Large Language Models, 2024, arXiv 2406.13035",
        Guarantee.LOSSY,
        deviates="evicts many tokens at once; variances are scaled; every layer is compressed",
        summary="Merges evicted tokens into similar ones; long outputs",
        budget="budget={part}",
    )

    def open(self, runner: Any) -> OpenEviction:
        return Discriminating(self, len(runner.spec.attention), runner.spec.kv_heads)
