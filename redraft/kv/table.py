"""The page table: blocks, lanes, the tentative tail, commit, fork and sharing. Integers only; no tensors.

A lane is a growing array of slots in text order without gaps: slot i is place i % 32 of page i // 32 of the lane. Memory is cut into
blocks of equal size (32 tokens of all layers and kv heads). A block is one SHARED page, or it is cut into pages of one other space
(a lane kind and a page format). Such a block is free again when all its pages are. Only the end of a lane is written, and only that
lane lists the page there. Full pages can therefore be shared without copy-on-write.

    A: [p7][p9][p12, 5 slots]     B, same first 64 tokens: [p7][p9][p31]     fork of A: [p7][p9][p40, copy of p12]

Paged keys: Kwon et al., Efficient Memory Management for Large Language Model Serving with PagedAttention, 2023
(arXiv 2309.06180); sharing through a radix tree: Zheng et al., SGLang, 2023 (arXiv 2312.07104).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from redraft.core.batch import PageView
from redraft.core.plan import Accepted, Work
from redraft.core.sequence import UNLIMITED, Lanes, Sequence, Space
from redraft.core.tree import F32, I32, I64, TokenTree
from redraft.kv.prefix import Node, PrefixTree


class OutOfPages(AssertionError):
    """More pages were requested than `available()` reported: a bug of the scheduler, not of the user."""


class Moves(NamedTuple):
    """Slots to copy; all are read before any is written. src, dst: i32[n] places, page * 32 + offset, with pages of `space`. delta:
    the number of positions by which keys are rotated."""

    space: Space
    src: I32
    dst: I32
    delta: int = 0


@dataclass(eq=False, slots=True)
class _Lane:
    pages: list[int]
    length: int = 0  # committed slots
    encoded: list[int] = field(default_factory=list)  # pages in the format of encoded pages, before `pages`
    demoted: int = 0  # leading slots that the eviction policy no longer counts, in encoded pages as far as these are full
    summarized: int = 0  # leading full pages that were summarised
    positions: I32 | None = None  # of the committed slots, with room to grow; None while slot i holds position i
    logs: F32 | None = None  # the logarithms of the numbers of tokens that slots stand for, with room to grow; None while all are 0

    def append(self, start: int, count: int) -> None:
        """Adds `count` committed slots at positions start..start + count."""
        end = self.length + count
        if self.positions is not None:
            if end > len(self.positions):
                room = np.empty(2 * end, np.int32)
                room[: self.length] = self.positions[: self.length]
                self.positions = room
            self.positions[self.length : end] = np.arange(start, start + count)
        if self.logs is not None:
            if end > len(self.logs):
                self.logs = np.concatenate([self.logs[: self.length], np.zeros(2 * end - self.length, np.float32)])
            self.logs[self.length : end] = 0
        self.length = end


class _Pool:
    """The pages of one space. Block b holds pages b * per_block..(b + 1) * per_block. lanes: the number of lanes of a sequence."""

    def __init__(self, space: Space, per_block: int, lanes: int) -> None:
        self.space = space
        self.per_block = per_block
        self.lanes = lanes
        self.refs: dict[int, int] = {}  # page -> how many lanes list it; no entry for an idle published page
        self.spare: dict[int, list[int]] = {}  # cut block -> its free pages; blocks without free pages are left out
        self.spares = 0


@dataclass(eq=False, slots=True)
class _Held:
    """The pages of one open sequence. Its tail has `chain` chain rows, then `nodes` nodes."""

    seq: Sequence
    pool: _Pool
    encoded: _Pool | None  # the pool of the encoded pages
    lanes: list[_Lane]
    cursor: Node  # the last published page of the lane
    published: int = 0  # the number of published pages
    chain: int = 0
    nodes: int = 0
    view: tuple[I32, I32] | None = None  # the cached result of arrays(); None after pages changed

    @property
    def edited(self) -> bool:
        """Whether keys were evicted. Later keys then do not depend on the tokens alone."""
        return self.lanes[0].positions is not None

    @property
    def weighed(self) -> bool:
        """Whether slots may stand for several tokens."""
        return self.lanes[0].logs is not None

    def missing(self, rows: int, page: int) -> int:
        """The number of pages that the lanes lack for `rows` rows after the tail."""
        more = self.chain + self.nodes + rows
        return sum(-(-(lane.length + more) // page) - len(lane.pages) - len(lane.encoded) for lane in self.lanes)

    def listed(self) -> list[tuple[_Pool, list[int]]]:
        """All pages by pool, the last page of a lane first."""
        found = [(self.pool, [page for lane in self.lanes for page in reversed(lane.pages)])]
        if self.encoded is not None:
            found.append((self.encoded, [page for lane in self.lanes for page in reversed(lane.encoded)]))
        return found

    def arrays(self) -> tuple[I32, I32]:
        """`pages` and `encoded` of all lanes: i32[lanes, n] and i32[lanes, m], shorter lanes padded with 0 on the right."""
        if self.view is None:
            self.view = _padded([lane.pages for lane in self.lanes]), _padded([lane.encoded for lane in self.lanes])
        return self.view


def _padded(lists: list[list[int]]) -> I32:
    width = max(map(len, lists))
    return np.array([[*pages, *[0] * (width - len(pages))] for pages in lists], np.int32)


class PageTable:
    """`blocks` blocks for a model with `layers` layers and `kv_heads` kv heads; a page has `page` tokens.

    Pages are numbered within their space: page i is in block i // per_block. per_block is 1 for SHARED, `layers` for PER_LAYER,
    `layers` * `kv_heads` for PER_HEAD, and the argument of define() for pages of a format. An open sequence has one lane, one for
    each layer, or one for each layer and kv head (layer * kv_heads + head). All figures count blocks.
    """

    def __init__(self, blocks: int, layers: int, kv_heads: int, page: int = 32, sharing: bool = True) -> None:
        self.blocks = blocks
        self.page = page
        self.sharing = sharing
        self.prefix = PrefixTree(page)
        self.listener: Callable[[Seq[Node]], None] | None = None  # gets newly published pages, and the last one that a text attached
        self.peak = 0  # most blocks in use since the last reset_peak
        self._lanes = {Lanes.SHARED: 1, Lanes.PER_LAYER: layers, Lanes.PER_HEAD: layers * kv_heads}
        self._pools = {Space(kind): _Pool(Space(kind), count, count) for kind, count in self._lanes.items()}
        self._free = list(range(blocks - 1, -1, -1))
        self._held: dict[int, _Held] = {}

    def define(self, space: Space, per_block: int) -> None:
        """Adds a space with pages of another size: a block is cut into `per_block` of them."""
        assert per_block > 0, f"{space}: a page is larger than a block"
        pool = self._pools.setdefault(space, _Pool(space, per_block, self._lanes[space.lanes]))
        assert pool.per_block == per_block, f"{space}: {per_block} pages a block, defined with {pool.per_block}"

    def has(self, space: Space, pages: I32) -> bool:
        """Whether these are ids of pages of a space."""
        pool = self._pools.get(space)
        return pool is not None and bool(((pages >= 0) & (pages < self.blocks * pool.per_block)).all())

    # ---- figures

    def available(self) -> int:
        """Blocks that can be allocated: free blocks, and published pages that no lane lists."""
        return len(self._free) + len(self.prefix.idle)

    def used(self) -> int:
        """Blocks that hold at least one page of an open sequence."""
        return self.blocks - self.available()

    def shared(self) -> int:
        """Pages that more than one open sequence lists. Any thread may ask."""
        return sum(count > 1 for count in list(self._pools[Space()].refs.values()))

    def reset_peak(self) -> None:
        self.peak = self.used()

    def need(self, seq: Sequence, rows: int, matched: int = 0) -> int:
        """Blocks for `rows` more rows of an open sequence, or for the first `rows` tokens of a sequence that is not open and will
        attach `matched` of them. Rows of an open sequence beyond its pending tokens are drafts. The result is an upper bound, and so
        is the sum over sequences, because it does not count on free pages of cut blocks. While the sum is at most available(),
        reserve() has enough pages, and so have keep(), encode() and splice() after the commit at a sync point."""
        held = self._held.get(seq.id) or self._fresh(seq)
        size, tail = self.page, held.chain + held.nodes + rows
        drafted = max(0, tail - seq.pending) if seq.id in self._held else 0
        if seq.cache.splits and held.pool.space == Space():
            return self._need_to_split(held, seq, tail, drafted) - matched // size
        onset = seq.onset  # an eviction copies kept slots of shared pages
        again = onset.longest < UNLIMITED or seq.cache.merges or seq.cache.demotes
        evicts = seq.stored + tail >= onset.at and (seq.stored < onset.at or again)
        exact = encoded = 0
        for lane in held.lanes:
            own = sum(self._private(held.pool, page) for page in lane.pages) if evicts else len(lane.pages)
            slots, codes = self._most(lane, seq, tail - drafted, drafted, held.encoded is not None)
            exact += max(0, -(-slots // size) - own)
            encoded += max(0, codes // size - len(lane.encoded))
        blocks = -(-exact // held.pool.per_block) - (0 if evicts else matched // size)
        return blocks + (-(-encoded // held.encoded.per_block) if held.encoded is not None else 0)

    def _most(self, lane: _Lane, seq: Sequence, rows: int, drafted: int, encodes: bool) -> tuple[int, int]:
        """The most slots in unencoded pages of a lane while `rows` pending tokens and some of `drafted` ones are committed, and the most
        in encoded pages afterwards."""
        size, every, onset = self.page, seq.cache.encode_every, seq.onset
        codes = size * len(lane.encoded)
        exact, end = lane.length - codes, lane.length + rows
        first = onset.at if seq.stored < onset.at else 0  # slots before the first eviction
        if not encodes:
            return max(exact, min(end, max(first, onset.longest))) + drafted, 0
        if onset.at == UNLIMITED:
            return min(end - codes, every) + drafted, (end + drafted) // every * every
        if seq.stored + rows + drafted < onset.at:
            return end - codes + drafted, 0
        if seq.cache.demotes and onset.longest == onset.most:  # else lanes wait with full pages for the one that has fewest
            end = min(end, codes + max(first, exact, onset.longest + size - 1))
        return end - codes + drafted, lane.length + rows + drafted

    def _need_to_split(self, held: _Held, seq: Sequence, tail: int, drafted: int) -> int:
        """need() of a text with one lane, which gets other lanes at its first eviction (see EditableTable.keep)."""
        lane, own, onset = held.lanes[0], self._pools[Space(seq.cache.lanes)], seq.onset
        end = lane.length + tail - drafted
        before = -(-(min(end, onset.at) + drafted) // self.page) - len(lane.pages)
        if end + drafted < onset.at:
            return before

        def blocks(slots: int) -> int:
            """Of lanes with `slots` slots on average, each of which ends within a page."""
            pages = (slots + self.page - 1) * own.lanes // self.page
            return -(-pages // own.per_block)

        after = min(onset.slots + max(0, end - onset.at), onset.most) + drafted
        return max(before + blocks(onset.slots), blocks(after))

    def gain(self, seq: Sequence) -> int:
        """Blocks that freeing `seq` would add to available(): those with pages that no other sequence lists."""
        held = self._held[seq.id]
        gained = 0
        for pool, listed in held.listed():
            mine = Counter(page // pool.per_block for page in listed if pool.refs[page] == 1)
            gained += sum(count + len(pool.spare.get(block, ())) == pool.per_block for block, count in mine.items())
        return gained

    # ---- sharing

    def match(self, tokens: Seq[int], salt: str) -> int:
        """The number of leading tokens in published pages: whole pages, at most len(tokens) - 1. Changes nothing."""
        return len(self.prefix.walk(tokens, salt)) * self.page if self.sharing else 0

    def idle_matched(self, tokens: Seq[int], salt: str) -> int:
        """Pages of the match that available() counts and that attaching takes."""
        return sum(node.page in self.prefix.idle for node in self.prefix.walk(tokens, salt)) if self.sharing else 0

    def attach(self, seq: Sequence, n: int) -> None:
        """Lists the published pages of the first `n` tokens (see match) in the empty SHARED lane of `seq`."""
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
        if self.listener is not None:
            self.listener(nodes[-1:])
        self._mark()

    def publish(self, seq: Sequence) -> None:
        """Publishes the full committed pages of a SHARED lane without evictions. Takes O(pages that became full).

        If an equal page is already published, this one stays private and the next one is published below the published one.
        """
        held = self._held[seq.id]
        lane = held.lanes[0]
        full = min(lane.length, seq.shareable_tokens) // self.page
        if full <= held.published or not self.sharing or held.pool.space != Space() or held.edited:
            return
        if not held.cursor.alive:  # the page below which this sequence publishes was evicted: start from the root
            held.cursor, held.published = self.prefix.root, 0
        cursors = []
        for i in range(held.published, full):
            tokens = seq.tokens[i * self.page : (i + 1) * self.page]
            held.cursor = self.prefix.insert(held.cursor, seq.request.salt, tokens, lane.pages[i])
            cursors.append(held.cursor)
        held.published = full
        if self.listener is not None:
            self.listener(cursors)

    def cursors(self, seqs: Iterable[Sequence]) -> list[Node]:
        """The published page below which each of these open sequences publishes its next one, the root if it published none."""
        return [self._held[seq.id].cursor for seq in seqs]

    def forget(self) -> int:
        """Frees the published pages that no lane lists, and returns their number. Listed pages stay shared."""
        count = len(self.prefix.idle)
        while self.prefix.idle:
            for page in self.prefix.evict():
                self._release(self._pools[Space()], page)
        return count

    # ---- sequences

    def open(self, seq: Sequence, space: Space | None = None) -> None:
        """Opens `seq` with empty lanes of kind `seq.cache.lanes`, or with one SHARED lane if it splits later."""
        assert seq.id not in self._held, f"sequence {seq.id} is open already"
        self._held[seq.id] = self._fresh(seq, space)
        seq.stored = 0

    def _fresh(self, seq: Sequence, space: Space | None = None) -> _Held:
        """space: of its pages; None: that of a text without tokens."""
        plan = seq.cache
        pool = self._pools[space or (Space() if plan.splits else Space(plan.lanes, plan.format))]
        block = self._pools[Space(plan.lanes, plan.encoded)] if plan.encoded else None
        return _Held(seq, pool, block, [_Lane([]) for _ in range(pool.lanes)], self.prefix.root)

    def free(self, seq: Sequence) -> None:
        """Releases all pages of the sequence and closes it. Published pages stay until memory is needed."""
        assert seq.id in self._held, f"sequence {seq.id} is not open"
        for pool, pages in self._held.pop(seq.id).listed():
            self._drop(pool, pages)

    def reserve(self, work: Seq[Work], trees: Seq[TokenTree]) -> PageView:
        """Extends every tail by the rows of this forward: `w.rows` chain rows unless the tail has them, and the nodes from w.first on.

        May be called again before commit, with w.first = the number of nodes in the tail. Raises OutOfPages, and changes nothing, if
        memory is short.
        """
        growth: list[tuple[_Held, int, int, int]] = []
        wanted: dict[Space, int] = {}
        for w, tree in zip(work, trees, strict=True):
            held = self._held[w.seq.id]
            chain = 0 if held.chain else w.rows
            nodes = len(tree) - w.first
            assert chain <= w.seq.pending, f"sequence {w.seq.id}: {chain} rows to run, {w.seq.pending} pending"
            assert nodes >= 0 and held.nodes == w.first, f"sequence {w.seq.id}: tail of {held.nodes} nodes, first {w.first}"
            assert held.chain in (0, w.rows), f"sequence {w.seq.id}: a tail of {held.chain} chain rows continues with {w.rows}"
            missing = held.missing(chain + nodes, self.page)
            if missing:
                wanted[held.pool.space] = wanted.get(held.pool.space, 0) + missing
            growth.append((held, chain, nodes, missing))
        if wanted:
            self._ensure(wanted)
        view = PageView([], [], [], [], [], [], [], [], [], [])
        for w, (held, chain, nodes, missing) in zip(work, growth, strict=True):
            tail = held.chain + held.nodes
            held.chain += chain
            held.nodes += nodes
            if missing:
                self._grow(held, view.fresh)
            view.kinds.append(held.pool.space.lanes)
            pages, encoded = held.arrays()
            view.pages.append(pages)
            view.encoded.append(encoded)
            view.lengths.append(np.array([lane.length for lane in held.lanes], np.int32))
            view.tail.append(tail)
            view.chain.append(held.chain)
            view.positions.append(
                [lane.positions[: lane.length] for lane in held.lanes if lane.positions is not None] if held.edited else None
            )
            view.logs.append([lane.logs[: lane.length] for lane in held.lanes if lane.logs is not None] if held.weighed else None)
            view.slots.append(None if w.rerun is None else self._again(held, w.rerun.slots))
        if wanted:
            self._mark()
        return view

    def _again(self, held: _Held, slots: I32) -> I32:
        """Committed slots whose rows run again: in pages that only this sequence lists, and that are not published."""
        lane, name = held.lanes[0], f"sequence {held.seq.id}"
        assert not held.edited and len(held.lanes) == 1 and not held.chain, f"{name}: rows run again in plain text without a tail only"
        assert len(slots) and slots[0] >= 0 and slots[-1] < lane.length and (np.diff(slots) > 0).all(), f"{name}: no such slots"
        for i in np.unique(slots // self.page).tolist():
            assert self._private(held.pool, lane.pages[i]), f"{name}: slots of the shared page {lane.pages[i]} cannot run again"
        return slots

    def commit(self, work: Seq[Work], accepted: Seq[Accepted]) -> list[Moves]:
        """Commits the chain and the accepted path and drops the rest of the tail. Returns at most one Moves for each space.

        Chain rows are already in place. The k-th node of the path moves to slot length + chain + k, never to the right:

            slot       0 .. 63     64      65   66   67   68   69
            before     committed   chain   n0   n1   n2   n3   n4       length 64, accepted path (n1, n4)
            move                           ^----'              |        66 -> 65
                                                ^--------------'        69 -> 66
            after      committed ...       n1   n4                      length 67; pages after slot 66 are freed

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
                    base, pages = lane.length + held.chain - size * len(lane.encoded), lane.pages
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
        """Opens `child` with the same lanes. Both list the full pages; the partial page is copied whole, so no data of a former owner
        remains in the new page. The tail must be empty."""
        held = self._held[seq.id]
        assert not held.chain, f"sequence {seq.id}: fork while a tail is open"
        same = (child.cache.lanes, child.cache.format, child.cache.encoded) == (seq.cache.lanes, seq.cache.format, seq.cache.encoded)
        assert child.id not in self._held and same, f"sequence {child.id}: already open, or in another space"
        pool, size = held.pool, self.page
        self._ensure({pool.space: sum(lane.length % size > 0 for lane in held.lanes)})
        lanes, src, dst = [], [], []
        for lane in held.lanes:
            full = lane.length // size - len(lane.encoded)
            pages = lane.pages[:full]
            for page in lane.encoded:
                assert held.encoded is not None
                self._list(held.encoded, page)
            for page in pages:
                self._list(pool, page)
            if full < len(lane.pages):
                pages.append(self._take(pool))
                src.append(lane.pages[full])
                dst.append(pages[full])
            positions = None if lane.positions is None else lane.positions[: lane.length].copy()
            logs = None if lane.logs is None else lane.logs[: lane.length].copy()
            lanes.append(_Lane(pages, lane.length, list(lane.encoded), lane.demoted, lane.summarized, positions, logs))
        self._held[child.id] = _Held(child, pool, held.encoded, lanes, held.cursor, held.published)
        child.stored, child.shareable_tokens = seq.stored, min(child.shareable_tokens, seq.shareable_tokens)
        self._mark()
        places = np.arange(len(src) * size)
        return Moves(pool.space, self._places(src, places), self._places(dst, places))

    def check(self) -> None:
        """Raises AssertionError if an invariant is broken: references equal listings; pages in use, free pages and free blocks add up
        to the pool; no lane is longer than its pages; encoded pages are full; published pages are full and never at the writable end of
        a lane."""
        size = self.page
        listed: dict[Space, Counter[int]] = {space: Counter() for space in self._pools}
        for held in self._held.values():
            name = f"sequence {held.seq.id}"
            refs, shared_kind = held.pool.refs, held.pool.space == Space()
            for pool, pages in held.listed():
                listed[pool.space].update(pages)
            for index, lane in enumerate(held.lanes):
                end = lane.length + held.chain + held.nodes
                count, skipped = len(lane.pages) + len(lane.encoded), len(lane.encoded)
                assert count == -(-end // size), f"{name} lane {index}: {count} pages for {end} slots"
                assert skipped * size <= lane.length, f"{name} lane {index}: {skipped} encoded pages for {lane.length} slots"
                assert skipped == len(held.lanes[0].encoded), f"{name} lane {index}: {skipped} encoded pages, other lanes have others"
                assert lane.demoted <= lane.length, f"{name} lane {index}: {lane.demoted} of {lane.length} slots demoted"
                if held.seq.cache.demotes:
                    assert skipped <= lane.demoted // size, f"{name} lane {index}: {skipped} encoded pages, {lane.demoted} slots demoted"
                assert held.edited or lane.length == held.seq.stored, f"{name} lane {index}: {lane.length} slots, {held.seq.stored} stored"
                assert held.edited == (lane.positions is not None), f"{name} lane {index}: only some lanes have positions"
                assert held.weighed == (lane.logs is not None), f"{name} lane {index}: only some lanes have logarithms"
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
            in_pool = Counter(page // pool.per_block for page in {*taken, *spare})
            assert len({*taken, *spare}) == len(taken) + len(spare), f"{pool.space}: a page is both free and in use"
            assert all(n == pool.per_block for n in in_pool.values()), f"{pool.space}: pages of a block are lost: {dict(in_pool)}"
            assert in_block.keys() == in_pool.keys(), f"{pool.space}: a block without pages in use was not released"
            blocks += in_pool
        assert sorted(blocks) == list(range(self.blocks)), f"blocks lost or owned twice: {sorted(blocks)}"

    # ---- pages

    def _ensure(self, wanted: dict[Space, int]) -> None:
        """Raises OutOfPages unless `wanted` pages of each space can be allocated."""
        blocks = sum(-(-max(0, n - self._pools[space].spares) // self._pools[space].per_block) for space, n in wanted.items())
        if blocks > self.available():
            raise OutOfPages(f"{blocks} blocks needed, {self.available()} of {self.blocks} available")

    def _mark(self) -> None:
        self.peak = max(self.peak, self.used())

    def _grow(self, held: _Held, fresh: list[tuple[Space, int]]) -> None:
        """Allocates the pages that the lanes lack for their tail."""
        tail = held.chain + held.nodes
        for lane in held.lanes:
            for _ in range(-(-(lane.length + tail) // self.page) - len(lane.pages) - len(lane.encoded)):
                page = self._take(held.pool)
                lane.pages.append(page)
                fresh.append((held.pool.space, page))
        held.view = None

    def _cut(self, held: _Held) -> None:
        """Drops the tail and releases the pages after the committed slots."""
        held.chain = held.nodes = 0
        for lane in held.lanes:
            count = -(-lane.length // self.page) - len(lane.encoded)
            if count < len(lane.pages):
                self._drop(held.pool, reversed(lane.pages[count:]))
                del lane.pages[count:]
                held.view = None

    def _take(self, pool: _Pool) -> int:
        """Allocates a page, listed once. If no cut block has a free page, it cuts a block, and evicts for it if necessary."""
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
        """Adds a listing of a page that is listed or idle."""
        if page in pool.refs:
            pool.refs[page] += 1
        else:
            self.prefix.wake(page)
            pool.refs[page] = 1

    def _drop(self, pool: _Pool, pages: Iterable[int]) -> None:
        """Removes one listing of each page. The last page of a lane comes first; see PrefixTree.rest."""
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
        """i32: the places of these slots in a lane with these pages."""
        return (np.array(pages, np.int32)[slots // self.page] * self.page + slots % self.page).astype(np.int32)
