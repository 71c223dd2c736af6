"""A toy memory of fixed size. Its slots hold states that never change after a commit, so forks and snapshots share them."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from redraft.core.batch import StateView
from redraft.core.plan import Accepted, Work
from redraft.core.sequence import Sequence, Space
from redraft.core.spec import ModelSpec
from redraft.core.tree import I32, TokenTree
from redraft.kv.parcel import Read
from redraft.kv.table import OutOfPages
from redraft.ops.format import Arrays

ZERO = 0  # the slot with the state before the first token
FORMAT = "state"
Key = tuple[str, tuple[int, ...]]  # salt, tokens


@dataclass(eq=False)
class Held:
    """committed: the state after the stored tokens; rows, chain, scratch, borders, nodes: the tail, with the state after the chain and
    after each node, and the states at page ends within the chain; snapshots: committed states at page ends, not yet published."""

    committed: int = ZERO
    rows: int = 0
    chain: int = ZERO
    scratch: int | None = None
    borders: list[tuple[int, int]] = field(default_factory=list)
    nodes: list[int] = field(default_factory=list)
    snapshots: list[tuple[int, int]] = field(default_factory=list)

    def tail(self) -> list[int]:
        return [*self.nodes, *(slot for _, slot in self.borders), *([] if self.scratch is None else [self.scratch])]


class State:
    """A Memory (redraft.kv.memory) with `slots` states of all recurrent layers. A slot counts as blocks / slots blocks."""

    def __init__(self, spec: ModelSpec, slots: int, blocks: int, page: int = 32, sharing: bool = True) -> None:
        (group,) = [group for group in spec.memories() if group.kind == "state"]
        self.layers, self.blocks, self.slots, self.page, self.sharing = group.layers, blocks, slots, page, sharing
        self.formats = frozenset({FORMAT})
        self.pool: Tensor = torch.full((slots + 1, len(group.layers), *group.shape), torch.nan, dtype=torch.float64)
        self.pool[ZERO] = 0
        self.refs: Counter[int] = Counter()
        self.spare = list(range(slots, 0, -1))
        self.found: OrderedDict[Key, int] = OrderedDict()  # snapshots, longest unused first
        self.held: dict[int, Held] = {}

    # ---- slots

    def _take(self) -> int:
        if not self.spare:
            key = next((key for key, slot in self.found.items() if not self.refs[slot]), None)
            if key is None:
                raise OutOfPages("no state is free")
            self.spare.append(self.found.pop(key))
        slot = self.spare.pop()
        self.refs[slot] = 1
        return slot

    def _list(self, slot: int) -> int:
        self.refs[slot] += slot != ZERO
        return slot

    def _drop(self, slot: int) -> None:
        if slot == ZERO:
            return
        self.refs[slot] -= 1
        if not self.refs[slot] and slot not in self.found.values():
            self.spare.append(slot)

    def _idle(self) -> list[int]:
        return [slot for slot in self.found.values() if not self.refs[slot]]

    # ---- figures

    def _blocks(self, slots: int) -> int:
        return -(-slots * self.blocks // self.slots)

    def available(self) -> int:
        return (len(self.spare) + len(self._idle())) * self.blocks // self.slots

    def used(self) -> int:
        return self.blocks - self.available()

    def need(self, seq: Sequence, rows: int, matched: int = 0) -> int:
        drafts = max(0, rows - seq.pending) if seq.id in self.held else 0
        return self._blocks(3 + (rows - drafts) // self.page + drafts)

    def gain(self, seq: Sequence) -> int:
        held = self.held[seq.id]
        mine = Counter([held.committed, *(slot for _, slot in held.snapshots), *held.tail()])
        return sum(self.refs[slot] == count for slot, count in mine.items() if slot != ZERO) * self.blocks // self.slots

    def idle_matched(self, tokens: Seq[int], salt: str) -> int:
        n = self.match(tokens, salt)
        return self._blocks(1) if n and not self.refs[self.found[salt, tuple(tokens[:n])]] else 0

    # ---- prefixes

    def match(self, tokens: Seq[int], salt: str) -> int:
        borders = range((len(tokens) - 1) // self.page * self.page, 0, -self.page)
        return next((n for n in borders if (salt, tuple(tokens[:n])) in self.found), 0)

    def attach(self, seq: Sequence, n: int) -> None:
        if n:
            key = seq.request.salt, tuple(seq.tokens[:n])
            self.found.move_to_end(key)
            self.held[seq.id].committed = self._list(self.found[key])

    def publish(self, seq: Sequence) -> None:
        held = self.held[seq.id]
        for n, slot in held.snapshots:
            if self.sharing and n <= seq.shareable_tokens:
                self.found.setdefault((seq.request.salt, tuple(seq.tokens[:n])), slot)
            self._drop(slot)
        held.snapshots = []

    # ---- sequences

    def open(self, seq: Sequence) -> None:
        assert seq.id not in self.held
        self.held[seq.id] = Held()

    def fork(self, seq: Sequence, child: Sequence) -> None:
        assert not self.held[seq.id].rows
        self.held[child.id] = Held(self._list(self.held[seq.id].committed))

    def free(self, seq: Sequence) -> None:
        self.discard(seq)
        held = self.held.pop(seq.id)
        for slot in (held.committed, *(slot for _, slot in held.snapshots)):
            self._drop(slot)

    # ---- rows

    def reserve(self, work: Seq[Work], trees: Seq[TokenTree]) -> StateView:
        view = StateView([], [])
        for w, tree in zip(work, trees, strict=True):
            held = self.held[w.seq.id]
            reads, writes = ([], []) if held.rows else self._chain(held, w)
            for node in range(w.first, len(tree)):
                parent = int(tree.parents[node])
                reads.append(held.chain if parent < 0 else held.nodes[parent])
                held.nodes.append(self._take())
                writes.append(held.nodes[-1])
            view.reads.append(np.array(reads, np.int32))
            view.writes.append(np.array(writes, np.int32))
        return view

    def _chain(self, held: Held, w: Work) -> tuple[list[int], list[int]]:
        """Each row reads the state that the row before it wrote. Only the last state and those at page ends are kept."""
        at, writes = held.committed, []
        for n in range(w.seq.stored + 1, w.seq.stored + w.rows + 1):
            if n % self.page == 0:
                held.borders.append((n, self._take()))
                writes.append(held.borders[-1][1])
            else:
                held.scratch = self._take() if held.scratch is None else held.scratch
                writes.append(held.scratch)
        held.rows, held.chain = w.rows, writes[-1]
        return [at, *writes[:-1]], writes

    def commit(self, work: Seq[Work], accepted: Seq[Accepted]) -> None:
        """Keeps the state of the accepted row; its slot becomes the committed one."""
        for w, found in zip(work, accepted, strict=True):
            held, before = self.held[w.seq.id], self.held[w.seq.id].committed
            end = w.seq.stored + w.rows
            path = [(end + depth, held.nodes[node]) for depth, node in enumerate(found.path, 1)]
            kept = [(n, slot) for n, slot in (*held.borders, *path) if n % self.page == 0]
            held.snapshots += [(n, self._list(slot)) for n, slot in kept]
            held.committed = self._list(path[-1][1] if path else held.chain)
            self._drop(before)
            self.discard(w.seq)

    def move(self, moves: None) -> None:
        pass

    def discard(self, seq: Sequence) -> None:
        held = self.held.get(seq.id)
        if held is not None:
            for slot in held.tail():
                self._drop(slot)
            held.rows, held.chain, held.scratch, held.borders, held.nodes = 0, ZERO, None, [], []

    # ---- between engines

    def export(self, seq: Sequence) -> int:
        return self.held[seq.id].committed

    def read(self, space: Space, pages: I32) -> Arrays:
        return {"state": self.pool[pages]}

    def import_(self, seq: Sequence, stored: int, attached: int, read: Read) -> None:
        slot = self._take()
        self.pool[slot] = read(Space(format=FORMAT), np.array([stored], np.int32))["state"][0]
        self.held[seq.id] = Held(slot)

    def check(self) -> None:
        listed: Counter[int] = Counter()
        for held in self.held.values():
            listed.update([held.committed, *(slot for _, slot in held.snapshots), *held.tail()])
        del listed[ZERO]
        assert +self.refs == listed, f"references {+self.refs}, listings {listed}"
        every = sorted([*self.spare, *self._idle(), *(+self.refs)])
        assert every == list(range(1, self.slots + 1)), f"states lost or owned twice: {every}"
        assert all(a != b for a, b in pairwise(sorted(self.found.values()))), "a state is published twice"
