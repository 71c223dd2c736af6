"""The parts of policies that evict by attention.

    Trigger    when to evict: at `budget` slots, and then every `drop` tokens
    Tally      the statistics of each slot of a sequence since the last decision
    Scorer     which statistics are watched, over how many rows, and how slots compare
    Selector   which slots are protected, and which slots a lane keeps
    Allocator  how many slots each lane keeps

`Evicting` is the opened policy that combines them. Arrays are [lanes, slots], lane = layer * kv heads + kv head. Lanes of unequal
length are padded on the right. Slots are in text order, so a lower slot is older.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import numpy as np

from redraft.core.sequence import Lanes, Sequence
from redraft.core.tree import F64, I32, I64
from redraft.core.view import Watch
from redraft.errors import InvalidInput
from redraft.kv.eviction.eviction import StatelessEviction
from redraft.ops.arrays import array
from redraft.ops.backend import WeightSums
from redraft.options import Options, number


@dataclass(frozen=True)
class Trigger:
    """Evicts `drop` of `budget` slots of a lane, on average, whenever all are full, which is every `drop` tokens."""

    budget: int
    drop: int

    @property
    def kept(self) -> int:
        return self.budget - self.drop

    def after(self, stored: int) -> int:
        """The next count of committed tokens at which a decision is due."""
        return self.budget + max(0, (stored - self.budget) // self.drop + 1) * self.drop


@dataclass(eq=False)
class Tally:
    """Statistics of the slots of one sequence since its last decision. stored: committed tokens at that decision; lengths: i64[lanes],
    the slots that it kept; sums: f64[statistics, lanes, slots]. It grows with the rows that count; missing slots count as 0."""

    stored: int
    lengths: I64
    sums: F64

    @staticmethod
    def start(stored: int, lengths: I64, statistics: int) -> Tally:
        return Tally(stored, lengths, np.zeros((statistics, len(lengths), 0)))

    def now(self, stored: int) -> I64:
        """i64[lanes]: lengths at `stored` committed tokens; every lane grows by one slot a token."""
        return self.lengths + (stored - self.stored)

    def add(self, seen: WeightSums, ends: I64, path: Seq[int], skip: int) -> None:
        """Counts the chain rows, which end at slots `ends` i64[lanes], and then the nodes `path` without the first `skip`.

        The step wrote node i to slot ends + i; the commit moved it to ends + its index on the path, and its column moves likewise.
        Columns and rows of other nodes, and padding, do not count.
        """
        statistics, lanes, _ = self.sums.shape
        chain, nodes = (array(part).astype(np.float64) for part in (seen.chain, seen.nodes[:, list(path[skip:])]))
        new = (chain + nodes.sum(1)).reshape(statistics, lanes, -1)
        lane, width = np.arange(lanes), int(ends.max())
        self.widen(width + len(path))
        self.sums[..., :width] += np.where(np.arange(width) < ends[:, None], new[..., :width], 0.0)
        for place, node in enumerate(path):
            self.sums[:, lane, ends + place] += new[:, lane, ends + node]

    def widen(self, width: int) -> None:
        """Makes room for `width` slots in each lane."""
        if (lacking := width - self.sums.shape[-1]) > 0:
            self.sums = np.pad(self.sums, ((0, 0), (0, 0), (0, max(lacking, self.sums.shape[-1]))))


class Scorer(Protocol):
    """statistics: names of the statistics (see Watch) that are summed over the last `history` rows before a decision."""

    statistics: ClassVar[tuple[str, ...]]

    @property
    def history(self) -> int: ...

    def keys(self, sums: F64) -> list[F64]:
        """The keys f64[lanes, slots] by which slots compare, from sums f64[statistics, lanes, slots]. Slots with larger keys stay. The
        first key decides, the next one breaks ties, and of equal slots the older is evicted."""
        ...


@dataclass(frozen=True)
class SeldomLow:
    """Keeps the slots that seldom received less than an even share of attention; of equal slots those that received more."""

    history: int
    statistics: ClassVar[tuple[str, ...]] = ("low", "mass")

    def keys(self, sums: F64) -> list[F64]:
        low, mass = sums
        return [-low, mass]


@dataclass(frozen=True)
class Mass:
    """Keeps the slots that received most attention."""

    history: int
    statistics: ClassVar[tuple[str, ...]] = ("mass",)

    def keys(self, sums: F64) -> list[F64]:
        return [sums[0]]


@dataclass(frozen=True)
class Selector:
    """Protects the first `sinks` and the newest `recent` slots of every lane, whatever their score."""

    sinks: int
    recent: int

    def ranks(self, keys: Seq[F64], lengths: I64) -> I64:
        """i64[lanes, slots]: the rank of each slot in its lane, 0 for the slot to evict last. Protected slots come first, then slots by
        their keys, then padding."""
        slots, ends = np.arange(keys[0].shape[-1]), lengths[:, None]
        protected = (slots < self.sinks) | (slots >= ends - self.recent)
        worst_first = np.lexsort((*reversed(keys), np.where(slots < ends, protected, -1)))
        return np.argsort(worst_first[:, ::-1], axis=-1)

    def select(self, ranks: I64, shares: I64) -> list[I32]:
        """The slots that each lane keeps, ascending."""
        return [np.flatnonzero(rank < share).astype(np.int32) for rank, share in zip(ranks, shares, strict=True)]


class Allocator(Protocol):
    def shares(self, kept: int, keys: Seq[F64], ranks: I64, lengths: I64) -> I64:
        """i64[lanes]: the number of slots that each lane keeps. The sum over a layer is kv heads * kept; none exceeds `lengths`."""
        ...


@dataclass(frozen=True)
class Even:
    """Every lane keeps the same number of slots."""

    def shares(self, kept: int, keys: Seq[F64], ranks: I64, lengths: I64) -> I64:
        return np.full(len(lengths), kept)


@dataclass(frozen=True)
class Across:
    """Keeps the best `floor` slots of every head, protected ones included, and then the best other slots of all `heads` of a layer."""

    heads: int
    floor: int

    def max_slots(self, trigger: Trigger) -> int:
        """The largest number of slots of a lane: all other heads of its layer keep the floor, and `drop` tokens follow."""
        return trigger.budget + (self.heads - 1) * (trigger.kept - self.floor)

    def shares(self, kept: int, keys: Seq[F64], ranks: I64, lengths: I64) -> I64:
        width = ranks.shape[-1]
        granted = np.where(ranks < lengths[:, None], ranks < self.floor, -1)
        layers = [key.reshape(-1, self.heads * width) for key in (*reversed(keys), granted)]
        best = np.lexsort(layers)[:, -self.heads * kept :] // width  # the head of each
        return np.stack([(best == head).sum(-1) for head in range(self.heads)], -1).ravel()


class Evicting(StatelessEviction):
    """The opened policy for `count` lanes, one for each layer and kv head. Lanes hold different slots; positions do not change. Its
    state is a Tally.

    Statistics start again after each decision, so a decision uses only rows since the last one.
    """

    lanes = Lanes.PER_HEAD

    def __init__(self, count: int, max_slots: int, *, trigger: Trigger, scorer: Scorer, selector: Selector, allocator: Allocator) -> None:
        self.count, self.max_slots, self.shareable_tokens = count, max_slots, trigger.budget
        self.trigger, self.scorer, self.selector, self.allocator = trigger, scorer, selector, allocator

    def begin(self, seq: Sequence) -> Tally:
        return Tally.start(seq.stored, np.full(self.count, seq.stored), len(self.scorer.statistics))

    def fork(self, state: Tally, seq: Sequence) -> Tally:
        return replace(state, lengths=state.lengths.copy(), sums=state.sums.copy())

    def sync_point(self, seq: Sequence) -> int:
        return self.trigger.after(seq.stored)

    def watch(self, seq: Sequence) -> tuple[Watch, ...]:
        since = max(0, self.sync_point(seq) - self.scorer.history)
        return tuple(Watch(statistic, since) for statistic in self.scorer.statistics)

    def observe(self, seq: Sequence, seen: WeightSums | None, rows: int, path: Seq[int]) -> None:
        tally: Tally = seq.state[self]
        since = self.trigger.after(tally.stored) - self.scorer.history
        if seen is None or seq.stored <= since:
            return
        first = seq.stored - len(path)  # the position of the first node of the path
        tally.add(seen, tally.now(first), path, min(max(0, since - first), len(path)))

    def decide(self, seq: Sequence, positions: Callable[[], list[I32]]) -> list[I32] | None:
        tally: Tally = seq.state[self]
        if seq.stored < self.trigger.after(tally.stored):
            return None
        lengths = tally.now(seq.stored)
        tally.widen(width := int(lengths.max()))
        keys = self.scorer.keys(tally.sums[..., :width])
        ranks = self.selector.ranks(keys, lengths)
        shares = self.allocator.shares(self.trigger.kept, keys, ranks, lengths)
        seq.state[self] = Tally.start(seq.stored, shares, len(self.scorer.statistics))
        return self.selector.select(ranks, shares)


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
    def trigger(self) -> Trigger:
        return Trigger(self.budget, round(self.budget * self.drop))

    @property
    def selector(self) -> Selector:
        return Selector(self.sinks, self.recent)
