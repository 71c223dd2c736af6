"""Drives an opened policy through a real page table with artificial attention: integers that depend only on the position of the row,
the lane and the position of the slot, so sums are exact however rows are grouped into steps."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from copy import copy
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from redraft.core.plan import Accepted, Work
from redraft.core.sequence import CachePlan, Sequence
from redraft.core.testing import sequence
from redraft.core.tree import TokenTree
from redraft.kv.edits import EditableTable
from redraft.kv.slots import Held
from redraft.ops.backend import WeightSums

LAYERS, HEADS = 2, 3
LANES = LAYERS * HEADS
ROGUE = 1 << 20  # of rows and columns that must not count


class Step(NamedTuple):
    """rows: chain rows; parents: the parents of the drafted nodes; path: the accepted path."""

    rows: int
    parents: tuple[int, ...] = ()
    path: tuple[int, ...] = ()


def runner(layers: int = LAYERS, heads: int = HEADS, page: int = 32) -> Any:
    """The part of a runner that a policy may use when it is opened."""
    memory = SimpleNamespace(paged=SimpleNamespace(table=SimpleNamespace(page=page)))
    return SimpleNamespace(spec=SimpleNamespace(attention=(None,) * layers, kv_heads=heads), memory=memory)


def given(statistic: str, lane: int, row: int, slot: int) -> int:
    """The statistic of a row at one of the slots that it sees, from their positions."""
    noise = (row * 7919 + slot * 104729 + lane * 15485863 + 31) * 2654435761 >> 7
    if statistic == "low":
        return int(noise % 5 < 1 + slot % 4)  # some slots are low more often than others
    if statistic == "above":
        return int(noise % (5 + 7 * (slot % 3)) == 0)
    return noise % 4 + (3 * (slot % 3) if lane % HEADS == 1 else 0)  # one head gives more than the others


def unread(lane: int) -> Any:
    raise AssertionError("this policy reads no keys")


HELD = Held(list, unread)


class Drive:
    """One sequence under a policy. kept: committed tokens at each decision -> the positions that each lane kept; longest: the most
    slots of a lane after a commit; moved: the number of slots that decisions copied."""

    def __init__(self, policy: Any, *, page: int = 32, table: EditableTable | None = None, ident: int = 1, context: int = 1) -> None:
        self.policy, self.context = policy, context
        self.table = table or EditableTable(2000, LAYERS, HEADS, page=page)
        self.seq = self._sequence(ident)
        self.table.open(self.seq)
        self.seq.state[policy] = policy.begin(self.seq)
        self.kept: dict[int, list[list[int]]] = {}
        self.longest = self.moved = 0

    def _sequence(self, ident: int) -> Sequence:
        seq = sequence([0])
        seq.id, seq.cache, seq.prompt_len = ident, CachePlan(lanes=self.policy.lanes), self.context
        seq.onset = self.policy.onset(self.context)
        return seq

    def fork(self, ident: int) -> Drive:
        other = copy(self)
        other.kept, other.seq = dict(self.kept), self._sequence(ident)
        self.table.fork(self.seq, other.seq)
        other.seq.state[self.policy] = self.policy.fork(self.seq.state[self.policy], other.seq)
        return other

    def positions(self) -> list[list[int]]:
        return [lane.tolist() for lane in self.table.positions(self.seq)]

    def run(self, steps: Iterable[Step], salt: int = 0) -> Drive:
        """salt: selects other attention, like that of another text."""
        for step in steps:
            self.step(step, salt)
        return self

    def step(self, step: Step, salt: int = 0) -> None:
        """Reserves, commits, observes and decides like the engine."""
        seq, policy, nodes = self.seq, self.policy, len(step.parents)
        assert step.rows + len(step.path) <= policy.sync_point(seq) - seq.stored, "a step crosses a sync point"
        seen = made_up(watches, self.positions(), seq.stored, step, salt) if (watches := policy.watch(seq)) else None
        seq.tokens = [0] * (seq.stored + step.rows)
        work = Work(seq, step.rows)
        tree = TokenTree(np.zeros(nodes, np.int32), np.array(step.parents, np.int32), np.zeros(nodes + 1, np.uint8))
        self.table.reserve([work], [tree])
        self.table.commit([work], [Accepted(step.path, (0,) * (len(step.path) + 1))])
        self.longest = max(self.longest, *map(len, self.positions()))
        policy.observe(seq, seen, step.rows, step.path)
        if self.decide():
            self.kept[seq.stored] = self.positions()
        assert not self.decide(), "two decisions at one count"
        self.table.check()

    def decide(self) -> bool:
        kept = self.policy.decide(self.seq, Held(lambda: self.table.positions(self.seq), unread))
        if kept is not None:
            self.moved += sum(len(moves.src) for moves in self.table.keep(self.seq, kept.slots))
        return kept is not None


def made_up(watches: Any, before: list[list[int]], stored: int, step: Step, salt: int = 0) -> WeightSums:
    """The WeightSums of rows and nodes after lanes with the positions `before`. Slots that no row sees, rejected rows and padding hold
    wrong numbers. Columns of nodes in chain rows hold 0, because they are summed and a chain row gives a node no attention."""
    if len(before) == LAYERS:  # lanes of whole layers: attention is by head
        before = [lane for lane in before for _ in range(HEADS)]
    rows, nodes, longest = step.rows, len(step.parents), max(map(len, before))
    width = longest + rows + nodes
    depth: list[int] = []
    above: list[list[int]] = []  # ancestors of each node, itself included
    for parent in step.parents:
        depth.append(0 if parent < 0 else depth[parent] + 1)
        above.append([*(above[parent] if parent >= 0 else ()), len(above)])
    chain = np.full((len(watches), len(before), width), ROGUE, float)
    each = np.full((len(watches), rows, len(before), width), ROGUE, float)
    tree = np.full((len(watches), nodes, len(before), width), ROGUE, float)
    for w, watch in enumerate(watches):
        statistic, since = watch.statistic, watch.since
        for lane, held in enumerate(before):
            end = len(held) + rows
            at = [*held, *range(stored, stored + rows)]
            counted = [r for r in range(rows) if stored + r >= since]
            for j, slot in enumerate(at):
                own = {r: given(statistic, lane, stored + r, slot + salt) for r in counted if slot <= stored + r}
                each[w, :, lane, j] = [own.get(r, 0) for r in range(rows)]
                chain[w, lane, j] = sum(own.values())
            chain[w, lane, end : end + nodes] = 0
            for k in step.path:
                row = stored + rows + depth[k]
                tree[w, k, lane, :end] = [given(statistic, lane, row, slot + salt) for slot in at]
                tree[w, k, lane, [end + j for j in step.path]] = 0
                for j in above[k]:
                    tree[w, k, lane, end + j] = given(statistic, lane, row, stored + rows + depth[j] + salt)
    shape = (len(watches), LAYERS, HEADS, width) if len(before) == LANES else (len(watches), 1, len(before), width)
    folded = (len(watches), nodes, *shape[1:])
    if any(watch.each for watch in watches):
        return WeightSums(each.reshape(len(watches), rows, *shape[1:]), tree.reshape(folded))
    return WeightSums(chain.reshape(shape), tree.reshape(folded))


def one_by_one(length: int) -> Iterator[Step]:
    return (Step(1) for _ in range(length))


def grouped(policy: Any, length: int, seed: int, drafting: bool, context: int = 1) -> Iterator[Step]:
    """Steps of random sizes up to `length` committed tokens that cross no sync point, with random trees and paths or chunks only."""
    random_, stored = random.Random(seed), 0
    while stored < length:
        room = min(policy.sync_point(SimpleNamespace(stored=stored, context=context)), length) - stored
        if drafting:
            parents = tuple(random_.randint(-1, i - 1) for i in range(random_.randint(0, 7)))
            path: list[int] = []
            children = [i for i, parent in enumerate(parents) if parent == -1]
            while children and len(path) < room - 1 and random_.random() < 0.8:
                path.append(random_.choice(children))
                children = [i for i, parent in enumerate(parents) if parent == path[-1]]
            step = Step(1, parents, tuple(path))
        else:
            step = Step(random_.randint(1, min(room, 40)))
        stored += step.rows + len(step.path)
        yield step
