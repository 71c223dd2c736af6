"""The parts of policies that evict by attention.

    Trigger    when to evict: at `budget` slots, and then every `drop` tokens (Full), or at the end of the given context (AtContext)
    Tally      the statistics of each slot of a sequence since the last decision
    Scorer     which statistics are watched, over how many rows, and how slots compare
    Selector   which slots are protected, and which slots a lane keeps
    Allocator  how many slots each lane keeps

`Evicting` is the opened policy that combines them. Arrays are [lanes, slots], lane = layer * kv heads + kv head. Lanes of unequal
length are padded on the right. Slots are in text order, so a lower slot is older.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from math import ceil
from typing import ClassVar, Protocol

import numpy as np

from redraft.core.sequence import NEVER, UNLIMITED, Lanes, Onset, Sequence
from redraft.core.tree import F64, I32, I64
from redraft.core.view import Watch
from redraft.errors import InvalidInput
from redraft.kv.eviction.eviction import StatelessEviction
from redraft.kv.slots import Held, Kept
from redraft.ops.arrays import array
from redraft.ops.backend import WeightSums
from redraft.options import Options, number


class Trigger(Protocol):
    """context: the given tokens of a text. Slots are those of a lane, on average over the lanes that share a budget."""

    def kept(self, context: int) -> int:
        """Slots after a decision."""
        ...

    def after(self, stored: int, context: int) -> int:
        """The next count of committed tokens, above `stored`, at which a decision is due; UNLIMITED if none is."""
        ...

    def most(self, context: int) -> int:
        """The largest number of slots at any time after the first decision."""
        ...


@dataclass(frozen=True)
class Full:
    """Evicts `drop` of `budget` slots whenever all are full, which is every `drop` tokens."""

    budget: int
    drop: int

    def kept(self, context: int) -> int:
        return self.budget - self.drop

    def after(self, stored: int, context: int) -> int:
        return self.budget + max(0, (stored - self.budget) // self.drop + 1) * self.drop

    def most(self, context: int) -> int:
        return self.budget


@dataclass(frozen=True)
class AtContext:
    """Evicts once, when all given tokens are stored: `budget` slots stay, or this part of the context if it is 1 or less, but at least
    `least`. With drop > 0 it evicts again whenever the text has grown by `drop` tokens."""

    budget: float
    least: int
    drop: int = 0

    def kept(self, context: int) -> int:
        return max(self.least, ceil(self.budget * context) if self.budget <= 1 else int(self.budget))

    def after(self, stored: int, context: int) -> int:
        first = context if context > self.kept(context) else self.kept(context) + self.drop if self.drop else UNLIMITED
        if stored < first:
            return first
        return first + ((stored - first) // self.drop + 1) * self.drop if self.drop else UNLIMITED

    def most(self, context: int) -> int:
        return self.kept(context) + self.drop if self.drop else UNLIMITED


@dataclass(eq=False)
class Tally:
    """Statistics of the slots of one sequence. stored: committed tokens at the last decision; lengths: i64[lanes], the slots that it
    kept; sums: f64[statistics, lanes, slots]. It grows with the rows that count; missing slots count as 0."""

    stored: int
    lengths: I64
    sums: F64

    @staticmethod
    def start(stored: int, lengths: I64, statistics: int) -> Tally:
        return Tally(stored, lengths, np.zeros((statistics, len(lengths), 0)))

    def now(self, stored: int) -> I64:
        """i64[lanes]: lengths at `stored` committed tokens; every lane grows by one slot a token."""
        return self.lengths + (stored - self.stored)

    def add(self, seen: WeightSums, ends: I64, path: Seq[int], skip: int | Seq[int]) -> None:
        """Counts the chain rows, which end at slots `ends` i64[lanes], and then the nodes `path` without the first `skip`, a number
        for each statistic or one for all.

        The step wrote node i to slot ends + i; the commit moved it to ends + its index on the path, and its column moves likewise.
        Columns and rows of other nodes, and padding, do not count. Lanes of whole layers get the mean over their heads.
        """
        statistics, lanes, _ = self.sums.shape
        chain, nodes = (array(part).astype(np.float64) for part in (seen.chain, seen.nodes[:, list(path)]))
        counts = np.arange(len(path)) >= np.reshape(skip, (-1, 1))
        nodes = np.where(counts[..., None, None, None], nodes, 0.0)
        new = (chain + nodes.sum(1)).reshape(statistics, lanes, -1, chain.shape[-1]).mean(2)
        lane, width = np.arange(lanes), int(ends.max())
        self.widen(width + len(path))
        self.sums[..., :width] += np.where(np.arange(width) < ends[:, None], new[..., :width], 0.0)
        for place, node in enumerate(path):
            self.sums[:, lane, ends + place] += new[:, lane, ends + node]

    def restricted(self, stored: int, kept: Seq[I32]) -> Tally:
        """The same statistics of the slots that each lane keeps, for a decision at `stored` tokens."""
        lengths = np.array([len(slots) for slots in kept])
        sums = np.zeros((*self.sums.shape[:2], int(lengths.max())))
        for lane, slots in enumerate(kept):
            sums[:, lane, : len(slots)] = self.sums[:, lane, slots]
        return replace(self, stored=stored, lengths=lengths, sums=sums)

    def widen(self, width: int) -> None:
        """Makes room for `width` slots in each lane."""
        if (lacking := width - self.sums.shape[-1]) > 0:
            self.sums = np.pad(self.sums, ((0, 0), (0, 0), (0, max(lacking, self.sums.shape[-1]))))


class Scorer(Protocol):
    """statistics: names of the statistics (see Watch) that are summed over the last `history` rows before a decision. With UNLIMITED they
    are summed over all rows of the text, also over those before earlier decisions."""

    statistics: ClassVar[tuple[str, ...]]

    @property
    def history(self) -> int: ...

    @property
    def heads(self) -> tuple[tuple[bool, ...], ...] | None:
        """[layer][query head], whether it counts; None: all do."""
        ...

    def keys(self, sums: F64, lengths: I64) -> list[F64]:
        """The keys f64[lanes, slots] by which slots compare, from sums f64[statistics, lanes, slots] of lanes with `lengths` slots. Slots
        with larger keys stay. The first key decides, the next one breaks ties, and of equal slots the older is evicted."""
        ...


@dataclass(frozen=True)
class SeldomLow:
    """Keeps the slots that seldom received less than an even share of attention; of equal slots those that received more."""

    history: int
    heads: ClassVar[None] = None
    statistics: ClassVar[tuple[str, ...]] = ("low", "mass")

    def keys(self, sums: F64, lengths: I64) -> list[F64]:
        low, mass = sums
        return [-low, mass]


@dataclass(frozen=True)
class Mass:
    """Keeps the slots that received most attention. pool: an odd number of neighbouring slots over which it is averaged first, without the
    newest `apart` slots and the ends; 1: none; heads: the query heads that count, see Watch."""

    history: int
    pool: int = 1
    apart: int = 0
    heads: tuple[tuple[bool, ...], ...] | None = None
    statistics: ClassVar[tuple[str, ...]] = ("mass",)

    def keys(self, sums: F64, lengths: I64) -> list[F64]:
        mass = sums[0]
        if self.pool == 1 or not mass.shape[-1]:
            return [mass]
        counted = np.where(np.arange(mass.shape[-1]) < lengths[:, None] - self.apart, mass, 0.0)
        around = np.pad(counted, ((0, 0), (self.pool // 2, self.pool // 2)))
        return [np.lib.stride_tricks.sliding_window_view(around, self.pool, -1).sum(-1) / self.pool]


@dataclass(frozen=True)
class Selector:
    """Protects the first `sinks` and the newest slots of every lane, whatever their score: `recent` of them, and at least the part `newest`
    of those that stay."""

    sinks: int
    recent: int
    newest: float = 0.0

    def ranks(self, keys: Seq[F64], lengths: I64, kept: int = 0) -> I64:
        """i64[lanes, slots]: the rank of each slot in its lane, 0 for the slot to evict last. Protected slots come first, then slots by
        their keys, then padding."""
        slots, ends = np.arange(keys[0].shape[-1]), lengths[:, None]
        protected = (slots < self.sinks) | (slots >= ends - max(self.recent, int(self.newest * kept)))
        worst_first = np.lexsort((*reversed(keys), np.where(slots < ends, protected, -1)))
        return np.argsort(worst_first[:, ::-1], axis=-1)

    def select(self, ranks: I64, shares: I64) -> list[I32]:
        """The slots that each lane keeps, ascending."""
        return [np.flatnonzero(rank < share).astype(np.int32) for rank, share in zip(ranks, shares, strict=True)]


class Allocator(Protocol):
    def shares(self, kept: int, keys: Seq[F64], ranks: I64, lengths: I64) -> I64:
        """i64[lanes]: the number of slots that each lane keeps. Their mean is `kept`; none exceeds `lengths`."""
        ...

    def longest(self, kept: int) -> int:
        """The largest number of slots that a lane may keep."""
        ...


@dataclass(frozen=True)
class Even:
    """Every lane keeps the same number of slots."""

    def shares(self, kept: int, keys: Seq[F64], ranks: I64, lengths: I64) -> I64:
        return np.full(len(lengths), kept)

    def longest(self, kept: int) -> int:
        return kept


@dataclass(frozen=True)
class Across:
    """Keeps the best slots of every head, protected ones included: the part `floor` of an even share, and at least `least`; then the best
    other slots of all `heads` of a layer."""

    heads: int
    floor: float
    least: int

    def sure(self, kept: int) -> int:
        return max(self.least, int(self.floor * kept))

    def longest(self, kept: int) -> int:
        """All other heads of its layer keep the floor."""
        return kept + (self.heads - 1) * (kept - self.sure(kept))

    def shares(self, kept: int, keys: Seq[F64], ranks: I64, lengths: I64) -> I64:
        width = ranks.shape[-1]
        granted = np.where(ranks < lengths[:, None], ranks < self.sure(kept), -1)
        layers = [key.reshape(-1, self.heads * width) for key in (*reversed(keys), granted)]
        best = np.lexsort(layers)[:, -self.heads * kept :] // width  # the head of each
        return np.stack([(best == head).sum(-1) for head in range(self.heads)], -1).ravel()


@dataclass(frozen=True)
class EqualMass:
    """Every lane keeps its best slots until they hold the same share of what all its slots received by the first key; the first `floor` do
    not count and always stay. So lanes keep more if their attention is spread."""

    floor: int
    lanes: int

    def longest(self, kept: int) -> int:
        """All other lanes keep the floor."""
        return kept + (self.lanes - 1) * (kept - self.floor)

    def shares(self, kept: int, keys: Seq[F64], ranks: I64, lengths: I64) -> I64:
        lanes, width = ranks.shape
        place = np.arange(width)
        counts = (place >= self.floor) & (place < lengths[:, None])
        best_first = np.where(counts, np.take_along_axis(keys[0], np.argsort(ranks, -1), -1), 0.0)
        until = np.cumsum(best_first, -1)
        level = (until - best_first) / np.maximum(until[:, -1:], np.finfo(np.float64).tiny)  # the share that better slots hold
        level = np.where(counts, level, np.where(place < self.floor, -1.0, np.inf))
        chosen = np.argsort(level.T.ravel(), kind="stable")[: lanes * kept] % lanes  # of equal levels, the better slot
        return np.bincount(chosen, minlength=lanes)


class Evicting(StatelessEviction):
    """The opened policy for `count` lanes: one for each layer and kv head, or one for each layer. Lanes hold different slots; positions do
    not change. Its state is a Tally.

    Statistics start again after each decision, so a decision uses only rows since the last one, unless the scorer counts all rows.
    """

    def __init__(
        self,
        count: int,
        *,
        trigger: Trigger,
        scorer: Scorer,
        selector: Selector,
        allocator: Allocator,
        lanes: Lanes = Lanes.PER_HEAD,
    ) -> None:
        self.count, self.lanes = count, lanes
        self.trigger, self.scorer, self.selector, self.allocator = trigger, scorer, selector, allocator
        self.once = trigger.most(1) == UNLIMITED

    def onset(self, context: int) -> Onset:
        at = self.trigger.after(0, context)
        if at == UNLIMITED:
            return NEVER
        kept, most = self.trigger.kept(context), self.trigger.most(context)
        longest = UNLIMITED if most == UNLIMITED else self.allocator.longest(kept) + most - kept
        return Onset(at, at, max(0, at - self.scorer.history), kept, most, longest)

    def begin(self, seq: Sequence) -> Tally:
        return Tally.start(seq.stored, np.full(self.count, seq.stored), len(self.scorer.statistics))

    def fork(self, state: Tally, seq: Sequence) -> Tally:
        return replace(state, lengths=state.lengths.copy(), sums=state.sums.copy())

    def sync_point(self, seq: Sequence) -> int:
        return self.trigger.after(seq.stored, seq.context)

    def watch(self, seq: Sequence) -> tuple[Watch, ...]:
        if (at := self.trigger.after(seq.stored, seq.context)) == UNLIMITED:
            return ()
        parts = zip(self.scorer.statistics, self.since(at), strict=True)
        return tuple(Watch(statistic, since, heads=self.scorer.heads) for statistic, since in parts)

    def since(self, at: int) -> tuple[int, ...]:
        """The first row of each statistic that counts for a decision at `at` committed tokens."""
        return (max(0, at - self.scorer.history),) * len(self.scorer.statistics)

    def observe(self, seq: Sequence, seen: WeightSums | None, rows: int, path: Seq[int]) -> None:
        tally: Tally = seq.state[self]
        since = self.since(self.trigger.after(tally.stored, seq.context))
        if seen is None or seq.stored <= min(since):
            return
        first = seq.stored - len(path)  # the position of the first node of the path
        tally.add(seen, tally.now(first), path, [max(0, row - first) for row in since])

    def decide(self, seq: Sequence, held: Held) -> Kept | None:
        tally: Tally = seq.state[self]
        if seq.stored < self.trigger.after(tally.stored, seq.context):
            return None
        lengths = tally.now(seq.stored)
        tally.widen(width := int(lengths.max()))
        kept = self.choose(seq, tally.sums[..., :width], lengths, held)
        fresh = Tally.start(seq.stored, np.array([len(slots) for slots in kept.slots]), len(self.scorer.statistics))
        seq.state[self] = fresh if self.scorer.history < UNLIMITED else tally.restricted(seq.stored, kept.slots)
        return kept

    def choose(self, seq: Sequence, sums: F64, lengths: I64, held: Held) -> Kept:
        """The decision that is due, from the statistics f64[statistics, lanes, slots] of lanes with `lengths` slots."""
        keys, kept = self.scorer.keys(sums, lengths), self.trigger.kept(seq.context)
        ranks = self.selector.ranks(keys, lengths, kept)
        return Kept(self.selector.select(ranks, self.allocator.shares(kept, keys, ranks, lengths)))


@dataclass(frozen=True)
class Budgeted(Options):
    """Hyper-parameters of policies with a budget. budget: slots of a kv head; drop: the fraction of them to evict when all are full;
    history: the number of newest rows to count; recent, sinks: the number of newest and of first tokens that are never evicted."""

    budget: int = 1024
    drop: float = number(0.5, gt=0, lt=1)
    history: int = number(400, ge=1)
    recent: int = number(10, ge=1)
    sinks: int = number(4, ge=0)

    name: ClassVar[str]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget < (least := self._least()):
            raise InvalidInput(
                f"{self.name}:budget={self.budget}: must be {least} or more, so that {self.sinks} sinks, {self.recent} recent tokens and "
                f"one more stay when {self.drop:g} of it is evicted"
            )

    def _least(self) -> int:
        """The smallest budget of which at least one slot is evicted and more than the protected slots stay."""
        protected = self.sinks + self.recent
        budget = max(1, int(protected / (1 - self.drop)) - 1, int(0.5 / self.drop) - 1)
        while round(budget * self.drop) < 1 or budget - round(budget * self.drop) <= protected:
            budget += 1
        return budget

    @property
    def trigger(self) -> Full:
        return Full(self.budget, round(self.budget * self.drop))

    @property
    def selector(self) -> Selector:
        return Selector(self.sinks, self.recent)
