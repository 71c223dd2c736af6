"""Where keys lie: slabs, lanes, the tentative tail, commit, keep, fork and sharing. Integers only; no tensors.

A lane is a growing array of slots in text order without holes: slot i is place i % 32 of its page i // 32. Memory is
cut into slabs of equal bytes (32 tokens of all layers and kv heads). A slab is one SHARED page, or is carved into pages
of one other lane kind, and is free again when the last of them is. Only the end of a lane is written, and the page
there is listed by that lane alone: full pages can be shared without copying on write.

    A: [p7][p9][p12, 5 slots]     B, same first 64 tokens: [p7][p9][p31]     fork of A: [p7][p9][p40, copy of p12]

Paged keys: Kwon et al., Efficient Memory Management for Large Language Model Serving with PagedAttention, 2023
(arXiv 2309.06180); sharing through a radix tree: Zheng et al., SGLang, 2023 (arXiv 2312.07104).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from redraft.core.batch import PageView
from redraft.core.plan import Accepted, Work
from redraft.core.sequence import Lanes, Sequence
from redraft.core.tree import I32, TokenTree
from redraft.kv.prefix import Node, PrefixTree

_NONE = np.zeros(0, np.int32)


class OutOfPages(AssertionError):
    """More pages were asked for than `available()` promised: the scheduler's bug, not the user's."""


class Moves(NamedTuple):
    """Slots to copy, all gathered and then scattered. A place is page * 32 + offset in units of `kind`."""

    kind: Lanes
    src: I32
    dst: I32


@dataclass(eq=False, slots=True)
class _Lane:
    pages: list[int]
    length: int = 0  # committed slots
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
    """The pages of one lane kind: `per_slab` to a slab, slab s holding pages s * per_slab and on."""

    def __init__(self, kind: Lanes, per_slab: int) -> None:
        self.kind = kind
        self.per_slab = per_slab
        self.refs: dict[int, int] = {}  # page -> how many lanes list it; no entry for an idle published page
        self.spare: dict[int, list[int]] = {}  # carved slab -> its free pages; slabs without any are left out
        self.spares = 0


@dataclass(eq=False, slots=True)
class _Held:
    """What one open sequence holds. Its tail is `chain` chain rows, then `nodes` nodes."""

    seq: Sequence
    pool: _Pool
    lanes: list[_Lane]
    cursor: Node  # the published prefix of the lane ends here ...
    published: int = 0  # ... after so many pages
    chain: int = 0
    nodes: int = 0
    view: I32 | None = None  # i32[lanes, n], rebuilt when pages change

    @property
    def edited(self) -> bool:
        """Keys were evicted: what is computed from here on is no function of the tokens alone."""
        return self.lanes[0].positions is not None

    def missing(self, rows: int, page: int) -> int:
        """Pages that the lanes lack for `rows` rows behind the tail."""
        more = self.chain + self.nodes + rows
        return sum(-(-(lane.length + more) // page) - len(lane.pages) for lane in self.lanes)

    def pages(self) -> I32:
        """i32[lanes, n], shorter lanes padded with 0 on the right."""
        if self.view is None:
            self.view = np.array(self.padded(), np.int32)
        return self.view

    def padded(self) -> list[list[int]]:
        width = max(len(lane.pages) for lane in self.lanes)
        return [lane.pages + [0] * (width - len(lane.pages)) for lane in self.lanes]


class PageTable:
    """`slabs` slabs for a model of `layers` layers and `kv_heads` kv heads; `page` tokens a page.

    A page id counts units of its lane kind: SHARED s is slab s, PER_LAYER s * layers + i and PER_HEAD
    s * layers * kv_heads + i lie in slab s. A sequence that is open has `lanes` lanes: one, one a layer, or one a layer
    and kv head (layer * kv_heads + head). `slabs`, `used()`, `peak` and `available()` count slabs.
    """

    def __init__(self, slabs: int, layers: int, kv_heads: int, page: int = 32, sharing: bool = True) -> None:
        self.slabs = slabs
        self.page = page
        self.sharing = sharing
        self.prefix = PrefixTree(page)
        self.peak = 0  # most slabs in use since the last reset_peak
        lanes = {Lanes.SHARED: 1, Lanes.PER_LAYER: layers, Lanes.PER_HEAD: layers * kv_heads}
        self._pools = {kind: _Pool(kind, count) for kind, count in lanes.items()}
        self._free = list(range(slabs - 1, -1, -1))
        self._held: dict[int, _Held] = {}

    # ---- figures

    def available(self) -> int:
        """Slabs that can be had: free ones, and published pages that nobody lists."""
        return len(self._free) + len(self.prefix.idle)

    def used(self) -> int:
        """Slabs that hold at least one page of an open sequence."""
        return self.slabs - self.available()

    def reset_peak(self) -> None:
        self.peak = self.used()

    def need(self, seq: Sequence, rows: int, matched: int = 0) -> int:
        """Slabs for `rows` more rows of an open sequence, or for the first `rows` tokens of one that is not open and
        will attach `matched` of them. An upper bound, also as a sum over sequences: free pages of carved slabs are not
        counted on. While the sum is at most available(), reserve succeeds."""
        held = self._held.get(seq.id)
        if held is None:  # as many lanes as pages in a slab, all of one length
            return -(-rows // self.page) - matched // self.page
        return -(-held.missing(rows, self.page) // held.pool.per_slab)

    def gain(self, seq: Sequence) -> int:
        """Slabs that freeing `seq` would add to available(): those whose pages nobody else lists."""
        held = self._held[seq.id]
        pool = held.pool
        mine = Counter(page // pool.per_slab for lane in held.lanes for page in lane.pages if pool.refs[page] == 1)
        return sum(count + len(pool.spare.get(slab, ())) == pool.per_slab for slab, count in mine.items())

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
        assert held.pool.kind is Lanes.SHARED and not lane.pages, f"sequence {seq.id}: only an empty SHARED lane attaches"
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
        full = lane.length // self.page
        if full == held.published or not self.sharing or held.pool.kind is not Lanes.SHARED or held.edited:
            return
        if not held.cursor.alive:  # an equal page under which this sequence published was evicted: from the start
            held.cursor, held.published = self.prefix.root, 0
        for i in range(held.published, full):
            tokens = seq.tokens[i * self.page : (i + 1) * self.page]
            held.cursor = self.prefix.insert(held.cursor, seq.request.salt, tokens, lane.pages[i])
        held.published = full

    # ---- sequences

    def open(self, seq: Sequence) -> None:
        """Empty lanes of kind `seq.lanes`; nothing is stored."""
        assert seq.id not in self._held, f"sequence {seq.id} is open already"
        pool = self._pools[seq.lanes]
        self._held[seq.id] = _Held(seq, pool, [_Lane([]) for _ in range(pool.per_slab)], self.prefix.root)
        seq.stored = 0

    def free(self, seq: Sequence) -> None:
        """Lets go of all pages and forgets the sequence. Published pages stay while memory lasts."""
        assert seq.id in self._held, f"sequence {seq.id} is not open"
        held = self._held.pop(seq.id)
        for lane in held.lanes:
            self._drop(held.pool, reversed(lane.pages))

    def reserve(self, work: Seq[Work], trees: Seq[TokenTree]) -> PageView:
        """Grows every tail by the rows packed now: `w.rows` chain rows unless it has them, and the nodes from w.first on.

        May be called again before commit, with w.first = the nodes that the tail has. Raises OutOfPages and changes nothing
        where memory lacks.
        """
        growth: list[tuple[_Held, int, int, int]] = []
        wanted: dict[Lanes, int] = {}
        for w, tree in zip(work, trees, strict=True):
            held = self._held[w.seq.id]
            chain = 0 if held.chain else w.rows
            nodes = len(tree) - w.first
            assert chain <= w.seq.pending, f"sequence {w.seq.id}: {chain} rows to run, {w.seq.pending} pending"
            assert nodes >= 0 and held.nodes == w.first, f"sequence {w.seq.id}: tail of {held.nodes} nodes, first {w.first}"
            assert held.chain in (0, w.rows), f"sequence {w.seq.id}: a tail of {held.chain} chain rows goes on with {w.rows}"
            missing = held.missing(chain + nodes, self.page)
            if missing:
                wanted[held.pool.kind] = wanted.get(held.pool.kind, 0) + missing
            growth.append((held, chain, nodes, missing))
        if wanted:
            self._ensure(wanted)
        view = PageView([], [], [], [], [], [], [])
        for held, chain, nodes, missing in growth:
            tail = held.chain + held.nodes
            held.chain += chain
            held.nodes += nodes
            if missing:
                self._grow(held, view.fresh)
            view.kinds.append(held.pool.kind)
            view.pages.append(held.pages())
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
        moved: dict[Lanes, tuple[list[int], list[int]]] = {}
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
                src, dst = moved.setdefault(held.pool.kind, ([], []))
                for lane in held.lanes:
                    base, pages = lane.length + held.chain, lane.pages
                    for k, node in enumerate(path):
                        if node != k:
                            src.append(pages[(base + node) // size] * size + (base + node) % size)
                            dst.append(pages[(base + k) // size] * size + (base + k) % size)
            for lane in held.lanes:
                lane.append(w.seq.stored, w.rows + kept)
            self._cut(held)
            w.seq.advance(w.rows, tokens, kept)
        return [Moves(kind, np.array(src, np.int32), np.array(dst, np.int32)) for kind, (src, dst) in moved.items()]

    def discard(self, seq: Sequence) -> None:
        """Drops the tail, if there is one."""
        held = self._held.get(seq.id)
        if held is not None:
            self._cut(held)

    def keep(self, seq: Sequence, lane: int, slots: ArrayLike) -> Moves:
        """Eviction: only `slots` (ascending) of this lane survive, and close up. The tail must be empty.

        A page that someone else lists, or that is published, is not written: its survivors go to a fresh page. Places
        of a fresh page behind the lane's end get a copy of the last survivor, so that nothing of its former owner is left.
        """
        held = self._held[seq.id]
        assert not held.chain, f"sequence {seq.id}: keep while a tail is open"
        it, pool, size = held.lanes[lane], held.pool, self.page
        keep = np.asarray(slots, np.int32)
        n = len(keep)
        assert n == 0 or (keep[0] >= 0 and keep[-1] < it.length and bool((np.diff(keep) > 0).all())), (
            f"sequence {seq.id}: slots to keep must ascend within 0..{it.length - 1}"
        )
        if n == it.length:
            return Moves(pool.kind, _NONE, _NONE)
        if not held.edited:
            for other in held.lanes:
                other.positions = np.arange(other.length, dtype=np.int32)
        assert it.positions is not None
        shifted = np.flatnonzero(keep != np.arange(n))
        first = (int(shifted[0]) if len(shifted) else n) // size  # pages before it stay as they are
        old = it.pages
        new = old[: -(-n // size)]
        foreign = [i for i in range(first, len(new)) if not self._private(pool, old[i])]
        self._ensure({pool.kind: len(foreign)})
        for i in foreign:
            new[i] = self._take(pool)
        self._mark()
        filled = len(new) * size if foreign and foreign[-1] == len(new) - 1 else n
        to = np.arange(first * size, filled, dtype=np.int32)
        at = keep[np.minimum(to, n - 1)]
        src = np.array(old, np.int32)[at // size] * size + at % size
        dst = np.array(new, np.int32)[to // size] * size + to % size
        it.positions = it.positions[keep]
        it.pages, it.length, held.view = new, n, None
        gone = set(old) - set(new)
        self._drop(pool, [page for page in reversed(old) if page in gone])
        moved = src != dst
        return Moves(pool.kind, src[moved], dst[moved])

    def fork(self, seq: Sequence, child: Sequence) -> Moves:
        """Opens `child` with the same lanes: full pages are listed by both, the partial one is copied whole, so that
        nothing of its former owner is left in the new one. The tail must be empty."""
        held = self._held[seq.id]
        assert not held.chain, f"sequence {seq.id}: fork while a tail is open"
        assert child.id not in self._held and child.lanes is seq.lanes, f"sequence {child.id}: open, or of another lane kind"
        pool, size = held.pool, self.page
        self._ensure({pool.kind: sum(lane.length % size > 0 for lane in held.lanes)})
        lanes, src, dst = [], [], []
        for lane in held.lanes:
            full = lane.length // size
            pages = lane.pages[:full]
            for page in pages:
                self._list(pool, page)
            if full < len(lane.pages):
                pages.append(self._take(pool))
                src.append(lane.pages[full])
                dst.append(pages[full])
            lanes.append(_Lane(pages, lane.length, None if lane.positions is None else lane.positions[: lane.length].copy()))
        self._held[child.id] = _Held(child, pool, lanes, held.cursor, held.published)
        child.stored = seq.stored
        self._mark()
        return Moves(pool.kind, self._places(src), self._places(dst))

    def check(self) -> None:
        """AssertionError where an invariant broke: references equal listings; units in use + free units + free slabs =
        pool; no lane longer than its pages; published pages full and never at a lane's writable end."""
        size = self.page
        listed: dict[Lanes, Counter[int]] = {kind: Counter() for kind in Lanes}
        for held in self._held.values():
            name = f"sequence {held.seq.id}"
            refs = self._pools[held.pool.kind].refs
            for index, lane in enumerate(held.lanes):
                end = lane.length + held.chain + held.nodes
                assert len(lane.pages) == -(-end // size), f"{name} lane {index}: {len(lane.pages)} pages for {end} slots"
                assert held.edited or lane.length == held.seq.stored, f"{name} lane {index}: {lane.length} slots, {held.seq.stored} stored"
                assert held.edited == (lane.positions is not None), f"{name} lane {index}: positions of some lanes only"
                listed[held.pool.kind].update(lane.pages)
                for i, page in enumerate(lane.pages):
                    published = held.pool.kind is Lanes.SHARED and page in self.prefix
                    if i >= lane.length // size:
                        assert refs.get(page) == 1 and not published, f"{name} lane {index}: writable page {page} is shared"
                    elif published:
                        key = (held.seq.request.salt, tuple(held.seq.tokens[i * size : (i + 1) * size]))
                        assert self.prefix.nodes[page].key == key, f"{name}: page {page} is published for other tokens"
            assert held.view is None or held.view.tolist() == held.padded(), f"{name}: stale page array"
        self.prefix.check()
        shared = self._pools[Lanes.SHARED]
        idle = set(self.prefix.nodes) - set(shared.refs)
        assert idle == set(self.prefix.idle), f"idle pages {sorted(self.prefix.idle)}, published and unlisted {sorted(idle)}"
        slabs: list[int] = list(self._free)
        for pool in self._pools.values():
            assert pool.refs == listed[pool.kind], f"{pool.kind}: references {pool.refs}, listings {dict(listed[pool.kind])}"
            spare = [page for pages in pool.spare.values() for page in pages]
            taken = list(pool.refs) + (list(idle) if pool is shared else [])
            assert len(spare) == pool.spares, f"{pool.kind}: {len(spare)} free pages, counted {pool.spares}"
            assert all(page // pool.per_slab == slab for slab, pages in pool.spare.items() for page in pages)
            in_slab = Counter(page // pool.per_slab for page in taken)
            units = Counter(page // pool.per_slab for page in {*taken, *spare})
            assert len({*taken, *spare}) == len(taken) + len(spare), f"{pool.kind}: a page is both free and in use"
            assert all(n == pool.per_slab for n in units.values()), f"{pool.kind}: pages of a slab are lost: {dict(units)}"
            assert in_slab.keys() == units.keys(), f"{pool.kind}: a slab without pages in use was not given back"
            slabs += units
        assert sorted(slabs) == list(range(self.slabs)), f"slabs lost or owned twice: {sorted(slabs)}"

    # ---- pages

    def _ensure(self, wanted: dict[Lanes, int]) -> None:
        """Raises OutOfPages unless so many pages of each kind can be taken."""
        slabs = sum(-(-max(0, n - self._pools[kind].spares) // self._pools[kind].per_slab) for kind, n in wanted.items())
        if slabs > self.available():
            raise OutOfPages(f"{slabs} slabs wanted, {self.available()} of {self.slabs} available")

    def _mark(self) -> None:
        self.peak = max(self.peak, self.used())

    def _grow(self, held: _Held, fresh: list[tuple[Lanes, int]]) -> None:
        """Takes the pages that the lanes lack for their tail."""
        tail = held.chain + held.nodes
        for lane in held.lanes:
            for _ in range(-(-(lane.length + tail) // self.page) - len(lane.pages)):
                page = self._take(held.pool)
                lane.pages.append(page)
                fresh.append((held.pool.kind, page))
        held.view = None

    def _cut(self, held: _Held) -> None:
        """Ends the tail and lets go of the pages behind the committed slots."""
        held.chain = held.nodes = 0
        for lane in held.lanes:
            count = -(-lane.length // self.page)
            if count < len(lane.pages):
                self._drop(held.pool, reversed(lane.pages[count:]))
                del lane.pages[count:]
                held.view = None

    def _take(self, pool: _Pool) -> int:
        """A page with one listing; carves a slab, and evicts for it, where no carved one has room."""
        if not pool.spare:
            if not self._free:
                for page in self.prefix.evict():
                    self._release(self._pools[Lanes.SHARED], page)
            slab = self._free.pop()
            pool.spare[slab] = list(range((slab + 1) * pool.per_slab - 1, slab * pool.per_slab - 1, -1))
            pool.spares += pool.per_slab
        slab, pages = next(iter(pool.spare.items()))
        page = pages.pop()
        if not pages:
            del pool.spare[slab]
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
            if pool.kind is Lanes.SHARED and page in self.prefix:
                self.prefix.rest(page)
            else:
                self._release(pool, page)

    def _release(self, pool: _Pool, page: int) -> None:
        slab = page // pool.per_slab
        pages = pool.spare.setdefault(slab, [])
        pages.append(page)
        pool.spares += 1
        if len(pages) == pool.per_slab:
            del pool.spare[slab]
            pool.spares -= pool.per_slab
            self._free.append(slab)

    def _private(self, pool: _Pool, page: int) -> bool:
        return pool.refs[page] == 1 and not (pool.kind is Lanes.SHARED and page in self.prefix)

    def _places(self, pages: list[int]) -> I32:
        """All places of these pages."""
        return np.array([page * self.page + offset for page in pages for offset in range(self.page)], np.int32)
