"""Keys and values in pages: the table, which handles integers only, and the store, which holds the tensors."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from functools import partial
from typing import Any

import numpy as np

from redraft.core.batch import PageView
from redraft.core.plan import Accepted, Work
from redraft.core.sequence import UNLIMITED, Lanes, Sequence, Space
from redraft.core.spec import ModelSpec
from redraft.core.tree import F32, I32, TokenTree
from redraft.kv.edits import EditableTable
from redraft.kv.memory import Memory
from redraft.kv.parcel import Lost, Read, StoredText
from redraft.kv.slots import Held, Kept
from redraft.kv.store import Store
from redraft.kv.table import Moves
from redraft.ops.arrays import array, widened
from redraft.ops.backend import Backend, Room, Select, WeightSums
from redraft.ops.format import PAGE, Arrays, Format


class Paged:
    """The Memory of all layers with attention: `blocks` blocks of 32 tokens."""

    def __init__(self, backend: Backend, spec: ModelSpec, blocks: int, *, sharing: bool = True, room: Room | None = None) -> None:
        self.layers = tuple(sorted(layer for group in spec.memories() if group.kind == "pages" for layer in group.layers))
        self.blocks = blocks
        self.table = EditableTable(blocks, len(self.layers), spec.kv_heads, sharing=sharing)
        self.store = Store(backend, spec, blocks, room)
        self.formats: frozenset[str] = frozenset()

    @property
    def paged(self) -> Paged:
        """The memory that policies edit; Memories has the same property."""
        return self

    @property
    def members(self) -> tuple[Memory[Any], ...]:
        return (self,)

    @property
    def pool(self) -> Any:
        return self.store.pool

    # ---- figures

    def available(self) -> int:
        return self.table.available()

    def used(self) -> int:
        return self.table.used()

    def need(self, seq: Sequence, rows: int, matched: int = 0) -> int:
        return self.table.need(seq, rows, matched)

    def gain(self, seq: Sequence) -> int:
        return self.table.gain(seq)

    def idle_matched(self, tokens: Seq[int], salt: str) -> int:
        return self.table.idle_matched(tokens, salt)

    # ---- prefixes

    def match(self, tokens: Seq[int], salt: str) -> int:
        return self.table.match(tokens, salt)

    def attach(self, seq: Sequence, n: int) -> None:
        self.table.attach(seq, n)

    def publish(self, seq: Sequence) -> None:
        self.table.publish(seq)

    # ---- sequences

    def open(self, seq: Sequence) -> None:
        self.table.open(seq)

    def fork(self, seq: Sequence, child: Sequence) -> None:
        moves = self.table.fork(seq, child)
        try:
            self.store.move([moves])
        except BaseException:
            self.free(child)
            raise

    def free(self, seq: Sequence) -> None:
        self.table.free(seq)
        seq.stored = 0

    # ---- rows

    def reserve(self, work: Seq[Work], trees: Seq[TokenTree]) -> PageView:
        view = self.table.reserve(work, trees)
        self.store.zero(view.fresh)
        return view

    def commit(self, work: Seq[Work], accepted: Seq[Accepted]) -> list[Moves]:
        return self.table.commit(work, accepted)

    def move(self, moves: list[Moves]) -> None:
        self.store.move(moves)

    def discard(self, seq: Sequence) -> None:
        self.table.discard(seq)

    # ---- edits of committed text, requested by policies; the tail must be empty

    def define(self, fmt: Format) -> None:
        """Registers a format for pages of PER_HEAD lanes."""
        self.table.define(Space(Lanes.PER_HEAD, fmt.name), self.store.define(fmt))

    def keep(self, seq: Sequence, kept: Kept) -> None:
        """Evicts all slots of lane i except kept.slots[i], for every lane that the policy decides for. A page format of its own gives each
        head a lane; heads of a layer then keep the same slots. Then it writes kept.merged."""
        each = self.table.lanes(seq) // len(kept.slots)
        self.store.move(self.table.keep(seq, [slots for slots in kept.slots for _ in range(each)], kept.merged))
        if kept.merged is not None:
            assert each == 1, "slots can be merged in lanes of one kv head only"
            self.store.put(*self.table.merging(seq, kept.merged), kept.merged.keys, kept.merged.values)

    def demote(self, seq: Sequence, kept: Kept) -> None:
        """Leaves kept.slots[i] of lane i to the eviction policy; the other slots are encoded by whole pages. See EditableTable.demote."""
        assert kept.merged is None, "slots are demoted or merged"
        each = self.table.lanes(seq) // len(kept.slots)
        moves, encoding = self.table.demote(seq, [slots for slots in kept.slots for _ in range(each)])
        self.store.move(moves)
        self.store.encode([encoding])

    def held(self, seq: Sequence) -> Held:
        """What an eviction policy may read of a text: all but demoted slots."""
        return Held(partial(self.table.positions, seq), partial(self._lane, seq))

    def watched(self, seq: Sequence, seen: WeightSums) -> WeightSums:
        """The statistics of the slots that held() shows, and of the tail."""
        demoted = self.table.demoted(seq).reshape(len(self.layers), -1, 1)
        if not demoted.any():
            return seen
        width = seen.chain.shape[-1]
        slots = np.minimum(demoted + np.arange(width - int(demoted.min())), width - 1)
        parts = [array(part) for part in seen]
        return WeightSums(*(np.take_along_axis(x, np.broadcast_to(slots, (*x.shape[:-1], slots.shape[-1])), -1) for x in parts))

    def _lane(self, seq: Sequence, lane: int, first: int = 0, end: int = UNLIMITED) -> tuple[F32, F32]:
        space, pages, slots, demoted = self.table.pages(seq, lane)
        first, end = first + demoted, min(end + demoted, slots)
        skipped = first // PAGE
        pages = pages[skipped : -(-end // PAGE)]
        arrays, codec = self.store.contents(space, pages), self.store.formats[space.format].codec
        keys, values = (arrays["keys"], arrays["values"]) if codec is None else codec.decode(arrays)
        apart = (widened(array(x)).astype(np.float32) for x in (keys, values))
        heads = len(self.layers) * self.store.spec.kv_heads // self.table.lanes(seq)
        flat = (x.reshape(len(pages), heads, PAGE, x.shape[-1]).swapaxes(0, 1) for x in apart)
        own = slice(first - PAGE * skipped, end - PAGE * skipped)
        keys, values = (x.reshape(heads, PAGE * len(pages), x.shape[-1])[:, own] for x in flat)
        return keys, values

    def layer(self, seq: Sequence, rows: I32, layer: int) -> tuple[F32, F32]:
        """Keys and values f32[K, n, D] of committed slots of a text with one lane for all heads, in one layer of this memory."""
        pages, heads = np.unique(rows // PAGE), self.store.spec.kv_heads
        units = self.table.units(seq, pages, layer * heads, heads)
        arrays = self.store.contents(Space(Lanes.PER_HEAD), units)
        slots = np.searchsorted(pages, rows // PAGE) * PAGE + rows % PAGE
        keys, values = (
            widened(array(arrays[name])).astype(np.float32).reshape(heads, len(pages) * PAGE, -1)[:, slots] for name in ("keys", "values")
        )
        return keys, values

    def encode(self, seq: Sequence) -> None:
        """Moves full pages to the sequence's format of encoded pages."""
        self.store.encode([self.table.encode(seq)])

    def summarize(self, seq: Sequence, read: Select) -> None:
        """Fills the per-page arrays of a sparse read for pages that became full."""
        if len(pages := self.table.unfolded(seq)):
            self.store.summarize(Space(seq.cache.lanes, seq.cache.format), pages, read)

    def splice(self, seq: Sequence, source: Sequence, first: int, count: int, exact: bool = False) -> None:
        """Appends copies of slots of another sequence; see EditableTable.splice."""
        self.store.move([self.table.splice(seq, source, first, count, exact)])

    # ---- between engines

    def export(self, seq: Sequence) -> StoredText:
        found = self.table.export(seq)
        codes = Space(seq.cache.lanes, seq.cache.encoded)
        return found._replace(
            page_sums=self.store.sums(found.space, np.array(found.pages, np.int32)),
            code_sums=self.store.sums(codes, np.array(found.codes, np.int32)) if found.codes else [],
        )

    def read(self, space: Space, pages: I32) -> Arrays:
        """Lost if there are no such pages."""
        if not self.table.has(space, pages):
            raise Lost(f"{len(pages)} pages of {space.lanes}{space.format and ' '}{space.format} are not all in the pool")
        return self.store.read(space, pages)

    def import_(self, seq: Sequence, stored: StoredText, attached: int, read: Read) -> None:
        """Raises OutOfPages; OSError if the contents cannot be read, Lost if they are not those that were exported."""
        incoming = self.table.import_(seq, stored, attached)
        try:
            for one in incoming:
                self.store.fill(one, read)
        except BaseException:
            self.free(seq)
            raise

    def check(self) -> None:
        self.table.check()
