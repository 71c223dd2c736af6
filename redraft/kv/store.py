"""The tensors of the page table: one pool. The backend decides its layout."""

from __future__ import annotations

from redraft.core.sequence import Space
from redraft.core.spec import ModelSpec
from redraft.core.tree import I32
from redraft.kv.edits import Encoding
from redraft.kv.table import Moves
from redraft.ops.backend import Backend, Select
from redraft.ops.format import Arrays, Format


class Store:
    """`blocks` blocks of 32 tokens, each with the keys and values of all layers and heads. A block may be cut into pages of any format."""

    def __init__(self, backend: Backend, spec: ModelSpec, blocks: int) -> None:
        self.backend = backend
        self.spec = spec
        self.block_bytes = backend.block_bytes(spec)
        self.bytes = blocks * self.block_bytes
        self.pool = backend.allocate(spec, blocks)

    def define(self, fmt: Format) -> int:
        """Registers a format with the backend; returns how many of its units a block holds (see ops/format.py)."""
        return self.backend.define(self.pool, fmt)

    def zero(self, fresh: list[tuple[Space, int]]) -> None:
        """Zeroes newly allocated pages, because 0 times an old NaN would be NaN."""
        if fresh:
            self.backend.zero(self.pool, fresh)

    def read(self, space: Space, pages: I32) -> Arrays:
        """A copy of all arrays of these pages."""
        return self.backend.read(self.pool, space, pages)

    def write(self, space: Space, pages: I32, arrays: Arrays) -> None:
        """Writes the result of read() into other pages."""
        self.backend.write(self.pool, space, pages, arrays)

    def move(self, moves: list[Moves]) -> None:
        for space, src, dst, delta in moves:
            if len(src):
                self.backend.move(self.pool, space, src, dst, delta)

    def summarize(self, space: Space, pages: I32, read: Select) -> None:
        """Fills the per-page arrays of a sparse read in full pages."""
        self.backend.summarize(self.pool, space, pages, read)

    def encode(self, encodings: list[Encoding]) -> None:
        for source, target, src, dst in encodings:
            if len(src):
                self.backend.encode(self.pool, source, target, src, dst)
