"""Pages of several spaces in one pool, encoded pages, spliced text, and the promises of need() under a scheduler."""

from __future__ import annotations

import random
import sys
from collections import Counter, deque
from collections.abc import Sequence as Seq
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest

from redraft.core.plan import Accepted, Work
from redraft.core.sequence import UNLIMITED, CachePlan, Lanes, Onset, Sequence, Space
from redraft.core.tree import EMPTY, TokenTree
from redraft.kv import edits, table
from redraft.kv.edits import EditableTable
from redraft.sched.fcfs import FCFS
from tests.kv.test_table import BLOCKS, HEADS, LANES, LAYERS, PAGE, Program, make, pairs, real, run, snapshot

SPACES = {  # a block has room for 6 plain pages of one head
    Space(Lanes.PER_HEAD, "int8"): 10,
    Space(Lanes.PER_HEAD, "wide"): 4,
    Space(Lanes.PER_HEAD, "int4"): 15,
    Space(Lanes.PER_HEAD, "int4-wide"): 5,
    Space(Lanes.PER_LAYER, "int8"): 3,
}


RARELY = 1 << 20  # tokens: never in these texts


def pool(blocks: int, module: Any = real) -> EditableTable:
    table: EditableTable = module.EditableTable(blocks, LAYERS, HEADS, page=PAGE)
    for space, per_block in SPACES.items():
        table.define(space, per_block)
    return table


def stored(table: EditableTable, ident: int, tokens: int, lanes: Lanes = Lanes.SHARED, form: str = "", encoded: str = "") -> Sequence:
    """An open sequence with `tokens` stored tokens and one pending token."""
    seq = make(ident, range(100 * ident, 100 * ident + tokens + 1), lanes)
    seq.cache = CachePlan(lanes=lanes, format=form, encoded=encoded, encode_every=RARELY)
    table.open(seq)
    run(table, seq, tokens)
    return seq


# ---- single operations


def test_a_block_goes_from_one_space_to_another() -> None:
    table = pool(2)
    for ident, (space, per_block) in enumerate(SPACES.items(), 1):
        slots = 2 * per_block // LANES[space.lanes] * PAGE  # the whole pool
        seq = stored(table, ident, slots, *space)
        assert table.available() == (2 * per_block % LANES[space.lanes] >= per_block) and table.gain(seq) == table.used()
        table.free(seq)
        assert table.available() == 2
    with pytest.raises(AssertionError, match="9 pages a block, defined with 10"):
        table.define(Space(Lanes.PER_HEAD, "int8"), 9)


def test_encode_moves_full_pages_and_frees_them() -> None:
    table = pool(8)
    seq = stored(table, 1, 10, Lanes.PER_HEAD, encoded="int4")
    exact = table._held[1].arrays()[0].copy()
    found = table.encode(seq)
    table.check()
    assert (found.source, found.target) == (Space(Lanes.PER_HEAD), Space(Lanes.PER_HEAD, "int4"))
    assert found.src.tolist() == exact[:, :2].ravel().tolist() and len({*found.dst.tolist()}) == 12
    assert found.lanes.tolist() == [lane for lane in range(6) for _ in range(2)]
    view = table.reserve([Work(seq, 1)], [TokenTree.chain(range(3))])
    assert view.encoded[0].tolist() == found.dst.reshape(6, 2).tolist() and view.lengths[0].tolist() == [10] * 6
    assert view.pages[0][:, 0].tolist() == exact[:, 2].tolist() and view.pages[0].shape == (6, 2)
    moves = table.commit([Work(seq, 1)], [Accepted((2,), (2, 9))])[0]  # slot 13 to slot 11: the encoded pages come before
    assert pairs(moves) == [(new * PAGE + 1, old * PAGE + 3) for old, new in view.pages[0].tolist()]
    table.check()
    assert len(table.encode(seq).src) == 6 and len(table.encode(seq).src) == 0
    with pytest.raises(AssertionError, match="encoded pages cannot be evicted"):
        table.keep(seq, [[]] * 6)


def test_splice_copies_slots_and_turns_keys() -> None:
    table = pool(12)
    source, seq = stored(table, 1, 12), stored(table, 2, 5)
    seq.tokens += range(9)
    theirs, mine = (table._held[i].lanes[0].pages for i in (1, 2))
    moves = table.splice(seq, source, 6, 5)
    table.check()
    assert seq.stored == 10 and seq.shareable_tokens == 5 and moves.delta == -1
    slots = [(6, 5), (7, 6), (8, 7), (9, 8), (10, 9), (10, 10), (10, 11)]  # the rest of the fresh page is filled
    assert pairs(moves) == [(theirs[a // 4] * 4 + a % 4, mine[b // 4] * 4 + b % 4) for a, b in slots]
    run(table, seq)
    assert table.match([*seq.tokens, 0], "") == 4  # nothing after the first spliced slot
    whole = make(3, source.tokens)
    table.open(whole)
    assert table.splice(whole, source, 0, 8, exact=True).delta == 0
    run(table, whole)
    assert whole.shareable_tokens == source.shareable_tokens
    table.free(source)
    table.check()
    with pytest.raises(AssertionError, match="is not exact"):
        table.splice(seq, whole, 0, 4, exact=True)


def test_a_fork_of_spliced_text_publishes_no_more_than_its_parent() -> None:
    table = pool(8)
    source, seq = stored(table, 1, 8), make(2, range(20, 40))
    table.open(seq)
    table.splice(seq, source, 4, 4)
    child = make(3, seq.tokens)
    table.fork(seq, child)
    run(table, child)
    assert child.shareable_tokens == 0 and table.match([*child.tokens, 0], "") == 0


def test_need_counts_what_sync_points_take() -> None:
    table = pool(BLOCKS)
    blocks = stored(table, 1, 4, Lanes.PER_HEAD, encoded="int4")
    blocks.cache = replace(blocks.cache, encode_every=8)
    blocks.tokens += range(99)  # 100 pending
    assert table.need(blocks, 100) == 1 + -(-6 * 26 // 15)  # one more exact page a lane; all 104 slots but the last in codes
    blocks.tokens = blocks.tokens[:5]
    assert table.need(blocks, 1 + 10) == 3 + -(-6 * 2 // 15)  # drafts come after the sync point, not in encoded pages
    evicted = stored(table, 2, 9, Lanes.PER_HEAD)
    table.keep(evicted, [range(9)] * 6)
    evicted.onset = Onset(12, 12, longest=12)
    evicted.tokens += range(99)
    assert table.need(evicted, 100) == 0 and table.need(evicted, 100 + 5) == 2
    child = make(3, evicted.tokens, Lanes.PER_HEAD)
    table.fork(evicted, child)
    assert table.need(evicted, 100) == 2 and table.need(evicted, 1) == 0  # an eviction copies pages that both list
    shared = make(4, range(30))
    assert table.need(shared, 31, matched=8) == 6
    shared.onset = Onset(16, 16, longest=16)
    assert table.need(shared, 31, matched=8) == 4 and table.need(shared, 15, matched=8) == 2
    assert table.need(shared, 10**6) == 4  # a text of any length


def test_need_counts_the_split_to_which_accepted_drafts_bring_a_text() -> None:
    table = pool(BLOCKS)
    seq = stored(table, 1, 13)
    seq.cache, seq.onset = CachePlan(lanes=Lanes.PER_HEAD), Onset(16, 16, slots=8, most=16, longest=16)
    assert table.need(seq, 1 + 1) == 0
    assert table.need(seq, 1 + 2) == 4  # 8 slots and the drafts in each of 6 lanes


# ---- random programs


class Spaces(Program):
    """Adds pages of other sizes, encodings, spliced text, partly shareable text and summaries of full pages."""

    def define(self) -> None:
        self.summaries: dict[tuple[Space, int], list[int]] = {}
        for space, per_block in SPACES.items():
            self.table.define(space, per_block)

    def fit(self, seq: Sequence) -> Sequence:
        forms = [("", ""), ("int8", ""), ("wide", ""), ("", "int4"), ("wide", "int4-wide"), ("", "int4"), ("wide", "int4-wide")]
        lanes = self.random.choice([Lanes.SHARED, Lanes.SHARED, Lanes.PER_LAYER, Lanes.PER_HEAD, Lanes.PER_HEAD])
        seq.cache = CachePlan(lanes=lanes)
        if lanes is Lanes.SHARED:
            seq.shareable_tokens = self.random.choice([seq.shareable_tokens, self.random.randrange(20)])
        else:
            form, encoded = self.random.choice(forms if lanes is Lanes.PER_HEAD else forms[:2])
            seq.cache = CachePlan(lanes=lanes, format=form, encoded=encoded, encode_every=self.random.choice([RARELY, UNLIMITED]))
        return seq

    def demote(self) -> None:
        """The policy keeps some slots of each lane; half of the time it keeps the same number everywhere."""
        chosen = [seq for seq in self.seqs.values() if seq.cache.demotes]
        if not chosen:
            return
        r, seq = self.random, self.random.choice(chosen)
        held, before, each = self.table._held[seq.id], snapshot(self.table), self.table.positions(seq)
        assert held.encoded is not None
        same = r.randint(0, max(map(len, each))) if r.random() < 0.5 else None
        kept = [sorted(r.sample(range(len(lane)), min(len(lane), r.randint(0, len(lane)) if same is None else same))) for lane in each]
        lost = [[i for i in range(len(lane)) if i not in slots] for lane, slots in zip(each, kept, strict=True)]
        count = [n + len(slots) for n, slots in zip(self.demoted[seq.id], lost, strict=True)]
        full = sum(min(count) // PAGE - len(lane.encoded) for lane in held.lanes)
        shared = sum(held.pool.refs[page] > 1 for lane in held.lanes for page in lane.pages)
        lacking = [(full, held.encoded), (shared, held.pool)]
        fits = sum(-(-max(0, n - pool.spares) // pool.per_block) for n, pool in lacking) <= self.table.available()
        try:
            moves, (source, target, src, dst, lanes) = self.table.demote(seq, kept)
        except self.module.OutOfPages:
            assert not fits and snapshot(self.table) == before
            return
        assert len(src) == full and lanes.tolist() == sorted(lanes.tolist())
        for one in moves:
            self.move(one)
        for page, values in zip(dst.tolist(), [self.memory[self.cells(source, page)][0].tolist() for page in src], strict=True):
            self.memory[self.cells(target, page)] = [self.encoded(value) for value in values]
        for lane, (n, gone, slots) in enumerate(zip(self.demoted[seq.id], lost, kept, strict=True)):
            for lines in (self.expected[seq.id], self.positions[seq.id]):
                line = lines[lane]
                lines[lane] = [*line[:n], *(line[n + i] for i in gone), *(line[n + i] for i in slots)]
        self.demoted[seq.id] = count
        self.taint[seq.id] = (seq.id, len(self.numbers), self.taint[seq.id])

    def encode(self) -> None:
        blocks = [seq for seq in self.seqs.values() if seq.cache.encoded and not seq.cache.demotes]
        if not blocks:
            return
        seq = self.random.choice(blocks)
        held, before = self.table._held[seq.id], snapshot(self.table)
        assert held.encoded is not None
        full = sum(min(other.length for other in held.lanes) // PAGE - len(lane.encoded) for lane in held.lanes)
        fits = -(-max(0, full - held.encoded.spares) // held.encoded.per_block) <= self.table.available()
        try:
            source, target, src, dst, _ = self.table.encode(seq)
        except self.module.OutOfPages:
            assert not fits and snapshot(self.table) == before
            return
        assert len(src) == full
        for page, values in zip(dst.tolist(), [self.memory[self.cells(source, page)][0].tolist() for page in src], strict=True):
            self.memory[self.cells(target, page)] = [self.encoded(value) for value in values]

    def splice(self) -> None:
        r, table = self.random, self.table
        plain = [seq for seq in self.seqs.values() if seq.cache.lanes is Lanes.SHARED and not table._held[seq.id].edited]
        chosen = [(seq, source) for seq in plain for source in plain if seq is not source and seq.pending > 1 and source.stored]
        if not chosen:
            return
        seq, source = r.choice(chosen)
        start = seq.stored
        same = next((i for i, (a, b) in enumerate(zip(seq.tokens, source.tokens, strict=False)) if a != b), len(seq.tokens))
        exact = seq.request.salt == source.request.salt and start < min(same, source.stored)
        first = start if exact else r.randrange(source.stored)
        count = r.randint(0, min(source.stored - first, seq.pending - 1, *([same - first] if exact else [])))
        before, promised = snapshot(table), table.need(seq, seq.pending) <= table.available()
        try:
            moves = table.splice(seq, source, first, count, exact)
        except self.module.OutOfPages:
            assert not promised and snapshot(table) == before
            return
        self.move(moves)
        assert seq.stored == start + count
        self.expected[seq.id][0] += [self.turned(v, start - first) for v in self.expected[source.id][0][first : first + count]]
        self.positions[seq.id][0] += range(start, start + count)
        table.publish(seq)

    def summarize(self) -> None:
        seq = self.pick()
        held = self.table._held[seq.id]
        for page in self.table.unfolded(seq).tolist():
            self.summaries[held.pool.space, page] = self.memory[self.cells(held.pool.space, page)][0].tolist()
        for lane in held.lanes:
            for page in lane.pages[: lane.length // PAGE - len(lane.encoded)]:
                now = self.memory[self.cells(held.pool.space, page)][0].tolist()
                assert self.summaries.get((held.pool.space, page)) == now, f"page {page} has a stale summary"
        assert not len(self.table.unfolded(seq))


def drive(program: type[Spaces], seeds: int, operations: int = 50) -> None:
    """Runs a fixed program for each seed."""
    for seed in range(seeds):
        it = program()
        it.start(seed)
        for _ in range(operations):
            name = it.random.choice(
                ["admit"] * 2
                + ["run"] * 3
                + ["fork", "keep", "encode", "demote", "splice", "summarize"]
                + ["preempt", "finish"] * (len(it.seqs) > 4)
            )
            if name == "admit" and len(it.seqs) < 6:
                it.admit(it.random.choice(["", "", "tenant"]))
            elif name == "run":
                it.step(it.random.random() < 0.5, it.random.randrange(8))
            elif it.seqs and name != "admit" and (name != "fork" or len(it.seqs) < 6):
                getattr(it, name)()
            it.everything_lies_where_it_should()
        it.teardown()


def test_random_programs() -> None:
    drive(Spaces, 40)


# ---- the promises of need()


class Kind(NamedTuple):
    """A kind of cache that a request may choose. budget, drop: `drop` slots are evicted whenever `budget` are in use; uneven: the most
    slots by which a lane may differ from the others then; encoded, encode_every: see CachePlan; spliced: text is copied from another
    sequence; context: the first eviction comes at the end of the prompt, and is the only one if drop is 0. With `encoded` but without
    encode_every, slots are demoted instead of evicted."""

    lanes: Lanes = Lanes.SHARED
    format: str = ""
    encoded: str = ""
    budget: int = 0
    drop: int = 0
    uneven: int = 0
    encode_every: int = 0
    spliced: bool = False
    context: bool = False

    def first(self, seq: Sequence) -> int:
        """The stored tokens at the first eviction."""
        if not self.context:
            return self.budget
        kept = self.budget - self.drop
        return seq.prompt_len if seq.prompt_len > kept + self.uneven else self.budget + self.uneven if self.drop else UNLIMITED


KINDS = [
    Kind(),
    Kind(budget=16, drop=6),
    Kind(spliced=True),
    Kind(Lanes.PER_LAYER, budget=13, drop=5, uneven=3),
    Kind(Lanes.PER_HEAD, budget=16, drop=8, uneven=4),
    Kind(Lanes.PER_HEAD, budget=4, uneven=2, context=True),
    Kind(Lanes.PER_LAYER, budget=10, drop=5, uneven=1, context=True),
    Kind(Lanes.PER_HEAD, "wide", budget=5, uneven=1, context=True),
    Kind(Lanes.PER_HEAD, "int8", budget=9, drop=3),
    Kind(Lanes.PER_HEAD, "wide"),
    Kind(Lanes.PER_HEAD, encoded="int4", encode_every=4),
    Kind(Lanes.PER_HEAD, "wide", "int4-wide", encode_every=8),
    Kind(Lanes.PER_HEAD, "wide", budget=9, drop=4, context=True),
    Kind(Lanes.PER_HEAD, encoded="int4", budget=6, encode_every=4, context=True),
    Kind(Lanes.PER_HEAD, encoded="int4", budget=9, drop=3),
    Kind(Lanes.PER_HEAD, encoded="int4", budget=5, context=True),
    Kind(Lanes.PER_HEAD, encoded="int4", budget=12, drop=5, uneven=2, context=True),
]


class Service:
    """The loop of the engine over a small pool, without a model. No operation may ever lack pages. done: counts of operations."""

    def __init__(self, seed: int, module: Any = real, kinds: Seq[Kind] = KINDS) -> None:
        self.random, self.done = random.Random(seed), Counter[str]()
        self.table = pool(BLOCKS, module)
        self.scheduler = FCFS(token_budget=24, max_seqs=8, draft_rows=10, draft_total=20, watermark=0.0)
        self.source = stored(self.table, 999, 20)
        prompts = [[self.random.randrange(3) for _ in range(40)] for _ in range(2)]
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.kinds: dict[int, Kind] = {}
        self.ends: dict[int, int] = {}
        self.decided: dict[int, int] = {}
        for ident in range(1, 11):
            tokens = [
                *self.random.choice(prompts)[: self.random.choice([16, self.random.randrange(32)])],
                *(self.random.randrange(3) for _ in range(3)),
            ]
            self.waiting.append(self.fit(make(ident, tokens), self.random.choice(kinds)))
            self.waiting[-1].request.params = self.waiting[-1].params.but(n=self.random.choice([1, 1, 2, 4]))

    def fit(self, seq: Sequence, kind: Kind) -> Sequence:
        self.kinds[seq.id], self.ends[seq.id] = kind, seq.prompt_len + self.random.randint(1, 12)
        seq.cache = CachePlan(
            lanes=kind.lanes,
            format=kind.format,
            encoded=kind.encoded,
            encode_every=kind.encode_every or UNLIMITED,
        )
        if kind.budget and kind.first(seq) < UNLIMITED:
            kept = kind.budget - kind.drop + kind.uneven
            most = kept + kind.drop if kind.drop else UNLIMITED
            longest = most + kind.uneven if kind.drop else UNLIMITED
            seq.onset = Onset(kind.first(seq), kind.first(seq), slots=kept, most=most, longest=longest)
        seq.shareable_tokens = seq.onset.shareable
        self.spans(seq)
        seq.sync_point = self.sync_point(seq)
        return seq

    def spans(self, seq: Sequence) -> None:
        """Draws new spans (at, first, count) of the source, also after each preemption."""
        seq.spans, at = [], 0
        seq.request.salt = str(seq.request.sequences[0].id) if self.kinds[seq.id].spliced else ""
        while self.kinds[seq.id].spliced and (at := at + self.random.randrange(9)) < seq.prompt_len - 1:
            count = self.random.randint(1, min(12, seq.prompt_len - 1 - at))
            seq.spans.append((at, self.random.randrange(20 - count), count))
            at += count

    def sync_point(self, seq: Sequence) -> int:
        kind, found = self.kinds[seq.id], [self.ends[seq.id] - 1, *(span[0] for span in seq.spans[:1])]
        if seq.params.n > len(seq.request.sequences) and seq.stored < seq.prompt_len - 1:
            found.append(seq.prompt_len - 1)
        if kind.budget and (first := kind.first(seq)) < UNLIMITED:
            again = max(0, (seq.stored - first) // kind.drop + 1) * kind.drop if kind.drop else UNLIMITED if seq.stored >= first else 0
            found.append(first + again)
        if kind.encode_every:
            found.append((seq.stored // kind.encode_every + 1) * kind.encode_every)
        return min(found)

    def cross(self, seqs: list[Sequence]) -> None:
        r, table = self.random, self.table
        for seq in seqs:
            table.publish(seq)
            kind = self.kinds[seq.id]
            due = kind.budget and seq.stored >= kind.first(seq) and (seq.stored - kind.first(seq)) % (kind.drop or UNLIMITED) == 0
            if due and self.decided.get(seq.id) != seq.stored:
                self.decided[seq.id] = seq.stored
                kept = []
                for old in table.positions(seq):
                    share = min(len(old), kind.budget - kind.drop + r.randint(-kind.uneven, kind.uneven))
                    kept.append(sorted(r.sample(range(len(old)), share)))
                self.done["split"] += seq.cache.splits and table._held[seq.id].pool.space == Space()
                if seq.cache.demotes:
                    self.done["demote"] += len(table.demote(seq, kept)[1].src) > 0
                else:
                    table.keep(seq, kept)
                self.done["keep"] += 1
            if kind.encode_every and seq.stored % kind.encode_every == 0 and not seq.stored < seq.onset.at < UNLIMITED:
                self.done["encode"] += len(table.encode(seq).src) > 0
            while seq.spans and seq.spans[0][0] == seq.stored:
                table.splice(seq, self.source, *seq.spans.pop(0)[1:])
                self.done["splice"] += 1
            seq.sync_point = self.sync_point(seq)
            if seq.stored == seq.prompt_len - 1 and len(seq.request.sequences) < seq.params.n:
                self.fork(seq)

    def fork(self, seq: Sequence) -> None:
        child = make(len(self.kinds) + 1, seq.tokens)
        child.request = seq.request
        seq.request.sequences.append(child)
        self.fit(child, self.kinds[seq.id])
        spare = self.table.available() - sum(self.table.need(each, each.pending) for each in self.running)
        listed = seq.stored if child.cache.shares else 0
        if len(self.running) < self.scheduler.max_seqs and spare >= self.table.need(child, child.prompt_len + 1, listed):
            self.table.fork(seq, child)
            child.spans, child.sync_point = [], self.sync_point(child)
            self.decided[child.id] = self.decided.get(seq.id, 0)
            self.running.append(child)
            self.done["fork"] += 1
        else:
            self.waiting.append(child)

    def stop(self, seq: Sequence) -> None:
        self.running.remove(seq)
        free = self.table.available() + self.table.gain(seq)
        self.table.free(seq)
        assert self.table.available() == free
        seq.stored = 0
        self.decided.pop(seq.id, None)
        self.spans(seq)
        seq.sync_point = self.sync_point(seq)

    def tree(self, rows: int, depth: int) -> TokenTree:
        tree: list[tuple[int, int]] = []  # parent, depth
        for _ in range(self.random.choice([rows, self.random.randint(0, rows)])):
            parent = self.random.choice([-1, *(i for i, (_, d) in enumerate(tree) if d < depth)])
            tree.append((parent, 1 if parent < 0 else tree[parent][1] + 1))
        parents = np.array([parent for parent, _ in tree], np.int32)
        return TokenTree(np.zeros(len(tree), np.int32), parents, np.zeros(len(tree) + 1, np.uint8))

    def step(self) -> None:
        r, table = self.random, self.table
        self.cross(list(self.running))
        plan = self.scheduler.plan(self.waiting, self.running, table)
        for seq in plan.preempt:
            self.stop(seq)
            self.waiting.appendleft(seq)
            self.done["preempt"] += 1
        for seq, matched in plan.admit:
            table.open(seq)
            table.attach(seq, matched)
            seq.spans = [span for span in seq.spans if span[0] >= matched]
            self.waiting.remove(seq)
            self.running.append(seq)
        trees = [self.tree(*budget) if budget.depth else EMPTY for budget in plan.budgets]
        table.reserve(plan.work, trees)
        self.done["full"] += table.available() == 0
        accepted = []
        for w, tree in zip(plan.work, trees, strict=True):
            path: list[int] = []
            while w.done and (below := np.flatnonzero(tree.parents == (path[-1] if path else -1)).tolist()) and r.random() < 0.8:
                path.append(r.choice(below))
            accepted.append(Accepted(tuple(path), (*[0] * len(path), r.randrange(3))) if w.done else Accepted())
        table.commit(plan.work, accepted)
        self.cross(plan.seqs)
        for seq in [seq for seq in self.running if len(seq.tokens) >= self.ends[seq.id]]:
            self.stop(seq)
        for seq in self.running:
            assert max(map(len, table.positions(seq))) <= max(seq.onset.longest, seq.onset.at)
        table.check()

    def run(self) -> Counter[str]:
        while self.running or self.waiting:
            self.step()
            self.done["step"] += 1
            assert self.done["step"] < 1000, "no progress"
        self.table.free(self.source)
        assert self.table.available() == BLOCKS
        return self.done


def test_need_is_never_exceeded() -> None:
    done = sum((Service(seed).run() for seed in range(110)), Counter[str]())
    assert min(done[what] for what in ("keep", "encode", "demote", "splice", "fork", "preempt", "full", "split")) > 20


# ---- tests of the tests: planted faults


def planted(old: str, new: str) -> Any:
    """The modules of the table with one fault. It edits the source, because single lines of long methods cannot be patched."""
    paths = Path(str(table.__file__)), Path(str(edits.__file__))
    sources = [path.read_text() for path in paths]
    assert sum(source.count(old) for source in sources) == 1, f"not one place for the fault: {old}"
    modules = ModuleType("faulty_table"), ModuleType("faulty_edits")
    sys.modules["faulty_table"] = modules[0]
    for module, path, source in zip(modules, paths, sources, strict=True):
        planted = source.replace(old, new).replace("from redraft.kv.table import", "from faulty_table import")
        exec(compile(planted, str(path), "exec"), module.__dict__)
    return SimpleNamespace(EditableTable=modules[1].EditableTable, OutOfPages=modules[0].OutOfPages)


PROGRAM = {
    "a page is relisted although a kept slot moved": (" & (breaks[last] == breaks[first])", ""),
    "part of a shared page becomes a lane's end": ("        whole &= (last - first == size - 1) | (keep[last] == length - 1)\n", ""),
    "keep writes shared pages": (
        " if self._private(pool, page)]\n        alone",
        "]\n        alone",
    ),
    "keep leaves old data in a fresh page": ("        if len(loose) == len(writing):\n", "        if True:\n"),
    "keep forgets that summaries are stale": ("pages, codes + n, 0, None", "pages, codes + n, it.summarized, None"),
    "splice leaves old data in a fresh page": ("len(mine.pages) * self.page if lacking else start + count", "start + count"),
    "splice turns keys the wrong way": ("self._places(mine.pages, to), start - first", "self._places(mine.pages, to), first - start"),
    "spliced text is published": (
        "        seq.shareable_tokens = min(seq.shareable_tokens, source.shareable_tokens if exact else start)\n",
        "",
    ),
    "text that cannot be shared is published": (
        "full = min(lane.length, seq.shareable_tokens) // self.page",
        "full = lane.length // self.page",
    ),
    "a fork forgets what is shareable": ("min(child.shareable_tokens, seq.shareable_tokens)", "child.shareable_tokens"),
    "a fork does not count encoded pages": ("                self._list(held.encoded, page)\n", "                pass\n"),
    "encode keeps the exact pages": ("        self._drop(held.pool, reversed(src))\n", ""),
    "encoded pages are counted twice": (
        " - len(lane.pages) - len(lane.encoded) for lane",
        " - len(lane.pages) - 2 * len(lane.encoded) for lane",
    ),
    "accepted nodes are searched after encoded pages": (" - size * len(lane.encoded), lane.pages", ", lane.pages"),
    "kept slots are demoted": ("before + lost, before + slots]", "before + slots, before + lost]"),
    "demoted slots come back": (
        "np.arange(before, dtype=np.int32), before + lost",
        "np.arange(before, dtype=np.int32)[::-1], before + lost",
    ),
    "positions stay behind": ("        it.positions = it.positions[stay_first]\n", "        it.positions = it.positions[: codes + n]\n"),
    "a fork forgets what was demoted": ("list(lane.encoded), lane.demoted, ", "list(lane.encoded), 0, "),
    "one lane encodes more than the others": (
        "least = min(lane.demoted if",
        "least = max(lane.demoted if",
    ),
    "gain overlooks encoded pages": (
        "in held.listed():\n            mine",
        "in held.listed()[:1]:\n            mine",
    ),
}

SERVICE = {
    "drafts are cut with the pending rows": ("max(first, onset.longest))) + drafted, 0", "max(first, onset.longest))), 0"),
    "a prompt is cut before its eviction": ("min(end, max(first, onset.longest))", "min(end, onset.longest)"),
    "demoted slots take no memory": ("lane.length + rows + drafted\n\n", "0\n\n"),
    "a split copies nothing": ("max(before + blocks(onset.slots), blocks(after))", "max(before, blocks(after))"),
    "a split is forgotten": ("        if end + drafted < onset.at:\n", "        if True:\n"),
    "drafts lie in codes": ("min(end - codes, every) + drafted,", "min(end - codes, every),"),
    "codes take no memory": ("encoded += max(0, ", "encoded += 0 * max(0, "),
    "shared pages can be written": ("if evicts else len(lane.pages)", "if False else len(lane.pages)"),
}


@pytest.mark.parametrize("fault", PROGRAM)
def test_random_programs_notice(fault: str) -> None:
    class Faulty(Spaces):
        module = planted(*PROGRAM[fault])

    with pytest.raises((AssertionError, IndexError, KeyError)):
        drive(Faulty, 100)


@pytest.mark.parametrize("fault", SERVICE)
def test_service_notices(fault: str) -> None:
    module = planted(*SERVICE[fault])
    kinds = [kind for kind in KINDS if kind.encode_every] if "codes" in fault else KINDS  # others are rarely hurt
    with pytest.raises(module.OutOfPages):
        sum((Service(seed, module, kinds).run() for seed in range(200)), Counter[str]())
