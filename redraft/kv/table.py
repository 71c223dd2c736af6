"""Where keys lie: blocks, lanes, the tentative tail, commit, fork and sharing. Integers only; no tensors.

A lane is a growing array of slots in text order without holes: slot i is place i % 32 of its page i // 32. Memory is
cut into blocks of equal bytes (32 tokens of all layers and kv heads). A block is one SHARED page, or is carved into pages
of one other space (a lane kind and a format of storing), and is free again when the last of them is. Only the end of a
lane is written, and the page there is listed by that lane alone: full pages can be shared without copying on write.

    A: [p7][p9][p12, 5 slots]     B, same first 64 tokens: [p7][p9][p31]     fork of A: [p7][p9][p40, copy of p12]

Paged keys: Kwon et al., Efficient Memory Management for Large Language Model Serving with PagedAttention, 2023
(arXiv 2309.06180); sharing through a radix tree: Zheng et al., SGLang, 2023 (arXiv 2312.07104).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from redraft.core.batch import PageView
from redraft.core.plan import Accepted, Work
from redraft.core.sequence import NEVER, Lanes, Sequence, Space
from redraft.core.tree import I32, I64, TokenTree
from redraft.kv.prefix import Node, PrefixTree


class OutOfPages(AssertionError):
    """More pages were asked for than `available()` promised: the scheduler's bug, not the user's."""


class Moves(NamedTuple):
    """Slots to copy, all gathered and then scattered. A place is page * 32 + offset, the page one of `space`. delta: by how
    many positions the keys are turned on the way."""

    space: Space
    src: I32
    dst: I32
    delta: int = 0


@dataclass(eq=False, slots=True)
class _Lane:
    pages: list[int]
    length: int = 0  # committed slots
    coded: list[int] = field(default_factory=list)  # pages of the format of coded pages, in front of `pages`
    folded: int = 0  # leading full pages that were summarised
    positions: I32 | None = None  # of the committed slots, with room to grow; None while slot i holds position i

    def append(self, start: int, count: int) -> None:
        """`count` more committed slots, at positions from `start` on."""
        end = self.length + count
        if self.positions is not None:
            if end > len(self.positions):
                room = np.empty(2 * end, np.int32)
                room[: self.length] = self.positions[: self.length]
                self.positions = room
            self.positions[self.length : end] = np.arange(start, start + count)
        self.length = end


class _Pool:
    """The pages of one space: `per_block` to a block, block s holding pages s * per_block and on. lanes: of each sequence."""

    def __init__(self, space: Space, per_block: int, lanes: int) -> None:
        self.space = space
        self.per_block = per_block
        self.lanes = lanes
        self.refs: dict[int, int] = {}  # page -> how many lanes list it; no entry for an idle published page
        self.spare: dict[int, list[int]] = {}  # carved block -> its free pages; blocks without any are left out
        self.spares = 0


@dataclass(eq=False, slots=True)
class _Held:
    """What one open sequence holds. Its tail is `chain` chain rows, then `nodes` nodes."""

    seq: Sequence
    pool: _Pool
    coded: _Pool | None  # of the coded pages
    lanes: list[_Lane]
    cursor: Node  # the published prefix of the lane ends here ...
    published: int = 0  # ... after so many pages
    chain: int = 0
    nodes: int = 0
    view: tuple[I32, I32] | None = None  # what arrays() tells, until pages change

    @property
    def edited(self) -> bool:
        """Keys were evicted: what is computed from here on is no function of the tokens alone."""
        return self.lanes[0].positions is not None

    def missing(self, rows: int, page: int) -> int:
        """Pages that the lanes lack for `rows` rows behind the tail."""
        more = self.chain + self.nodes + rows
        return sum(-(-(lane.length + more) // page) - len(lane.pages) - len(lane.coded) for lane in self.lanes)

    def listed(self) -> list[tuple[_Pool, list[int]]]:
        """All pages by pool, a lane's last first."""
        found = [(self.pool, [page for lane in self.lanes for page in reversed(lane.pages)])]
        if self.coded is not None:
            found.append((self.coded, [page for lane in self.lanes for page in reversed(lane.coded)]))
        return found

    def arrays(self) -> tuple[I32, I32]:
        """`pages` and `coded` of all lanes: i32[lanes, n] and i32[lanes, m], shorter lanes padded with 0 on the right."""
        if self.view is None:
            self.view = _padded([lane.pages for lane in self.lanes]), _padded([lane.coded for lane in self.lanes])
        return self.view


def _padded(lists: list[list[int]]) -> I32:
    width = max(map(len, lists))
    return np.array([[*pages, *[0] * (width - len(pages))] for pages in lists], np.int32)


class PageTable:
    """`blocks` blocks for a model of `layers` layers and `kv_heads` kv heads; `page` tokens a page.

    Pages are numbered within their space: page i lies in block i // per_block, where per_block is 1 for SHARED, `layers` for
    PER_LAYER, `layers` * `kv_heads` for PER_HEAD, and what define() was reported for pages of a format. A sequence that is open has
    one lane, one a layer, or one a layer and kv head (layer * kv_heads + head). All figures count blocks.
    """

    def __init__(self, blocks: int, layers: int, kv_heads: int, page: int = 32, sharing: bool = True) -> None:
        self.blocks = blocks
        self.page = page
        self.sharing = sharing
        self.prefix = PrefixTree(page)
        self.peak = 0  # most blocks in use since the last reset_peak
        self._lanes = {Lanes.SHARED: 1, Lanes.PER_LAYER: layers, Lanes.PER_HEAD: layers * kv_heads}
        self._pools = {Space(kind): _Pool(Space(kind), count, count) for kind, count in self._lanes.items()}
        self._free = list(range(blocks - 1, -1, -1))
        self._held: dict[int, _Held] = {}

    def define(self, space: Space, per_block: int) -> None:
        """A further space, whose pages are of another size: `per_block` of them are carved from a block."""
        assert per_block > 0, f"{space}: a page is larger than a block"
        pool = self._pools.setdefault(space, _Pool(space, per_block, self._lanes[space.lanes]))
        assert pool.per_block == per_block, f"{space}: {per_block} pages a block, defined with {pool.per_block}"

    # ---- figures

    def available(self) -> int:
        """Blocks that can be had: free ones, and published pages that nobody lists."""
        return len(self._free) + len(self.prefix.idle)

    def used(self) -> int:
        """Blocks that hold at least one page of an open sequence."""
        return self.blocks - self.available()

    def reset_peak(self) -> None:
        self.peak = self.used()

    def need(self, seq: Sequence, rows: int, matched: int = 0) -> int:
        """Blocks for `rows` more rows of an open sequence, or for the first `rows` tokens of one that is not open and
        will attach `matched` of them; an open one's rows beyond its pending tokens are drafts. An upper bound, also as a sum:
        free pages of carved blocks are not counted on. While the sum is at most available(), neither reserve nor what follows the
        commit at a sync point (keep, encode, splice) lacks pages."""
        held = self._held.get(seq.id) or self._fresh(seq)
        size, tail = self.page, held.chain + held.nodes + rows
        drafted = max(0, tail - seq.pending) if seq.id in self._held else 0
        evicts = seq.cache.max_slots < NEVER and seq.stored + tail >= seq.shareable_tokens  # survivors of pages that others list are copied
        exact = coded = 0
        for lane in held.lanes:
            own = sum(self._private(held.pool, page) for page in lane.pages) if evicts else len(lane.pages)
            end = max(lane.length, min(lane.length + tail - drafted, seq.cache.max_slots)) + drafted
            if held.coded is not None:
                coded += max(0, end // seq.cache.encoded * seq.cache.encoded // size - len(lane.coded))
                end = min(end, size * len(lane.coded) + seq.cache.encoded + drafted)
            exact += max(0, -(-end // size) - len(lane.coded) - own)
        blocks = -(-exact // held.pool.per_block) - (0 if evicts else matched // size)
        return blocks + (-(-coded // held.coded.per_block) if held.coded is not None else 0)

    def gain(self, seq: Sequence) -> int:
        """Blocks that freeing `seq` would add to available(): those whose pages nobody else lists."""
        held = self._held[seq.id]
        gained = 0
        for pool, listed in held.listed():
            mine = Counter(page // pool.per_block for page in listed if pool.refs[page] == 1)
            gained += sum(count + len(pool.spare.get(block, ())) == pool.per_block for block, count in mine.items())
        return gained

    # ---- sharing

    def match(self, tokens: Seq[int], salt: str) -> int:
        """How many leading tokens lie in published pages: whole pages, at most len(tokens) - 1. Changes nothing."""
        return len(self.prefix.walk(tokens, salt)) * self.page if self.sharing else 0

    def idle_matched(self, tokens: Seq[int], salt: str) -> int:
        """Pages of that match which available() counts, but which whoever attaches them takes away."""
        return sum(node.page in self.prefix.idle for node in self.prefix.walk(tokens, salt)) if self.sharing else 0

    def attach(self, seq: Sequence, n: int) -> None:
        """Lists the published pages of the first `n` tokens, `n` from match, in the empty SHARED lane of `seq`."""
        if not n:
            return
        held = self._held[seq.id]
        nodes = self.prefix.walk(seq.tokens, seq.request.salt)[: n // self.page]
        lane = held.lanes[0]
        assert held.pool.space == Space() and not lane.pages, f"sequence {seq.id}: only an empty SHARED lane attaches"
        assert n == len(nodes) * self.page, f"sequence {seq.id}: {n} tokens to attach, {len(nodes)} pages match"
        for node in nodes:
            self._list(held.pool, node.page)
            lane.pages.append(node.page)
        lane.length = seq.stored = n
        held.cursor, held.published, held.view = nodes[-1], len(nodes), None
        self._mark()

    def publish(self, seq: Sequence) -> None:
        """Publishes the full committed pages of a SHARED lane that nothing was evicted from. O(pages that became full).

        Where an equal page is published already, this one stays private and the next is published under that one.
        """
        held = self._held[seq.id]
        lane = held.lanes[0]
        full = min(lane.length, seq.shareable_tokens) // self.page
        if full <= held.published or not self.sharing or held.pool.space != Space() or held.edited:
            return
        if not held.cursor.alive:  # an equal page under which this sequence published was evicted: from the start
            held.cursor, held.published = self.prefix.root, 0
        for i in range(held.published, full):
            tokens = seq.tokens[i * self.page : (i + 1) * self.page]
            held.cursor = self.prefix.insert(held.cursor, seq.request.salt, tokens, lane.pages[i])
        held.published = full

    def forget(self) -> int:
        """Lets go of the published pages that nobody lists, and returns how many they were; the others stay shared."""
        count = len(self.prefix.idle)
        while self.prefix.idle:
            for page in self.prefix.evict():
                self._release(self._pools[Space()], page)
        return count

    # ---- sequences

    def open(self, seq: Sequence) -> None:
        """Empty lanes of kind `seq.cache.lanes`; nothing is stored."""
        assert seq.id not in self._held, f"sequence {seq.id} is open already"
        self._held[seq.id] = self._fresh(seq)
        seq.stored = 0

    def _fresh(self, seq: Sequence) -> _Held:
        plan = seq.cache
        pool = self._pools[Space(plan.lanes, plan.format)]
        block = self._pools[Space(plan.lanes, plan.coded)] if plan.coded else None
        return _Held(seq, pool, block, [_Lane([]) for _ in range(pool.lanes)], self.prefix.root)

    def free(self, seq: Sequence) -> None:
        """Lets go of all pages and forgets the sequence. Published pages stay while memory lasts."""
        assert seq.id in self._held, f"sequence {seq.id} is not open"
        for pool, pages in self._held.pop(seq.id).listed():
            self._drop(pool, pages)

    def reserve(self, work: Seq[Work], trees: Seq[TokenTree]) -> PageView:
        """Grows every tail by the rows packed now: `w.rows` chain rows unless it has them, and the nodes from w.first on.

        May be called again before commit, with w.first = the nodes that the tail has. Raises OutOfPages and changes nothing
        where memory lacks.
        """
        growth: list[tuple[_Held, int, int, int]] = []
        wanted: dict[Space, int] = {}
        for w, tree in zip(work, trees, strict=True):
            held = self._held[w.seq.id]
            chain = 0 if held.chain else w.rows
            nodes = len(tree) - w.first
            assert chain <= w.seq.pending, f"sequence {w.seq.id}: {chain} rows to run, {w.seq.pending} pending"
            assert nodes >= 0 and held.nodes == w.first, f"sequence {w.seq.id}: tail of {held.nodes} nodes, first {w.first}"
            assert held.chain in (0, w.rows), f"sequence {w.seq.id}: a tail of {held.chain} chain rows goes on with {w.rows}"
            missing = held.missing(chain + nodes, self.page)
            if missing:
                wanted[held.pool.space] = wanted.get(held.pool.space, 0) + missing
            growth.append((held, chain, nodes, missing))
        if wanted:
            self._ensure(wanted)
        view = PageView([], [], [], [], [], [], [], [])
        for held, chain, nodes, missing in growth:
            tail = held.chain + held.nodes
            held.chain += chain
            held.nodes += nodes
            if missing:
                self._grow(held, view.fresh)
            view.kinds.append(held.pool.space.lanes)
            pages, coded = held.arrays()
            view.pages.append(pages)
            view.coded.append(coded)
            view.lengths.append(np.array([lane.length for lane in held.lanes], np.int32))
            view.tail.append(tail)
            view.chain.append(held.chain)
            view.positions.append(
                [lane.positions[: lane.length] for lane in held.lanes if lane.positions is not None] if held.edited else None
            )
        if wanted:
            self._mark()
        return view

    def commit(self, work: Seq[Work], accepted: Seq[Accepted]) -> list[Moves]:
        """The chain and the accepted path become committed slots; all else of the tail is gone. At most one Moves a kind.

        Chain rows lie right already; the k-th node of the path moves to slot length + chain + k, never to the right:

            slot       0 .. 63     64      65   66   67   68   69
            before     committed   chain   n0   n1   n2   n3   n4       length 64, accepted path (n1, n4)
            move                           ^----'              |        66 -> 65
                                                ^--------------'        69 -> 66
            after      committed ...       n1   n4                      length 67; pages behind slot 66 are freed

        Then seq.tokens and seq.stored advance.
        """
        moved: dict[Space, tuple[list[int], list[int]]] = {}
        size = self.page
        for w, (path, tokens, _) in zip(work, accepted, strict=True):
            held = self._held[w.seq.id]
            assert held.chain == w.rows, f"sequence {w.seq.id}: {w.rows} rows to commit, {held.chain} reserved"
            kept = len(path)
            if path:
                assert path[0] >= 0 and path[-1] < held.nodes and all(a < b for a, b in pairwise(path)), (
                    f"sequence {w.seq.id}: path {path} in a tail of {held.nodes} nodes"
                )
            if path and path[-1] != kept - 1:
                src, dst = moved.setdefault(held.pool.space, ([], []))
                for lane in held.lanes:
                    base, pages = lane.length + held.chain - size * len(lane.coded), lane.pages
                    for k, node in enumerate(path):
                        if node != k:
                            src.append(pages[(base + node) // size] * size + (base + node) % size)
                            dst.append(pages[(base + k) // size] * size + (base + k) % size)
            for lane in held.lanes:
                lane.append(w.seq.stored, w.rows + kept)
            self._cut(held)
            w.seq.advance(w.rows, tokens, kept)
        return [Moves(space, np.array(src, np.int32), np.array(dst, np.int32)) for space, (src, dst) in moved.items()]

    def discard(self, seq: Sequence) -> None:
        """Drops the tail, if there is one."""
        held = self._held.get(seq.id)
        if held is not None:
            self._cut(held)

    def fork(self, seq: Sequence, child: Sequence) -> Moves:
        """Opens `child` with the same lanes: full pages are listed by both, the partial one is copied whole, so that
        nothing of its former owner is left in the new one. The tail must be empty."""
        held = self._held[seq.id]
        assert not held.chain, f"sequence {seq.id}: fork while a tail is open"
        same = (child.cache.lanes, child.cache.format, child.cache.coded) == (seq.cache.lanes, seq.cache.format, seq.cache.coded)
        assert child.id not in self._held and same, f"sequence {child.id}: open, or of another space"
        pool, size = held.pool, self.page
        self._ensure({pool.space: sum(lane.length % size > 0 for lane in held.lanes)})
        lanes, src, dst = [], [], []
        for lane in held.lanes:
            full = lane.length // size - len(lane.coded)
            pages = lane.pages[:full]
            for page in lane.coded:
                assert held.coded is not None
                self._list(held.coded, page)
            for page in pages:
                self._list(pool, page)
            if full < len(lane.pages):
                pages.append(self._take(pool))
                src.append(lane.pages[full])
                dst.append(pages[full])
            positions = None if lane.positions is None else lane.positions[: lane.length].copy()
            lanes.append(_Lane(pages, lane.length, list(lane.coded), lane.folded, positions))
        self._held[child.id] = _Held(child, pool, held.coded, lanes, held.cursor, held.published)
        child.stored, child.shareable_tokens = seq.stored, min(child.shareable_tokens, seq.shareable_tokens)
        self._mark()
        places = np.arange(len(src) * size)
        return Moves(pool.space, self._places(src, places), self._places(dst, places))

    def check(self) -> None:
        """AssertionError where an invariant broke: references equal listings; units in use + free units + free blocks =
        pool; no lane longer than its pages; coded pages full; published pages full and never at a lane's writable end."""
        size = self.page
        listed: dict[Space, Counter[int]] = {space: Counter() for space in self._pools}
        for held in self._held.values():
            name = f"sequence {held.seq.id}"
            refs, shared_kind = held.pool.refs, held.pool.space == Space()
            for pool, pages in held.listed():
                listed[pool.space].update(pages)
            for index, lane in enumerate(held.lanes):
                end = lane.length + held.chain + held.nodes
                count, skipped = len(lane.pages) + len(lane.coded), len(lane.coded)
                assert count == -(-end // size), f"{name} lane {index}: {count} pages for {end} slots"
                assert skipped * size <= lane.length, f"{name} lane {index}: {skipped} coded pages for {lane.length} slots"
                assert held.edited or lane.length == held.seq.stored, f"{name} lane {index}: {lane.length} slots, {held.seq.stored} stored"
                assert held.edited == (lane.positions is not None), f"{name} lane {index}: positions of some lanes only"
                where = np.arange(lane.length) if lane.positions is None else lane.positions
                for i, page in enumerate(lane.pages, skipped):
                    published = shared_kind and page in self.prefix
                    if i >= lane.length // size:
                        assert refs.get(page) == 1 and not published, f"{name} lane {index}: writable page {page} is shared"
                    elif published:
                        tokens = tuple(held.seq.tokens[p] for p in where[i * size : (i + 1) * size])
                        key = (held.seq.request.salt, tokens)
                        assert self.prefix.nodes[page].key == key, f"{name}: page {page} is published for other tokens"
            seen, held.view = held.view, None
            assert seen is None or all(map(np.array_equal, seen, held.arrays())), f"{name}: stale page arrays"
        self.prefix.check()
        shared = self._pools[Space()]
        idle = set(self.prefix.nodes) - set(shared.refs)
        assert idle == set(self.prefix.idle), f"idle pages {sorted(self.prefix.idle)}, published and unlisted {sorted(idle)}"
        blocks: list[int] = list(self._free)
        for pool in self._pools.values():
            assert pool.refs == listed[pool.space], f"{pool.space}: references {pool.refs}, listings {dict(listed[pool.space])}"
            spare = [page for pages in pool.spare.values() for page in pages]
            taken = list(pool.refs) + (list(idle) if pool is shared else [])
            assert len(spare) == pool.spares, f"{pool.space}: {len(spare)} free pages, counted {pool.spares}"
            assert all(page // pool.per_block == block for block, pages in pool.spare.items() for page in pages)
            in_block = Counter(page // pool.per_block for page in taken)
            units = Counter(page // pool.per_block for page in {*taken, *spare})
            assert len({*taken, *spare}) == len(taken) + len(spare), f"{pool.space}: a page is both free and in use"
            assert all(n == pool.per_block for n in units.values()), f"{pool.space}: pages of a block are lost: {dict(units)}"
            assert in_block.keys() == units.keys(), f"{pool.space}: a block without pages in use was not given back"
            blocks += units
        assert sorted(blocks) == list(range(self.blocks)), f"blocks lost or owned twice: {sorted(blocks)}"

    # ---- pages

    def _ensure(self, wanted: dict[Space, int]) -> None:
        """Raises OutOfPages unless so many pages of each kind can be taken."""
        blocks = sum(-(-max(0, n - self._pools[space].spares) // self._pools[space].per_block) for space, n in wanted.items())
        if blocks > self.available():
            raise OutOfPages(f"{blocks} blocks wanted, {self.available()} of {self.blocks} available")

    def _mark(self) -> None:
        self.peak = max(self.peak, self.used())

    def _grow(self, held: _Held, fresh: list[tuple[Space, int]]) -> None:
        """Takes the pages that the lanes lack for their tail."""
        tail = held.chain + held.nodes
        for lane in held.lanes:
            for _ in range(-(-(lane.length + tail) // self.page) - len(lane.pages) - len(lane.coded)):
                page = self._take(held.pool)
                lane.pages.append(page)
                fresh.append((held.pool.space, page))
        held.view = None

    def _cut(self, held: _Held) -> None:
        """Ends the tail and lets go of the pages behind the committed slots."""
        held.chain = held.nodes = 0
        for lane in held.lanes:
            count = -(-lane.length // self.page) - len(lane.coded)
            if count < len(lane.pages):
                self._drop(held.pool, reversed(lane.pages[count:]))
                del lane.pages[count:]
                held.view = None

    def _take(self, pool: _Pool) -> int:
        """A page with one listing; carves a block, and evicts for it, where no carved one has room."""
        if not pool.spare:
            if not self._free:
                for page in self.prefix.evict():
                    self._release(self._pools[Space()], page)
            block = self._free.pop()
            pool.spare[block] = list(range((block + 1) * pool.per_block - 1, block * pool.per_block - 1, -1))
            pool.spares += pool.per_block
        block, pages = next(iter(pool.spare.items()))
        page = pages.pop()
        if not pages:
            del pool.spare[block]
        pool.spares -= 1
        pool.refs[page] = 1
        return page

    def _list(self, pool: _Pool, page: int) -> None:
        """One more lane lists a page that is listed or idle."""
        if page in pool.refs:
            pool.refs[page] += 1
        else:
            self.prefix.wake(page)
            pool.refs[page] = 1

    def _drop(self, pool: _Pool, pages: Iterable[int]) -> None:
        """One lane less lists these pages. Last page first: see PrefixTree.rest."""
        for page in pages:
            if pool.refs[page] > 1:
                pool.refs[page] -= 1
                continue
            del pool.refs[page]
            if pool.space == Space() and page in self.prefix:
                self.prefix.rest(page)
            else:
                self._release(pool, page)

    def _release(self, pool: _Pool, page: int) -> None:
        block = page // pool.per_block
        pages = pool.spare.setdefault(block, [])
        pages.append(page)
        pool.spares += 1
        if len(pages) == pool.per_block:
            del pool.spare[block]
            pool.spares -= pool.per_block
            self._free.append(block)

    def _private(self, pool: _Pool, page: int) -> bool:
        return pool.refs[page] == 1 and not (pool.space == Space() and page in self.prefix)

    def _places(self, pages: list[int], slots: I32 | I64) -> I32:
        """Where these slots of a lane of `pages` lie."""
        return (np.array(pages, np.int32)[slots // self.page] * self.page + slots % self.page).astype(np.int32)
