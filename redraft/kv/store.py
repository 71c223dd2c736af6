"""The tensors of the page table: one pool. The backend decides its layout."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import numpy as np

from redraft.core.sequence import Lanes, Space
from redraft.core.spec import ModelSpec
from redraft.core.tree import F32, I32
from redraft.kv.edits import Encoding
from redraft.kv.parcel import Incoming, Lost, Read
from redraft.kv.table import Moves
from redraft.ops.arrays import array, numpy_dtype
from redraft.ops.backend import Backend, Room, Select
from redraft.ops.format import PAGE, Arrays, Format, plain

AT_ONCE = 32  # blocks whose pages are copied at once between engines


class Store:
    """`blocks` blocks of 32 tokens, each with the keys and values of all layers and heads. A block may be cut into pages of any format."""

    def __init__(self, backend: Backend, spec: ModelSpec, blocks: int, room: Room | None = None) -> None:
        """room: gives the pool its memory; None: memory of its own."""
        self.backend = backend
        self.spec = spec
        self.block_bytes = backend.block_bytes(spec)
        self.bytes = blocks * self.block_bytes
        self.layers = len(spec.attention)
        self.pool = backend.allocate(spec, blocks, room)
        self.formats: dict[str, Format] = {"": Format("", plain(backend.dtype, spec.head_dim))}

    def define(self, fmt: Format) -> int:
        """Registers a format with the backend; returns how many of its units a block holds (see ops/format.py)."""
        self.formats[fmt.name] = fmt
        return self.backend.define(self.pool, fmt)

    def zero(self, fresh: list[tuple[Space, int]]) -> None:
        """Zeroes newly allocated pages, because 0 times an old NaN would be NaN."""
        if fresh:
            self.backend.zero(self.pool, fresh)

    def read(self, space: Space, pages: I32) -> Arrays:
        """A copy of all arrays of these pages."""
        return self.backend.read(self.pool, space, pages)

    def contents(self, space: Space, pages: I32) -> Arrays:
        """A copy of all arrays of these pages, by their names in the format."""
        return self.backend.contents(self.pool, space, pages)

    def sums(self, space: Space, pages: I32) -> list[int]:
        """CRC-32 of the contents of each page."""
        return [found for part in self._parts(space, pages) for found in sums(self.read(space, part), len(part))]

    def fill(self, incoming: Incoming, read: Read) -> None:
        """Copies pages of another memory. Lost if their contents are not those that were exported; OSError of `read`."""
        space, src, dst, expected = incoming
        done = 0
        for here, there in zip(self._parts(space, dst), self._parts(space, src), strict=True):
            arrays = read(space, there)
            if expected and sums(arrays, len(here)) != expected[done : done + len(here)]:
                raise Lost(f"{len(here)} pages arrived with other contents than they had")
            self.backend.write(self.pool, space, here, {name: self.backend.place(held) for name, held in arrays.items()})
            done += len(here)

    def _parts(self, space: Space, pages: I32) -> Iterator[I32]:
        """The pages of at most AT_ONCE blocks at once."""
        size = AT_ONCE * {Lanes.SHARED: 1, Lanes.PER_LAYER: self.layers, Lanes.PER_HEAD: self.layers * self.spec.kv_heads}[space.lanes]
        return (pages[at : at + size] for at in range(0, len(pages), size))

    def move(self, moves: list[Moves]) -> None:
        for space, src, dst, delta in moves:
            if len(src):
                self.backend.move(self.pool, space, src, dst, delta)

    def put(self, space: Space, places: I32, keys: F32, values: F32) -> None:
        """Writes keys and values f32[n, D] to places of PER_HEAD lanes, in pages that are written no other way meanwhile."""
        assert space.lanes is Lanes.PER_HEAD, f"{space}: only lanes of one kv head can be written"
        pages, rows = np.unique(places // PAGE, return_inverse=True)
        held, codec = {name: array(x) for name, x in self.read(space, pages).items()}, self.formats[space.format].codec
        k, v = (x.astype(numpy_dtype(self.backend.dtype)) for x in (keys, values))
        for name, entry in ({"keys": k, "values": v} if codec is None else codec.store(k, v)).items():
            whole = held[name].reshape(len(pages), PAGE, *entry.shape[1:])
            whole[rows.tolist(), (places % PAGE).tolist()] = entry
            held[name] = whole.reshape(held[name].shape)
        self.backend.write(self.pool, space, pages, {name: self.backend.place(x) for name, x in held.items()})

    def summarize(self, space: Space, pages: I32, read: Select) -> None:
        """Fills the per-page arrays of a sparse read in full pages."""
        self.backend.summarize(self.pool, space, pages, read)

    def encode(self, encodings: list[Encoding]) -> None:
        for source, target, src, dst, lanes in encodings:
            if len(src):
                self.backend.encode(self.pool, source, target, src, dst, lanes)


def sums(arrays: Arrays, count: int) -> list[int]:
    """CRC-32 of each of `count` pages, over all arrays by name."""
    found = [0] * count
    for name in sorted(arrays):
        held = np.ascontiguousarray(array(arrays[name])).reshape(-1).view(np.uint8)
        size = len(held) // count if count else 0
        found = [zlib.crc32(held[i * size : (i + 1) * size], before) for i, before in enumerate(found)]  # type: ignore[arg-type]
    return found
