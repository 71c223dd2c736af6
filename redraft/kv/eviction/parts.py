"""What policies that evict by attention are put together from.

    Trigger    when: at `budget` slots, and every `drop` tokens from there on
    Tally      what was seen of each slot since the last decision, per sequence
    Scorer     which statistics are watched, over how many rows, and how slots compare
    Selector   who is spared, and which slots a lane keeps of the number that it is given
    Allocator  how many slots each lane keeps

`Evicting` is the opened policy made of them. Arrays are [lanes, slots], lane = layer * kv heads + kv head; lanes of unequal
length are padded on the right. Slots stand in text order, so that of two the first is the older.
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
from redraft.kv.eviction.eviction import Stateless
from redraft.ops.backend import Seen
from redraft.options import Options, number


@dataclass(frozen=True)
class Trigger:
    """`drop` of `budget` slots a lane, on average, go when all are taken, which is again `drop` tokens later."""

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
    """Statistics of one sequence's slots since its last decision, at `stored` committed tokens, which left `lengths` i64[lanes]
    slots. sums: f64[statistics, lanes, slots], made when the first row counts; missing slots count as 0."""

    stored: int
    lengths: I64
    sums: F64

    @staticmethod
    def start(stored: int, lengths: I64, statistics: int) -> Tally:
        return Tally(stored, lengths, np.zeros((statistics, len(lengths), 0)))

    def now(self, stored: int) -> I64:
        """i64[lanes]: lengths at `stored` committed tokens; every lane grows by one slot a token."""
        return self.lengths + (stored - self.stored)

    def add(self, seen: Seen, ends: I64, path: Seq[int], skip: int) -> None:
        """Counts the chain rows, which end at slots `ends` i64[lanes], and the nodes `path` behind them but the first `skip`.

        A node's column lies where the step wrote it, ends + its number, and goes to where the commit moved it, ends + its place
        on the path. Columns of other nodes and padding are left out, as are the rows of other nodes.
        """
        statistics, lanes, _ = self.sums.shape
        rows = seen.chain.double() + seen.nodes[:, list(path[skip:])].double().sum(1)
        new = rows.reshape(statistics, lanes, -1).cpu().numpy()
        lane, width = np.arange(lanes), int(ends.max())
        self.widen(width + len(path))
        self.sums[..., :width] += np.where(np.arange(width) < ends[:, None], new[..., :width], 0.0)
        for place, node in enumerate(path):
            self.sums[:, lane, ends + place] += new[:, lane, ends + node]

    def widen(self, width: int) -> None:
        """Room for `width` slots a lane."""
        if (lacking := width - self.sums.shape[-1]) > 0:
            self.sums = np.pad(self.sums, ((0, 0), (0, 0), (0, max(lacking, self.sums.shape[-1]))))


class Scorer(Protocol):
    """statistics: names of what is watched (see Watch) and summed over the last `history` rows before a decision."""

    statistics: ClassVar[tuple[str, ...]]

    @property
    def history(self) -> int: ...

    def keys(self, sums: F64) -> list[F64]:
        """From sums f64[statistics, lanes, slots], numbers f64[lanes, slots] by which slots compare: the first decides, the next
        where it is equal, and of wholly equal slots the older goes. Larger stays."""
        ...


@dataclass(frozen=True)
class SeldomLow:
    """Slots that were seldom given less than an even share of attention stay; of equals, those that were given more."""

    history: int
    statistics: ClassVar[tuple[str, ...]] = ("low", "mass")

    def keys(self, sums: F64) -> list[F64]:
        low, mass = sums
        return [-low, mass]


@dataclass(frozen=True)
class Mass:
    """Slots that were given most attention stay."""

    history: int
    statistics: ClassVar[tuple[str, ...]] = ("mass",)

    def keys(self, sums: F64) -> list[F64]:
        return [sums[0]]


@dataclass(frozen=True)
class Selector:
    """The first `sinks` and the newest `recent` slots of every lane are spared, whatever their score."""

    sinks: int
    recent: int

    def ranks(self, keys: Seq[F64], lengths: I64) -> I64:
        """i64[lanes, slots]: places within the lane, 0 for what goes last: the spared, then by keys, padding behind all."""
        slots, ends = np.arange(keys[0].shape[-1]), lengths[:, None]
        spared = (slots < self.sinks) | (slots >= ends - self.recent)
        worst_first = np.lexsort((*reversed(keys), np.where(slots < ends, spared, -1)))
        return np.argsort(worst_first[:, ::-1], axis=-1)

    def select(self, ranks: I64, shares: I64) -> list[I32]:
        """The slots that each lane keeps, ascending."""
        return [np.flatnonzero(rank < share).astype(np.int32) for rank, share in zip(ranks, shares, strict=True)]


class Allocator(Protocol):
    def shares(self, kept: int, keys: Seq[F64], ranks: I64, lengths: I64) -> I64:
        """i64[lanes]: slots that each lane keeps; those of a layer sum to kv heads * kept, none above `lengths`."""
        ...


@dataclass(frozen=True)
class Even:
    """The same for all."""

    def shares(self, kept: int, keys: Seq[F64], ranks: I64, lengths: I64) -> I64:
        return np.full(len(lengths), kept)


@dataclass(frozen=True)
class Across:
    """The best `floor` slots of every head, the spared among them, then the best of what is left of all `heads` of a layer."""

    heads: int
    floor: int

    def max_slots(self, trigger: Trigger) -> int:
        """Slots of a lane at any time: all other heads of its layer are down to the floor, and `drop` tokens follow."""
        return trigger.budget + (self.heads - 1) * (trigger.kept - self.floor)

    def shares(self, kept: int, keys: Seq[F64], ranks: I64, lengths: I64) -> I64:
        width = ranks.shape[-1]
        granted = np.where(ranks < lengths[:, None], ranks < self.floor, -1)
        layers = [key.reshape(-1, self.heads * width) for key in (*reversed(keys), granted)]
        best = np.lexsort(layers)[:, -self.heads * kept :] // width  # the head of each
        return np.stack([(best == head).sum(-1) for head in range(self.heads)], -1).ravel()


class Evicting(Stateless):
    """The opened policy for `count` lanes, one a layer and kv head: what they hold differs, positions stay. State: a Tally.

    Statistics start anew with each decision, so that none looks at more rows than lie between two.
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

    def observe(self, seq: Sequence, seen: Seen | None, rows: int, path: Seq[int]) -> None:
        tally: Tally = seq.state[self]
        since = self.trigger.after(tally.stored) - self.scorer.history
        if seen is None or seq.stored <= since:
            return
        behind = seq.stored - len(path)  # the position of the path's first node
        tally.add(seen, tally.now(behind), path, min(max(0, since - behind), len(path)))

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
    """Hyper-parameters of policies with a budget. budget: slots a kv head; drop: the part of them that goes when all are taken;
    history: newest rows whose attention is looked at; recent, sinks: newest and first tokens that never go."""

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
                f"one more stay when {self.drop:g} of it goes"
            )

    def _least(self) -> int:
        """The smallest budget from which something goes and more than the spared tokens stay."""
        spared = self.sinks + self.recent
        budget = max(1, int(spared / (1 - self.drop)) - 1, int(0.5 / self.drop) - 1)
        while round(budget * self.drop) < 1 or budget - round(budget * self.drop) <= spared:
            budget += 1
        return budget

    @property
    def trigger(self) -> Trigger:
        return Trigger(self.budget, round(self.budget * self.drop))

    @property
    def selector(self) -> Selector:
        return Selector(self.sinks, self.recent)
