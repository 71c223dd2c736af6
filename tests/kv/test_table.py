"""The page table against a model of the expected content of every place in the pool."""

from __future__ import annotations

import random
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from redraft.core.batch import PageView
from redraft.core.plan import Accepted, Work
from redraft.core.sequence import CachePlan, Lanes, Sequence, Space
from redraft.core.testing import sequence
from redraft.core.tree import EMPTY, TokenTree
from redraft.kv.edits import EditableTable
from redraft.kv.slots import Merged
from redraft.kv.table import Moves, OutOfPages

LAYERS, HEADS = 2, 3
real = SimpleNamespace(EditableTable=EditableTable, OutOfPages=OutOfPages)
LANES = {Lanes.SHARED: 1, Lanes.PER_LAYER: LAYERS, Lanes.PER_HEAD: LAYERS * HEADS}


def make(ident: int, tokens: Iterable[int], kind: Lanes = Lanes.SHARED, salt: str = "") -> Sequence:
    seq = sequence(tokens)
    seq.id, seq.cache, seq.request.salt = ident, CachePlan(lanes=kind), salt
    return seq


def run(table: EditableTable, seq: Sequence, rows: int | None = None) -> PageView:
    """Stores `rows` pending tokens, None for all. The sequence draws token 0 if the last pending token runs."""
    work = Work(seq, seq.pending if rows is None else rows)
    view = table.reserve([work], [EMPTY])
    assert table.commit([work], [Accepted((), (0,) if work.done else ())]) == []
    table.publish(seq)
    table.check()
    return view


def admit(table: EditableTable, seq: Sequence, rows: int | None = None) -> PageView | None:
    """Opens the sequence, attaches its matching prefix and runs the rest."""
    table.open(seq)
    table.attach(seq, table.match(seq.tokens, seq.request.salt))
    return run(table, seq, rows) if rows != 0 else None


def listed(table: EditableTable, seq: Sequence) -> list[int]:
    """The pages of the first lane, as a page view reports them."""
    pages: list[int] = table.reserve([Work(seq, 1)], [EMPTY]).pages[0][0].tolist()
    table.discard(seq)
    return pages


def pairs(moves: Moves) -> list[tuple[int, int]]:
    return list(zip(moves.src.tolist(), moves.dst.tolist(), strict=True))


# ---- single operations


def test_the_drawn_example() -> None:
    table = EditableTable(8, LAYERS, HEADS)
    seq = make(1, range(65))
    table.open(seq)
    run(table, seq, 64)
    work, tree = Work(seq, 1), TokenTree.chain([90, 91, 92, 93, 94])
    view = table.reserve([work], [tree])
    last = view.pages[0][0, 2]
    assert view.lengths[0].tolist() == [64] and view.tail == [0] and view.chain == [1] and view.positions == [None]
    assert view.fresh == [(Space(), last)]
    (moves,) = table.commit([work], [Accepted((1, 4), (91, 94, 7))])
    assert moves.space == Space() and pairs(moves) == [(last * 32 + 2, last * 32 + 1), (last * 32 + 5, last * 32 + 2)]
    assert seq.stored == 67 and seq.tokens == [*range(65), 91, 94, 7]
    table.check()


def test_pages_behind_the_path_are_freed_and_moves_cross_pages() -> None:
    table = EditableTable(8, LAYERS, HEADS, page=4)
    own = Space(Lanes.PER_LAYER, "int8")
    table.define(own, LAYERS)
    seqs = [make(1, range(4)), make(2, range(6))]
    seqs[1].cache = CachePlan(lanes=own.lanes, format=own.format)
    for seq in seqs:
        table.open(seq)
    works = [Work(seq, seq.pending) for seq in seqs]
    trees = [TokenTree.chain(range(6)), TokenTree.chain(range(2))]
    view = table.reserve(works, trees)
    moves = table.commit(works, [Accepted((5,), (5, 9)), Accepted((1,), (1, 9))])
    assert [m.space for m in moves] == [Space(), own]
    assert pairs(moves[0]) == [(view.pages[0][0, 2] * 4 + 1, view.pages[0][0, 1] * 4)]
    assert pairs(moves[1]) == [(p * 4 + 3, p * 4 + 2) for p in view.pages[1][:, 1].tolist()]
    assert table.used() == 2 + 2 and table.peak == 3 + 2
    table.reset_peak()
    assert table.peak == 4


def test_a_growing_tail_packs_its_chain_once() -> None:
    table = EditableTable(8, LAYERS, HEADS, page=4)
    seq = make(1, range(3))
    table.open(seq)
    tree = TokenTree.chain(range(5))
    first = table.reserve([Work(seq, 3)], [TokenTree.chain(range(2))])
    second = table.reserve([Work(seq, 3, first=2)], [tree])
    assert (first.tail, first.chain, second.tail, second.chain) == ([0], [3], [5], [3])
    assert second.lengths[0].tolist() == [0] and second.pages[0].shape == (1, 2) and second.fresh == []
    with pytest.raises(AssertionError, match="tail of 5 nodes, first 0"):
        table.reserve([Work(seq, 3)], [tree])
    table.discard(seq)
    assert table.reserve([Work(seq, 3)], [EMPTY]).tail == [0]
    behind = table.reserve([Work(seq, 3)], [tree])  # a chain alone is a tail too
    assert (behind.tail, behind.chain) == ([3], [3])
    with pytest.raises(AssertionError, match="a tail of 3 chain rows continues with 2"):
        table.reserve([Work(seq, 2, first=5)], [tree])
    table.check()


def test_reserve_is_all_or_nothing() -> None:
    table = EditableTable(3, LAYERS, HEADS, page=4)
    kept, small, large = make(0, range(5)), make(1, range(4)), make(2, range(5), Lanes.PER_HEAD)
    admit(table, kept, 4)
    table.free(kept)  # leaves an idle page, which a failing call must not evict either
    for seq in (small, large):
        table.open(seq)
    before = snapshot(table)
    with pytest.raises(OutOfPages, match="4 blocks needed, 3 of 3 available"):
        table.reserve([Work(small, 4), Work(large, 5)], [TokenTree.chain(range(4)), EMPTY])
    assert snapshot(table) == before
    table.check()
    table.reserve([Work(small, 4), Work(large, 5)], [EMPTY, EMPTY])
    table.check()
    assert table.available() == 0


def test_forget_lets_go_of_what_nobody_lists() -> None:
    table = EditableTable(8, LAYERS, HEADS, page=4)
    gone, stays = make(1, range(9)), make(2, [*range(4), *range(50, 55)])
    admit(table, gone)
    table.free(gone)
    admit(table, stays)
    assert (table.match(range(9), ""), len(table.prefix.idle)) == (8, 1)
    assert table.forget() == 1
    assert (table.match(range(9), ""), table.match(stays.tokens, "")) == (4, 8), "what is in use is shared on"
    table.check()
    table.free(stays)
    assert table.forget() == 2 and table.match(stays.tokens, "") == 0 and table.used() == 0
    admit(table, make(3, range(9)))
    table.check()


def test_match_leaves_one_token_and_changes_nothing() -> None:
    table = EditableTable(8, LAYERS, HEADS, page=4)
    seq = make(1, range(8))
    admit(table, seq)
    before = snapshot(table)
    assert [table.match(range(n), "") for n in (0, 4, 5, 8, 9, 12)] == [0, 0, 4, 4, 8, 8]
    assert table.match([0, 1, 2, 9, 4], "") == 0 and table.match(range(9), "tenant") == 0
    assert snapshot(table) == before
    other = make(2, range(9))
    table.open(other)
    with pytest.raises(AssertionError, match="12 tokens to attach, 2 pages match"):
        table.attach(other, 12)


def test_sharing_lists_the_same_pages_and_can_be_switched_off() -> None:
    table = EditableTable(8, LAYERS, HEADS, page=4)
    a, b, c = make(1, range(10)), make(2, [*range(8), 50]), make(3, range(10), salt="tenant")
    for seq in (a, b, c):
        admit(table, seq)
    assert listed(table, b)[:2] == listed(table, a)[:2] and listed(table, b)[2] != listed(table, a)[2]
    assert not set(listed(table, c)) & set(listed(table, a))
    assert table.used() == 4 + 3
    assert table.shared() == 2
    table.free(b)
    assert table.shared() == 0
    off = EditableTable(8, LAYERS, HEADS, page=4, sharing=False)
    admit(off, make(1, range(10)))
    assert off.match(range(10), "") == 0 and off.idle_matched(range(10), "") == 0


def test_equal_pages_made_at_the_same_time_stay_private() -> None:
    table = EditableTable(8, LAYERS, HEADS, page=4)
    a, b, c = make(1, range(5)), make(2, [*range(4), 60, 61, 62, 63, 64]), make(3, [*range(4), 60, 61, 62, 63, 65])
    for seq in (a, b):
        table.open(seq)
    run(table, a)
    run(table, b)
    pages = {seq.id: listed(table, seq) for seq in (a, b)}
    assert pages[1][0] != pages[2][0]
    admit(table, c)  # finds the second page of b under the first page of a
    assert listed(table, c)[:2] == [pages[1][0], pages[2][1]]
    table.free(c)
    table.free(a)
    assert list(table.prefix.idle) == [pages[1][0]] and table.available() == 8 - 3
    big = make(4, range(100, 120))
    admit(table, big)  # needs all that is available: a's page goes, b's second page is private now
    table.check()
    assert table.available() == 0 and table.match(c.tokens, "") == 0
    table.free(big)
    b.tokens += range(70, 73)
    run(table, b)  # another page became full: b publishes from the start, as the equal page is gone
    assert table.match(c.tokens, "") == 8 and listed(table, b)[:2] == pages[2][:2]


def test_idle_pages_count_as_available_except_the_matched() -> None:
    table = EditableTable(4, LAYERS, HEADS, page=4)
    a = make(1, range(9))
    admit(table, a)
    assert table.available() == 1 and table.idle_matched(range(9), "") == 0
    table.free(a)
    assert table.available() == 4 and table.used() == 0 and table.idle_matched(range(9), "") == 2
    b = make(2, range(9))
    assert table.need(b, 9) == 3 and table.need(b, 9, matched=8) == 1
    table.open(b)
    table.attach(b, 8)
    assert b.stored == 8 and table.available() == 2
    table.check()


def test_least_recently_listed_leaf_goes_first() -> None:
    table = EditableTable(4, LAYERS, HEADS, page=4)
    old, new = make(1, range(9)), make(2, range(50, 55))
    for seq in (old, new):
        admit(table, seq, 8 if seq is old else 4)
        table.free(seq)
    again = make(3, range(5))
    admit(table, again, 0)
    table.free(again)  # the first page of `old` was used again, its second was not
    survivors = []
    filler = make(4, range(200, 220))
    table.open(filler)
    for _ in range(4):
        run(table, filler, 4)
        survivors.append((table.match(range(9), ""), table.match(range(50, 55), "")))
    assert survivors == [(8, 4), (4, 4), (4, 0), (0, 0)]


def test_a_prefix_is_evicted_from_its_end() -> None:
    table = EditableTable(3, LAYERS, HEADS, page=4)
    old, filler = make(1, range(12)), make(2, range(50, 62))
    admit(table, old)
    table.free(old)
    table.open(filler)
    left = []
    for _ in range(3):
        run(table, filler, 4)
        left.append(table.match(range(13), ""))
    assert left == [8, 4, 0]


def test_fork_copies_the_partial_page_only() -> None:
    table = EditableTable(8, LAYERS, HEADS, page=4)
    seq, child = make(1, range(10)), make(2, [*range(10), 0])
    admit(table, seq)
    mine = listed(table, seq)
    moves = table.fork(seq, child)
    table.check()
    theirs = listed(table, child)
    assert child.stored == seq.stored == 10 and theirs[:2] == mine[:2] and theirs[2] != mine[2]
    assert pairs(moves) == [(mine[2] * 4 + i, theirs[2] * 4 + i) for i in range(4)]
    even = make(3, range(50, 59))
    admit(table, even, 8)
    assert pairs(table.fork(even, make(4, range(50, 59)))) == []


def test_keep_writes_no_shared_page_and_keeps_positions() -> None:
    table = EditableTable(8, LAYERS, HEADS, page=4)
    seq = make(1, range(12))
    admit(table, seq, 8)
    old = listed(table, seq)[:2]
    (moves,) = table.keep(seq, [[0, 1, 2, 3, 5, 7]])
    table.check()
    view = table.reserve([Work(seq, 4)], [EMPTY])
    new = view.pages[0][0].tolist()
    assert new[0] == old[0] and new[1] not in old and view.lengths[0].tolist() == [6]
    kept = [(old[1] * 4 + 1, new[1] * 4), (old[1] * 4 + 3, new[1] * 4 + 1)]
    assert pairs(moves) == [*kept, (old[1] * 4 + 3, new[1] * 4 + 2), (old[1] * 4 + 3, new[1] * 4 + 3)]  # a fresh page is filled
    assert view.positions[0] is not None and view.positions[0][0].tolist() == [0, 1, 2, 3, 5, 7]
    table.commit([Work(seq, 4)], [Accepted((), (9,))])
    table.publish(seq)
    table.check()
    assert table.match([*range(12), 9], "") == 8  # what was published before, nothing since
    after = table.reserve([Work(seq, 1)], [EMPTY]).positions[0]
    assert after is not None and after[0].tolist() == [0, 1, 2, 3, 5, 7, 8, 9, 10, 11]


def test_keep_takes_back_what_it_published_where_memory_lacks() -> None:
    table = EditableTable(4, LAYERS, HEADS, page=4)
    seq, other = make(1, range(12)), make(2, range(50, 55))
    admit(table, seq)
    mine = listed(table, seq)[:3]
    admit(table, other, 4)  # the pool is full, of listed and published pages
    (moves,) = table.keep(seq, [[0, 1, 2, 3, 5, 7, 9]])
    table.check()
    assert pairs(moves) == [(mine[1] * 4 + 1, mine[2] * 4), (mine[1] * 4 + 3, mine[2] * 4 + 1), (mine[2] * 4 + 1, mine[2] * 4 + 2)]
    assert table.match(range(13), "") == 8 and table.available() == 1  # the second page is idle
    child = make(3, range(13))
    table.fork(seq, child)  # takes it
    assert table.available() == 0 and table.match(range(13), "") == 4
    with pytest.raises(OutOfPages, match="1 blocks needed, 0 of 4"):
        table.keep(seq, [[1, 2, 3, 4, 5]])  # two pages to write, one is its own alone


def test_lanes_of_one_sequence_differ_after_keep() -> None:
    table = EditableTable(8, LAYERS, HEADS, page=4)
    seq = make(1, range(9), Lanes.PER_LAYER)
    admit(table, seq, 8)
    used = table.used()
    table.keep(seq, [[1, 6], []])
    table.check()
    view = table.reserve([Work(seq, 1)], [EMPTY])
    assert view.lengths[0].tolist() == [2, 0] and view.pages[0].shape == (2, 1) and table.used() == used - 1
    assert view.positions[0] is not None and [p.tolist() for p in view.positions[0]] == [[1, 6], []]


def test_discard_is_harmless_and_a_second_free_is_not() -> None:
    table = EditableTable(4, LAYERS, HEADS, page=4)
    seq = make(1, range(9))
    table.discard(seq)
    table.open(seq)
    table.reserve([Work(seq, 9)], [TokenTree.chain(range(3))])
    table.discard(seq)
    table.discard(seq)
    table.check()
    assert table.available() == 4
    table.free(seq)
    with pytest.raises(AssertionError, match="not open"):
        table.free(seq)


@pytest.mark.parametrize("fault", ["listing", "reference", "block", "spare", "idle", "stored"])
def test_check_sees(fault: str) -> None:
    table = EditableTable(6, LAYERS, HEADS, page=4)
    seq, head, gone = make(1, range(6)), make(2, range(3), Lanes.PER_LAYER), make(3, range(50, 55))
    for each in (seq, head, gone):
        admit(table, each)
    table.keep(head, [[], [1]])  # the page of one lane is free, the block is not
    table.free(gone)
    table.check()
    held = table._held[1]
    match fault:
        case "listing":
            held.lanes[0].pages.append(5)
        case "reference":
            held.pool.refs[held.lanes[0].pages[0]] += 1
        case "block":
            table._free.pop()
        case "spare":
            table._pools[Space(Lanes.PER_LAYER)].spare.clear()
        case "idle":
            table.prefix.idle.clear()
        case "stored":
            seq.stored -= 1
    with pytest.raises(AssertionError):
        table.check()


# ---- random programs

PAGE, BLOCKS, MAX_TOKENS = 4, 24, 48
CELLS = 60  # of a block, shared out among its pages
POISON = -1  # what an unlisted page may hold; it must never show in a page that somebody lists
ZERO = 0


def state(lane: Any) -> object:
    positions = None if lane.positions is None else lane.positions[: lane.length].tolist()
    return list(lane.pages), list(lane.encoded), lane.length, lane.demoted, lane.summarized, positions


def snapshot(table: EditableTable) -> object:
    """The state that a failing operation must not change."""
    held = [(i, h.seq.shareable_tokens, h.chain, h.nodes, h.published, [state(lane) for lane in h.lanes]) for i, h in table._held.items()]
    pools = [(dict(p.refs), {s: list(f) for s, f in p.spare.items()}, p.spares) for p in table._pools.values()]
    nodes = {page: (node.key, sorted(c.page for c in node.children.values())) for page, node in table.prefix.nodes.items()}
    return held, pools, list(table._free), nodes, list(table.prefix.idle), table.peak


class Program(RuleBasedStateMachine):
    """Admissions, steps over batches with random trees, forks, evictions, preemptions and discards on a small pool.

    Every place of every cell holds a number that stands for the key there. It is a function of (taint, salt, the tokens up to and
    including its own). The taint is set after an eviction and after `shareable_tokens`, because keys then depend on more than tokens.
    """

    module: Any = real  # the table under test

    @initialize(seed=st.integers(0, 2**32 - 1))
    def start(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.table = self.module.EditableTable(BLOCKS, LAYERS, HEADS, page=PAGE)
        self.memory = np.full((BLOCKS * CELLS, PAGE), POISON, np.int64)
        self.numbers: dict[object, int] = {}
        self.seqs: dict[int, Sequence] = {}
        self.expected: dict[int, list[list[int]]] = {}  # what each committed slot of each lane holds
        self.positions: dict[int, list[list[int]]] = {}
        self.demoted: dict[int, list[int]] = {}  # leading slots of each lane
        self.taint: dict[int, object] = {}
        self.count = 0
        self.prompts = [[self.random.randrange(3) for _ in range(30)] for _ in range(2)]
        self.define()

    def define(self) -> None:
        """Defines further spaces."""

    # -- the model

    def number(self, seq: Sequence, prefix: Seq[int]) -> int:
        taint = self.taint[seq.id] if len(prefix) <= seq.shareable_tokens else (seq.id, self.taint[seq.id])
        return self.value(taint, seq.request.salt, tuple(prefix))

    def value(self, *key: object) -> int:
        return self.numbers.setdefault(key, len(self.numbers) + 1)

    def cells(self, space: Space, page: int) -> slice:
        """The cells of a page. Pages of different spaces overlap in memory if they were cut from the same block."""
        block, i = divmod(page, self.table._pools[space].per_block)
        size = CELLS // self.table._pools[space].per_block
        return slice(block * CELLS + i * size, block * CELLS + (i + 1) * size)

    def move(self, moves: Moves) -> None:
        got = [self.memory[self.cells(moves.space, s // PAGE), s % PAGE].copy() for s in moves.src.tolist()]
        assert len(set(moves.dst.tolist())) == len(moves.dst) and not np.any(moves.src == moves.dst)
        for d, values in zip(moves.dst.tolist(), got, strict=True):
            self.memory[self.cells(moves.space, d // PAGE), d % PAGE] = [self.turned(v, moves.delta) for v in values.tolist()]

    def turned(self, value: int, delta: int) -> int:
        return self.value("turned", value, delta) if delta and value > 0 else value

    def encoded(self, value: int) -> int:
        return self.value("encoded", value)

    def forget(self) -> None:
        """Poisons the cells that no sequence and no published page owns."""
        owned = np.zeros(BLOCKS * CELLS, bool)
        for seq in self.seqs.values():
            for pool, pages in self.table._held[seq.id].listed():
                for page in pages:
                    owned[self.cells(pool.space, page)] = True
        for page in self.table.prefix.nodes:
            owned[self.cells(Space(), page)] = True
        self.memory[~owned] = POISON

    def pick(self) -> Sequence:
        return self.random.choice(list(self.seqs.values()))

    def born(self, seq: Sequence, taint: object = None) -> None:
        self.seqs[seq.id] = seq
        self.taint[seq.id] = taint
        lanes = len(self.table._held[seq.id].lanes)
        self.expected[seq.id] = [[self.number(seq, seq.tokens[: i + 1]) for i in range(seq.stored)] for _ in range(lanes)]
        self.positions[seq.id] = [list(range(seq.stored)) for _ in range(lanes)]
        self.demoted[seq.id] = [0] * lanes

    def enter(self, seq: Sequence) -> None:
        """Opens the sequence, and attaches its prefix if all of its tokens fit by the figures that the scheduler uses."""
        table, salt = self.table, seq.request.salt
        tokens = seq.tokens[: seq.shareable_tokens + 1]
        n = table.match(tokens, salt) if seq.cache.shares else 0
        idle = table.idle_matched(tokens, salt) if n else 0
        assert n < len(seq.tokens) and n % PAGE == 0
        fits = table.need(seq, len(seq.tokens), matched=n) <= table.available() - idle
        before = table.available()
        table.open(seq)
        if fits:
            table.attach(seq, n)
            assert table.available() == before - idle
            assert seq.stored == n
            assert table.need(seq, seq.pending) <= table.available()
        self.born(seq)

    def leave(self, seq: Sequence) -> None:
        promised = self.table.available() + self.table.gain(seq)
        self.table.free(seq)
        assert self.table.available() == promised
        del self.seqs[seq.id]

    # -- the rules

    @precondition(lambda self: len(self.seqs) < 6)
    @rule(salt=st.sampled_from(["", "", "tenant"]))
    def admit(self, salt: str) -> None:
        r = self.random
        tokens = r.choice(self.prompts)[: r.randrange(30)] + [r.randrange(3) for _ in range(r.randint(1, 5))]
        self.count += 1
        self.enter(self.fit(make(self.count, tokens, salt=salt)))

    def fit(self, seq: Sequence) -> Sequence:
        seq.cache = CachePlan(lanes=self.random.choice([Lanes.SHARED, *Lanes]))
        return seq

    def tree(self, done: bool) -> TokenTree:
        r = self.random
        n = r.choice([0, r.randrange(3), r.randrange(12)]) if done else 0
        parents = [r.randrange(-1, i) for i in range(n)]
        return TokenTree(np.array([r.randrange(3) for _ in range(n)], np.int32), np.array(parents, np.int32), np.zeros(n + 1, np.uint8))

    def forward(self, works: list[Work], trees: list[TokenTree]) -> bool:
        """Reserves, zeroes and writes. Returns False if the pool is too small; then nothing may have changed."""
        table = self.table
        growth = [(0 if w.first else w.rows, len(t) - w.first) for w, t in zip(works, trees, strict=True)]
        promised = sum(table.need(w.seq, sum(g)) for w, g in zip(works, growth, strict=True)) <= table.available()
        before = snapshot(table)
        tails = [table._held[w.seq.id].chain + table._held[w.seq.id].nodes for w in works]
        try:
            view = table.reserve(works, trees)
        except self.module.OutOfPages:
            assert not promised, "need() <= available(), yet reserve failed"
            assert snapshot(table) == before, "a failing reserve changed something"
            return False
        assert view.tail == tails and view.chain == [w.rows for w in works] and view.kinds == [self.space(w.seq).lanes for w in works]
        assert len(set(view.fresh)) == len(view.fresh)
        for space, page in view.fresh:
            self.memory[self.cells(space, page)] = ZERO
        for s, (w, tree) in enumerate(zip(works, trees, strict=True)):
            seq, (chain, nodes) = w.seq, growth[s]
            values = [self.number(seq, seq.tokens[: seq.stored + i + 1]) for i in range(chain)]
            values += [self.number(seq, self.path_prefix(w, tree, j)) for j in range(w.first, w.first + nodes)]
            assert view.lengths[s].tolist() == [len(lane) for lane in self.expected[seq.id]]
            positions = view.positions[s]
            if positions is None:
                assert self.positions[seq.id] == [list(range(seq.stored))] * LANES[self.space(seq).lanes]
            else:
                assert [p.tolist() for p in positions] == self.positions[seq.id]
            for lane, length in enumerate(view.lengths[s].tolist()):
                for r, value in enumerate(values):
                    slot = length + view.tail[s] + r - view.encoded[s].shape[1] * PAGE
                    self.memory[self.cells(self.space(seq), view.pages[s][lane, slot // PAGE]), slot % PAGE] = value
        return True

    def space(self, seq: Sequence) -> Space:
        """Of the unencoded pages: that of shared pages until a text with lanes of its own first evicts."""
        space: Space = self.table._held[seq.id].pool.space
        assert space == Space(seq.cache.lanes, seq.cache.format) or (space == Space() and seq.cache.splits)
        return space

    def path_prefix(self, w: Work, tree: TokenTree, node: int) -> list[int]:
        return [*w.seq.tokens[: w.seq.stored + w.rows], *tree.tokens[tree.path_to(node)].tolist()]

    @precondition(lambda self: self.seqs)
    @rule(steps=st.lists(st.tuples(st.booleans(), st.integers(0, 7)), min_size=1, max_size=4))
    def run(self, steps: list[tuple[bool, int]]) -> None:
        for twice, fail in steps:
            self.step(twice, fail)
            self.everything_lies_where_it_should()

    def step(self, twice: bool, fail: int) -> None:
        r = self.random
        ready = [s for s in self.seqs.values() if len(s.tokens) < MAX_TOKENS and s.pending]
        works = [Work(s, r.choice([s.pending, r.randint(1, s.pending)])) for s in r.sample(ready, r.randint(0, len(ready)))]
        trees = [self.tree(w.done) for w in works]
        if twice:  # the first levels in one forward, the rest in a second one
            cuts = [r.randint(0, len(t)) for t in trees]
            heads = [TokenTree(t.tokens[:c], t.parents[:c], t.kinds[: c + 1]) for t, c in zip(trees, cuts, strict=True)]
            if not self.forward(works, heads):
                return
            grown = [i for i, c in enumerate(cuts) if c]
            if not self.forward([Work(works[i].seq, works[i].rows, cuts[i]) for i in grown], [trees[i] for i in grown]):
                fail = 0  # the engine discards a tail that it cannot finish
            trees = [t if c else h for t, h, c in zip(trees, heads, cuts, strict=True)]
            works = [Work(w.seq, w.rows, c) for w, c in zip(works, cuts, strict=True)]
        elif not self.forward(works, trees):
            return
        self.table.check()
        if fail == 0:
            for w in works:
                self.table.discard(w.seq)
            return
        accepted = [self.accept(w, t) for w, t in zip(works, trees, strict=True)]
        before = [(w.seq, w.seq.stored, list(w.seq.tokens)) for w in works]
        moves = self.table.commit(works, accepted)
        assert len({m.space for m in moves}) == len(moves) and all(len(m.src) for m in moves)
        for m in moves:
            self.move(m)
        for w, a, (seq, stored, tokens) in zip(works, accepted, before, strict=True):
            assert seq.stored == stored + w.rows + len(a.path) and seq.tokens == [*tokens, *a.tokens]
            for lane, positions in zip(self.expected[seq.id], self.positions[seq.id], strict=True):
                lane += [self.number(seq, seq.tokens[: i + 1]) for i in range(stored, seq.stored)]
                positions += range(stored, seq.stored)
            self.table.publish(seq)

    def accept(self, w: Work, tree: TokenTree) -> Accepted:
        if not w.done:
            return Accepted()
        path: list[int] = []
        while self.random.random() < 0.8:
            children = np.flatnonzero(tree.parents == (path[-1] if path else -1)).tolist()
            if not children:
                break
            path.append(self.random.choice(children))
        return Accepted(tuple(path), (*tree.tokens[path].tolist(), self.random.randrange(3)))

    @precondition(lambda self: 0 < len(self.seqs) < 6)
    @rule()
    def fork(self) -> None:
        seq = self.pick()
        self.count += 1
        child = make(self.count, seq.tokens, seq.cache.lanes, seq.request.salt)
        child.cache = seq.cache
        before = snapshot(self.table)
        fits = self.table.available() >= -(-len(self.expected[seq.id]) // self.table._held[seq.id].pool.per_block)
        try:
            moves = self.table.fork(seq, child)
        except self.module.OutOfPages:
            assert not fits and snapshot(self.table) == before
            return
        self.move(moves)
        self.seqs[child.id] = child
        self.taint[child.id] = self.taint[seq.id]
        self.expected[child.id] = [list(lane) for lane in self.expected[seq.id]]
        self.positions[child.id] = [list(lane) for lane in self.positions[seq.id]]
        self.demoted[child.id] = list(self.demoted[seq.id])
        assert child.stored == seq.stored

    @precondition(lambda self: self.seqs)
    @rule()
    def keep(self) -> None:
        r, seq = self.random, self.pick()
        if seq.cache.demotes or any(lane.encoded for lane in self.table._held[seq.id].lanes):
            return
        if seq.cache.splits and self.space(seq) == Space():
            self.split(seq)
            return
        lane = r.randrange(len(self.expected[seq.id]))
        values, positions, held = self.expected[seq.id][lane], self.positions[seq.id][lane], self.table._held[seq.id]
        n, old = len(values), list(held.lanes[lane].pages)
        whole = r.random() < 0.3  # pages, and the end of the lane
        if whole:
            blocks = [range(i, min(i + PAGE, n)) for i in range(0, n, PAGE)]
            slots = [slot for block in blocks if r.random() < 0.6 for slot in block]
        else:
            slots = sorted(r.sample(range(n), r.randint(0, n))) if r.random() < 0.7 else list(range(r.randint(0, n)))
        before, others = snapshot(self.table), sum(held.pool.refs[page] > 1 for page in old)
        kept = [slots if i == lane else list(range(len(one))) for i, one in enumerate(self.expected[seq.id])]
        try:
            moves = self.table.keep(seq, kept)[lane]
        except self.module.OutOfPages:
            assert snapshot(self.table) == before
            assert self.table.available() < others, "pages that this lane alone lists are its own to write"
            return
        assert not whole or not len(moves.src), "whole pages moved"
        self.move(moves)
        self.expected[seq.id][lane] = [values[i] for i in slots]
        self.positions[seq.id][lane] = [positions[i] for i in slots]
        if len(slots) < n:
            self.taint[seq.id] = (seq.id, len(self.numbers), self.taint[seq.id])

    def split(self, seq: Sequence) -> None:
        r, (values,), (positions,) = self.random, self.expected[seq.id], self.positions[seq.id]
        kept = [sorted(r.sample(range(len(values)), r.randint(0, len(values)))) for _ in range(LANES[seq.cache.lanes])]
        pool, before = self.table._pools[Space(seq.cache.lanes)], snapshot(self.table)
        wanted = max(0, sum(-(-len(slots) // PAGE) for slots in kept) - pool.spares)
        fits = -(-wanted // pool.per_block) <= self.table.available()
        try:
            (moves,) = self.table.keep(seq, kept)
        except self.module.OutOfPages:
            assert not fits and snapshot(self.table) == before
            return
        self.move(moves)
        self.expected[seq.id] = [[values[i] for i in slots] for slots in kept]
        self.positions[seq.id] = [[positions[i] for i in slots] for slots in kept]
        self.demoted[seq.id] = [0] * len(kept)
        self.taint[seq.id] = (seq.id, len(self.numbers), self.taint[seq.id])

    @precondition(lambda self: self.seqs)
    @rule()
    def preempt(self) -> None:
        seq = self.pick()
        self.leave(seq)
        self.forget()
        self.enter(seq)

    @precondition(lambda self: self.seqs)
    @rule()
    def finish(self) -> None:
        self.leave(self.pick())

    @rule()
    def let_go(self) -> None:
        table, listed = self.table, [[state(lane) for lane in held.lanes] for held in self.table._held.values()]
        idle, free = len(table.prefix.idle), table.available()
        assert table.forget() == idle and not table.prefix.idle and table.forget() == 0
        assert table.available() == free == len(table._free), "idle pages were available before"
        assert listed == [[state(lane) for lane in held.lanes] for held in table._held.values()]

    @invariant()
    def everything_lies_where_it_should(self) -> None:
        if not hasattr(self, "table"):  # before `start`
            return
        table = self.table
        table.check()
        self.forget()
        assert table.used() + table.available() == BLOCKS and table.peak >= table.used()
        for seq in self.seqs.values():
            held = table._held[seq.id]
            once = LANES[seq.cache.lanes] // len(self.positions[seq.id])
            mine = [lane[n:] for lane, n in zip(self.positions[seq.id], self.demoted[seq.id], strict=True)]
            assert [p.tolist() for p in table.positions(seq)] == mine * once and mine == [sorted(lane) for lane in mine]
            assert table.demoted(seq).tolist() == self.demoted[seq.id] * once
            for lane, values in zip(held.lanes, self.expected[seq.id], strict=True):
                for i, page in enumerate([*lane.encoded, *lane.pages]):
                    encoded = i < len(lane.encoded)
                    pool = held.encoded if encoded else held.pool
                    assert pool is not None
                    block = self.memory[self.cells(pool.space, page)]
                    assert not np.any(block == POISON), f"page {page} still holds data of its former owner"
                    want = values[i * PAGE : (i + 1) * PAGE]
                    want = [self.encoded(v) for v in want] if encoded else want
                    assert np.all(block[:, : len(want)] == want), f"sequence {seq.id}, page {i}"
        below = [(node, node.key[1]) for node in table.prefix.root.children.values()]
        while below:
            node, prefix = below.pop()
            want = [self.numbers[(None, node.key[0], prefix[:i])] for i in range(len(prefix) - PAGE + 1, len(prefix) + 1)]
            assert np.all(self.memory[self.cells(Space(), node.page)] == want), f"published page {node.page}"
            below += [(child, prefix + child.key[1]) for child in node.children.values()]

    def teardown(self) -> None:
        if not hasattr(self, "table"):
            return
        for seq in self.seqs.values():
            self.table.free(seq)
        self.table.check()
        assert self.table.available() == BLOCKS
        all_of_it = make(0, range(100, 100 + BLOCKS * PAGE))
        self.table.open(all_of_it)
        self.table.reserve([Work(all_of_it, BLOCKS * PAGE)], [EMPTY])  # evicts every published page
        self.table.check()
        assert not self.table.prefix.nodes
        self.table.free(all_of_it)
        self.table.check()
        assert len(self.table._free) == BLOCKS


TestProgram = Program.TestCase
TestProgram.settings = settings(max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck))


def test_slots_that_stand_for_one_token_need_no_logarithms() -> None:
    table, seq = EditableTable(9, LAYERS, HEADS, page=4), make(1, range(9), Lanes.PER_HEAD)
    table.open(seq)
    run(table, seq, 8)
    lanes, slots = np.array([1, 4], np.int32), np.array([0, 2], np.int32)
    rows = np.zeros((2, 3), np.float32)
    for kept, tokens in ((6, 1), (5, 3), (4, 1)):
        table.keep(seq, [range(kept)] * LANES[Lanes.PER_HEAD], Merged(lanes, slots, rows, rows, np.full(2, tokens, np.int32)))
        table.check()
        logs = table.reserve([Work(seq, 0)], [EMPTY]).logs[0]
        if kept == 6:
            assert logs is None
            continue
        assert logs is not None
        held = [(lane, slot) for lane, one in enumerate(logs) for slot in np.flatnonzero(one)]
        assert held == ([(1, 0), (4, 2)] if tokens == 3 else []), "a new count replaces the old one"
