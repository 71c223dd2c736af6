"""Evicts every `window` tokens: slots that have been quiet for longer than they ever were before they were attended to again.

Haoyue Zhang, Hualei Zhang, Xiaosong Ma, Jie Zhang, Song Guo: LazyEviction: Lagged KV Eviction with Attention Pattern Observation for
Efficient Long Reasoning, 2025, arXiv 2506.15969.

1. A row activates a slot if a query head of its kv head gives it more than threshold / (slots that the row sees).
2. A slot remembers the row that last activated it, at first its own, and the longest interval between two activations.
3. When a head has budget + window slots, score each by two terms: how short its quiet time is against its longest interval,
   2 sigmoid(-quiet / interval), and, unless `long` is off, how long that interval is, 2 sigmoid(-1 / interval). A slot that was never
   activated again scores 0.
4. Keep the newest `window` slots and the best others, `budget` in all.

Differs: the first eviction is at the end of the prompt, of which only the last `window` rows are watched, so that long prompts run as fast
as without it; the threshold is relative to an even share.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from redraft.card import Card, Guarantee
from redraft.core.sequence import NEVER, UNLIMITED, Lanes, Onset, Sequence
from redraft.core.tree import F64, I64
from redraft.core.view import Watch
from redraft.kv.eviction.eviction import OpenEviction, StatelessEviction
from redraft.kv.eviction.parts import AtContext, Selector
from redraft.kv.slots import Held, Kept
from redraft.ops.arrays import array
from redraft.ops.backend import WeightSums
from redraft.options import Options, number


@dataclass(eq=False)
class Memories:
    """What the slots of one sequence remember. stored: committed tokens at the last decision; lengths: i64[lanes], the slots kept then;
    last, interval: i64[lanes, slots]."""

    stored: int
    lengths: I64
    last: I64
    interval: I64

    def grow(self, width: int, positions: range) -> None:
        """Room for `width` slots in each lane. New ones are at these positions, the last slots of each lane."""
        if (lacking := width - self.last.shape[1]) > 0:
            more = max(lacking, self.last.shape[1])
            self.last, self.interval = (np.pad(x, ((0, 0), (0, more))) for x in (self.last, self.interval))
        slots = self.lengths[:, None] + np.array(positions)[None] - self.stored
        np.put_along_axis(self.last, slots, np.array(positions)[None], 1)  # 2. at first its own row
        np.put_along_axis(self.interval, slots, 0, 1)

    def activate(self, row: int, active: NDArray[np.bool_]) -> None:
        """bool[lanes, slots]: the slots that the row at this position activates."""
        last, interval = self.last[:, : active.shape[1]], self.interval[:, : active.shape[1]]
        np.copyto(interval, np.maximum(interval, row - last), where=active)
        np.copyto(last, row, where=active)


class Lazy(StatelessEviction):
    """The opened policy for `count` lanes. Its state is Memories."""

    lanes = Lanes.PER_HEAD

    def __init__(self, count: int, trigger: AtContext, threshold: float, long: bool) -> None:
        self.count, self.trigger, self.long = count, trigger, long
        self.watched = Watch("above", 0, threshold, each=True)
        self.selector = Selector(0, trigger.drop)

    def first(self, seq: Sequence) -> int:
        """The first row that is watched."""
        return max(0, self.trigger.after(0, seq.context) - self.trigger.drop)

    def onset(self, context: int) -> Onset:
        at, kept = self.trigger.after(0, context), self.trigger.kept(context)
        most = kept + self.trigger.drop
        return NEVER if at == UNLIMITED else Onset(at, at, max(0, at - self.trigger.drop), kept, most, most)

    def begin(self, seq: Sequence) -> Memories:
        before = np.broadcast_to(np.arange(seq.stored), (self.count, seq.stored))
        return Memories(seq.stored, np.full(self.count, seq.stored), before.copy(), np.zeros((self.count, seq.stored), np.int64))

    def fork(self, state: Memories, seq: Sequence) -> Memories:
        return replace(state, lengths=state.lengths.copy(), last=state.last.copy(), interval=state.interval.copy())

    def sync_point(self, seq: Sequence) -> int:
        first = self.first(seq)
        return first if seq.stored < first else self.trigger.after(seq.stored, seq.context)

    def watch(self, seq: Sequence) -> tuple[Watch, ...]:
        return () if seq.stored < self.first(seq) else (self.watched,)

    def observe(self, seq: Sequence, seen: WeightSums | None, rows: int, path: Seq[int]) -> None:
        state: Memories = seq.state[self]
        before = seq.stored - rows - len(path)
        ends = state.lengths + (before - state.stored)
        width = int(ends.max()) + rows + len(path)
        state.grow(width, range(before, seq.stored))
        if seen is None:
            return
        chain, nodes = (array(part)[0].reshape(-1, self.count, array(part).shape[-1]) > 0 for part in (seen.chain, seen.nodes))  # 1.
        inside = np.arange(width) < (ends + rows)[:, None]
        for row in range(rows):
            state.activate(before + row, chain[row, :, :width] & inside)
        lanes = np.arange(self.count)
        for depth, node in enumerate(path):
            active = nodes[node, :, :width] & inside
            for place, above in enumerate(path[: depth + 1]):  # the commit moved the nodes of the path to the end of the chain
                active[lanes, ends + rows + place] = nodes[node, lanes, ends + rows + above]
            state.activate(before + rows + depth, active)

    def decide(self, seq: Sequence, held: Held) -> Kept | None:
        state: Memories = seq.state[self]
        if seq.stored < self.trigger.after(state.stored, seq.context):
            return None
        lengths, kept = state.lengths + (seq.stored - state.stored), self.trigger.kept(seq.context)
        width = int(lengths.max())
        score = self.score(seq.stored - 1 - state.last[:, :width], state.interval[:, :width])  # 3.
        slots = self.selector.select(self.selector.ranks([score], lengths), np.full(self.count, kept))  # 4.
        places = np.stack(slots)
        last, interval = (np.take_along_axis(x, places, 1) for x in (state.last, state.interval))
        seq.state[self] = Memories(seq.stored, np.full(self.count, kept), last, interval)
        return Kept(slots)

    def score(self, quiet: I64, interval: I64) -> F64:
        """The scores of slots from their quiet times and longest intervals, in rows."""
        known = np.maximum(interval, 1)
        score = 2 / (1 + np.exp(quiet / known)) + (2 / (1 + np.exp(1 / known)) if self.long else 0.0)
        return np.where(interval > 0, score, 0.0)


@dataclass(frozen=True)
class LazyEviction(Options):
    """budget: slots that a kv head keeps, or the part of the prompt if it is 1 or less; window: tokens between two evictions, and newest
    tokens that stay; threshold: the part of an even share of attention that activates a slot; long: whether slots with long intervals
    are worth more."""

    budget: float = number(0.5, gt=0, le=1 << 20)
    window: int = number(64, ge=1, le=256)
    threshold: float = number(1.0, gt=0)
    long: bool = True

    card: ClassVar[Card] = Card(
        "LazyEviction",
        "Zhang, Zhang, Ma, Zhang, Guo, LazyEviction: Lagged KV Eviction with Attention Pattern Observation for Efficient Long "
        "Reasoning, 2025, arXiv 2506.15969",
        Guarantee.LOSSY,
        deviates="of the prompt, its last rows are watched; the threshold is a part of an even share",
        summary="Keeps what comes back after quiet times; long outputs",
        budget="budget={part}",
    )

    def open(self, runner: Any) -> OpenEviction:
        trigger = AtContext(self.budget, self.window + 1, self.window)
        return Lazy(len(runner.spec.attention) * runner.spec.kv_heads, trigger, self.threshold, self.long)
