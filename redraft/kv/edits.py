"""Edits of committed slots: eviction, encoding, reuse of slots of another sequence, export and import. Integers only."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from redraft.core.sequence import Lanes, Sequence, Space
from redraft.core.tree import I32, I64
from redraft.kv.parcel import Incoming, StoredLane, StoredText
from redraft.kv.slots import Merged
from redraft.kv.table import Moves, PageTable, _Held, _Lane, _Pool

_NONE = np.zeros(0, np.int32)


class Encoding(NamedTuple):
    """Whole pages to encode: page src[i] of the source space, of lane lanes[i], into page dst[i] of the target space."""

    source: Space
    target: Space
    src: I32
    dst: I32
    lanes: I32


def _check(seq: Sequence, slots: I32, length: int) -> None:
    """AssertionError unless these are ascending slots of a lane with `length` slots."""
    inside = not len(slots) or (slots[0] >= 0 and slots[-1] < length and bool((np.diff(slots) > 0).all()))
    assert inside, f"sequence {seq.id}: slots to keep must be ascending and in 0..{length - 1}"


class EditableTable(PageTable):
    """A page table with edits of committed slots. Edits happen between steps, while tails are empty."""

    def keep(self, seq: Sequence, kept: Seq[ArrayLike], merged: Merged | None = None) -> list[Moves]:
        """Evicts all slots of lane i except kept[i] (ascending), for every lane of the kind that the text chose, and closes the gaps. The
        tail must be empty. A text that still has one lane for all heads gets its own lanes now. Only the text lists pages of slots in
        `merged` afterwards; see `merging` for their places."""
        held = self._held[seq.id]
        assert not any(lane.encoded for lane in held.lanes), f"sequence {seq.id}: encoded pages cannot be evicted"
        moves = self._kept(held, seq, kept, merged)
        if merged is not None and (held.weighed or (merged.tokens > 1).any()):
            for lane in held.lanes:
                lane.logs = np.zeros(lane.length, np.float32) if lane.logs is None else lane.logs
            for lane, slot, tokens in zip(merged.lanes.tolist(), merged.slots.tolist(), np.log(merged.tokens).tolist(), strict=True):
                logs = held.lanes[lane].logs
                assert logs is not None
                logs[slot] = tokens
        return moves

    def merging(self, seq: Sequence, merged: Merged) -> tuple[Space, I32]:
        """Where the slots of `merged` are."""
        held, size = self._held[seq.id], self.page
        pairs = zip(merged.lanes.tolist(), merged.slots.tolist(), strict=True)
        places = [held.lanes[lane].pages[slot // size] * size + slot % size for lane, slot in pairs]
        return held.pool.space, np.array(places, np.int32)

    def _kept(self, held: _Held, seq: Sequence, kept: Seq[ArrayLike], merged: Merged | None) -> list[Moves]:
        assert not held.chain, f"sequence {seq.id}: keep while a tail is open"
        lanes = [np.asarray(slots, np.int32) for slots in kept]
        if seq.cache.splits and held.pool.space == Space():
            return [self._split(held, seq, lanes)]
        assert len(lanes) == len(held.lanes), f"sequence {seq.id}: {len(lanes)} lanes to keep, {len(held.lanes)} held"
        written: dict[int, set[int]] = {}
        for lane, slot in zip(merged.lanes.tolist(), merged.slots.tolist(), strict=True) if merged is not None else ():
            written.setdefault(lane, set()).add(slot // self.page)
        for lane, slots in zip(held.lanes, lanes, strict=True):
            _check(seq, slots, lane.length)
        return [self._keep(held, lane, slots, written.get(lane, set())) for lane, slots in enumerate(lanes)]

    def _split(self, held: _Held, seq: Sequence, kept: list[I32]) -> Moves:
        """Copies kept[i] of the one lane to fresh pages of lane i, and releases the lane's pages. Part i of a shared block is where lane
        i has a page of its own if the block is cut. The end of a fresh page gets copies of the last kept slot."""
        lane, own, size = held.lanes[0], self._pools[Space(seq.cache.lanes)], self.page
        assert len(kept) == own.lanes, f"sequence {seq.id}: {len(kept)} lanes to keep, {own.lanes} wanted"
        self._ensure({own.space: sum(-(-len(slots) // size) for slots in kept)})
        old, lanes, src, dst = np.array(lane.pages, np.int64), [], [_NONE], [_NONE]
        for part, slots in enumerate(kept):
            n = len(slots)
            _check(seq, slots, lane.length)
            pages = [self._take(own) for _ in range(-(-n // size))]
            if n:
                to = np.arange(len(pages) * size)
                at = slots[np.minimum(to, n - 1)]
                src.append(((old[at // size] * own.per_block + part) * size + at % size).astype(np.int32))
                dst.append(self._places(pages, to))
            lanes.append(_Lane(pages, n, positions=slots.copy() if lane.positions is None else lane.positions[slots]))
        self._mark()
        self._drop(held.pool, list(reversed(lane.pages)))
        held.pool, held.lanes, held.view = own, lanes, None
        return Moves(own.space, np.concatenate(src), np.concatenate(dst))

    def demote(self, seq: Sequence, kept: Seq[ArrayLike]) -> tuple[list[Moves], Encoding]:
        """Leaves kept[i] (ascending, as positions() counts slots) to the eviction policy in lane i, for every lane of the kind that the
        text chose. The other slots move to the front of the lane and are demoted: full pages of them are encoded, as many in each lane.
        The moves come before the encoding. The tail must be empty. Raises OutOfPages, and changes nothing, if memory is short.

            slots      0 .. 31  32 .. 63  64 .. 95  96 .. 99      kept: 0 .. 9, 50 .. 99
            after      encoded: 10 .. 41    42 .. 49, 0 .. 9, 50 .. 63    64 .. 95    96 .. 99      demoted: 40
        """
        held = self._held[seq.id]
        assert held.encoded is not None and not held.chain, f"sequence {seq.id}: no format of encoded pages, or a tail is open"
        orders, demoted = [], []
        for lane, given in zip(held.lanes, kept, strict=True):
            slots, before = np.asarray(given, np.int32), lane.demoted - self.page * len(lane.encoded)
            _check(seq, slots, lane.length - lane.demoted)
            gone = np.ones(lane.length - lane.demoted, bool)
            gone[slots] = False
            lost = np.flatnonzero(gone).astype(np.int32)
            orders.append(np.concatenate([np.arange(before, dtype=np.int32), before + lost, before + slots]))
            demoted.append(lane.demoted + len(lost))
        encoded = sum(min(demoted) // self.page - len(lane.encoded) for lane in held.lanes)
        copied = sum(not self._private(held.pool, page) for lane in held.lanes for page in lane.pages)
        self._ensure({held.pool.space: copied, held.encoded.space: encoded})
        moves = [self._keep(held, index, order, set()) for index, order in enumerate(orders)]
        for lane, count in zip(held.lanes, demoted, strict=True):
            lane.demoted = count
        return moves, self.encode(seq)

    def _keep(self, held: _Held, lane: int, keep: I32, written: set[int]) -> Moves:
        """Leaves the slots `keep` of the unencoded pages of one lane, in this order. written: pages, counted in the lane after it, that
        only the lane may list.

        A page of which all slots stay, or all slots up to the end of the lane, is kept without a copy. Other slots are written to
        pages that only this lane lists, or to fresh pages. Places of a fresh page after the end of the lane get a copy of the last
        kept slot, so no data of the former owner remains. If memory is short, published pages that only this lane lists are
        unpublished first.

            slots      0 .. 31 | 32 .. 63 | 64 .. 95 | 96 .. 99      kept: 0..31, 64..99
            pages      [p3]      [p7]       [p8]       [p2]
            after      [p3]      [p8]       [p2]                      nothing moves, p7 is free
        """
        it, pool, size = held.lanes[lane], held.pool, self.page
        n, old, codes = len(keep), it.pages, size * len(it.encoded)
        length = it.length - codes
        breaks = np.cumsum(np.diff(keep, prepend=keep[:1]) != 1)  # equal for slots that follow each other
        if n == length and not written and (not n or breaks[-1] == breaks[0]):
            return Moves(pool.space, _NONE, _NONE)
        first = np.arange(0, n, size)  # index in `keep` of the first slot of each page after the eviction
        last = np.minimum(first + size, n) - 1
        whole = (keep[first] % size == 0) & (breaks[last] == breaks[first])
        whole &= (last - first == size - 1) | (keep[last] == length - 1)
        for page in written:
            whole[page] &= self._private(pool, old[int(keep[first[page]]) // size])
        pages = [old[slot // size] if stays else -1 for slot, stays in zip(keep[first].tolist(), whole.tolist(), strict=True)]
        stay, writing = set(pages), np.flatnonzero(~whole)
        gone = [page for page in old if page not in stay]
        loose = self._loose(pool, gone, len(writing))
        for i, b in enumerate(writing.tolist()):
            pages[b] = loose[i] if i < len(loose) else self._take(pool)
        self._mark()
        to = (writing[:, None] * size + np.arange(size)).ravel()
        if len(loose) == len(writing):
            to = to[to < n]  # the last page is not fresh, so its end needs no copy
        src, dst = self._places(old, keep[np.minimum(to, n - 1)]), self._places(pages, to)
        if not held.edited:
            for other in held.lanes:
                other.positions = np.arange(other.length, dtype=np.int32)
        assert it.positions is not None
        stay_first = np.concatenate([np.arange(codes), codes + keep])
        it.positions = it.positions[stay_first]
        it.logs = None if it.logs is None else it.logs[stay_first]
        it.pages, it.length, it.summarized, held.view = pages, codes + n, 0, None
        used = set(pages)
        self._drop(pool, [page for page in reversed(gone) if page not in used])
        moved = src != dst
        return Moves(pool.space, src[moved], dst[moved])

    def lanes(self, seq: Sequence) -> int:
        """The number of lanes of the kind that the text chose."""
        return self._lanes[seq.cache.lanes]

    def positions(self, seq: Sequence) -> list[I32]:
        """i32[slots], ascending, for each lane of the kind that the text chose: the positions of its committed, not demoted slots."""
        held = self._held[seq.id]
        every = [np.arange(lane.length, dtype=np.int32) if lane.positions is None else lane.positions[: lane.length] for lane in held.lanes]
        found = [positions[lane.demoted :] for positions, lane in zip(every, held.lanes, strict=True)]
        return found * self.lanes(seq) if len(found) == 1 else found

    def demoted(self, seq: Sequence) -> I64:
        """i64[lanes], of the kind that the text chose: the number of leading slots that positions() leaves out."""
        found = np.array([lane.demoted for lane in self._held[seq.id].lanes], np.int64)
        return np.broadcast_to(found, self.lanes(seq)) if len(found) == 1 else found

    def pages(self, seq: Sequence, lane: int) -> tuple[Space, I32, int, int]:
        """The unencoded pages of a lane of the kind that the text chose, their space, the number of committed slots in them, and of demoted
        ones, which come first."""
        held = self._held[seq.id]
        if seq.cache.splits and held.pool.space == Space():
            one, own = held.lanes[0], self._pools[Space(seq.cache.lanes)]
            return own.space, np.array(one.pages, np.int32) * own.per_block + np.int32(lane), one.length, 0
        it = held.lanes[lane]
        codes = self.page * len(it.encoded)
        return held.pool.space, np.array(it.pages, np.int32), it.length - codes, max(0, it.demoted - codes)

    def units(self, seq: Sequence, pages: I32, first: int, count: int) -> I32:
        """i32[count * n]: parts first..first + count of pages of a text with one plain lane, as pages of PER_HEAD lanes, by part."""
        held, each = self._held[seq.id], self._lanes[Lanes.PER_HEAD]
        assert held.pool.space == Space(), f"sequence {seq.id}: not one plain lane for all heads"
        listed = np.array(held.lanes[0].pages, np.int32)[pages] * np.int32(each)
        return (listed + np.arange(first, first + count, dtype=np.int32)[:, None]).ravel()

    def unfolded(self, seq: Sequence) -> I32:
        """The full pages that no earlier call returned, or that an eviction changed since; i32[pages]."""
        held, found = self._held[seq.id], []
        for lane in held.lanes:
            full = lane.length // self.page
            found += lane.pages[max(0, lane.summarized - len(lane.encoded)) : full - len(lane.encoded)]
            lane.summarized = full
        return np.array(found, np.int32)

    def encode(self, seq: Sequence) -> Encoding:
        """Moves the full pages of every lane to the sequence's format of encoded pages; if the text demotes, those of demoted slots. Each
        lane moves as many as the one that has fewest. The tail must be empty."""
        held = self._held[seq.id]
        assert held.encoded is not None and not held.chain, f"sequence {seq.id}: no format of encoded pages, or a tail is open"
        least = min(lane.demoted if seq.cache.demotes else lane.length for lane in held.lanes)
        full = [least // self.page - len(lane.encoded) for lane in held.lanes]
        self._ensure({held.encoded.space: sum(full)})
        src: list[int] = []
        dst: list[int] = []
        for lane, count in zip(held.lanes, full, strict=True):
            gone, lane.pages = lane.pages[:count], lane.pages[count:]
            encoded = [self._take(held.encoded) for _ in gone]
            lane.encoded += encoded
            src += gone
            dst += encoded
        self._mark()
        self._drop(held.pool, reversed(src))
        held.view = None
        lanes = np.repeat(np.arange(len(full), dtype=np.int32), full)
        return Encoding(held.pool.space, held.encoded.space, np.array(src, np.int32), np.array(dst, np.int32), lanes)

    def splice(self, seq: Sequence, source: Sequence, first: int, count: int, exact: bool = False) -> Moves:
        """Appends private copies of slots first..first + count of the open sequence `source` as the next slots of `seq`. Keys are
        rotated by the number of positions that the text moved. exact: the text before is the same in both sequences, so the pages
        remain a function of their tokens. Works on SHARED lanes of plain pages only; the tail must be empty."""
        held, other = self._held[seq.id], self._held[source.id]
        assert held.pool.space == other.pool.space == Space() and not held.chain, f"sequence {seq.id}: cannot copy slots"
        mine, theirs, pool = held.lanes[0], other.lanes[0], held.pool
        start = mine.length
        assert first + count <= theirs.length and not held.edited and not other.edited, f"sequence {seq.id}: no such slots to copy"
        assert first == start or not exact, f"sequence {seq.id}: text that moved from {first} to {start} is not exact"
        lacking = -(-(start + count) // self.page) - len(mine.pages)
        self._ensure({pool.space: lacking})
        mine.pages += [self._take(pool) for _ in range(lacking)]
        self._mark()
        to = np.arange(start, len(mine.pages) * self.page if lacking else start + count, dtype=np.int32)  # fills fresh pages to the end
        at = np.minimum(to - start + first, first + count - 1)
        seq.shareable_tokens = min(seq.shareable_tokens, source.shareable_tokens if exact else start)
        mine.append(start, count)
        seq.stored += count
        held.view = None
        return Moves(pool.space, self._places(theirs.pages, at), self._places(mine.pages, to), start - first)

    def export(self, seq: Sequence) -> StoredText:
        """The committed state of an open sequence, without sums. The tail must be empty."""
        held = self._held[seq.id]
        assert not held.chain, f"sequence {seq.id}: export while a tail is open"
        lanes = [
            StoredLane(
                lane.length,
                len(lane.encoded),
                lane.demoted,
                lane.summarized,
                None if lane.positions is None else lane.positions[: lane.length].copy(),
                None if lane.logs is None else lane.logs[: lane.length].copy(),
            )
            for lane in held.lanes
        ]
        pages, codes = [page for lane in held.lanes for page in lane.pages], [page for lane in held.lanes for page in lane.encoded]
        return StoredText(seq.stored, held.pool.space, seq.cache.encoded, seq.shareable_tokens, lanes, pages, codes, [], [])

    def import_(self, seq: Sequence, stored: StoredText, attached: int) -> list[Incoming]:
        """Opens `seq` with the export of another table: the first `attached` tokens (see match) in published pages of this one, the rest
        in fresh pages. Returns the copies that must be made before the next step. Raises OutOfPages, and does not open `seq`, if memory is
        short."""
        plan, split = seq.cache, stored.space == Space(seq.cache.lanes) and seq.cache.splits
        fresh = self._fresh(seq, stored.space if split else None)
        assert len(seq.tokens) >= stored.tokens, f"sequence {seq.id}: {len(seq.tokens)} tokens, {stored.tokens} stored"
        assert (fresh.pool.space, plan.encoded) == (stored.space, stored.encoded), f"sequence {seq.id}: different space"
        assert len(fresh.lanes) == len(stored.lanes), f"sequence {seq.id}: {len(stored.lanes)} lanes, {len(fresh.lanes)} here"
        self.open(seq, stored.space)
        try:
            self.attach(seq, attached)
            held = self._held[seq.id]
            lacking = [
                -(-lane.length // self.page) - lane.encoded - len(own.pages) for lane, own in zip(stored.lanes, held.lanes, strict=True)
            ]
            codes = sum(lane.encoded for lane in stored.lanes)
            self._ensure({held.pool.space: sum(lacking)} | ({held.encoded.space: codes} if held.encoded else {}))
        except BaseException:
            self.free(seq)
            seq.stored = 0
            raise
        src: list[int] = []
        dst: list[int] = []
        sums: list[int] = []
        at = 0
        for own, lane, count in zip(held.lanes, stored.lanes, lacking, strict=True):
            first = at + len(own.pages)
            at = first + count
            src += stored.pages[first:at]
            sums += stored.page_sums[first:at]
            taken = [self._take(held.pool) for _ in range(count)]
            dst += taken
            own.pages += taken
            own.encoded = [self._take(held.encoded) for _ in range(lane.encoded)] if held.encoded else []
            own.length, own.demoted, own.summarized = lane.length, lane.demoted, lane.summarized
            own.positions = None if lane.positions is None else lane.positions.copy()
            own.logs = None if lane.logs is None else lane.logs.copy()
        held.view = None
        seq.stored, seq.shareable_tokens = stored.tokens, min(seq.shareable_tokens, stored.shareable_tokens)
        self._mark()
        found = [Incoming(held.pool.space, np.array(src, np.int32), np.array(dst, np.int32), sums)]
        if held.encoded is not None:
            encoded = np.array([page for own in held.lanes for page in own.encoded], np.int32)
            found.append(Incoming(held.encoded.space, np.array(stored.codes, np.int32), encoded, stored.code_sums))
        return found

    def _loose(self, pool: _Pool, gone: list[int], wanted: int) -> list[int]:
        """At most `wanted` pages of `gone`, the pages that a lane gives up, that it may write. Raises OutOfPages if there are too few
        fresh pages for the rest."""
        loose = [page for page in gone if self._private(pool, page)]
        alone = [page for page in gone if page in self.prefix and pool.refs[page] == 1] if pool.space == Space() else []
        lacking = wanted - len(loose)
        if self.available() < lacking <= self.available() + len(alone):
            for page in alone[self.available() - lacking :]:
                if page in self.prefix:  # the eviction of an earlier page may have removed this one
                    self.prefix.rest(page)
                    self.prefix.idle.move_to_end(page, last=False)
                    for freed in self.prefix.evict():
                        if freed != page:
                            self._release(pool, freed)
            loose = [page for page in gone if self._private(pool, page)]
        self._ensure({pool.space: max(0, wanted - len(loose))})
        return loose[:wanted]
