"""The tensors behind the page table: one pool, whose layout is the backend's affair."""

from __future__ import annotations

from redraft.core.sequence import Space
from redraft.core.spec import ModelSpec
from redraft.core.tree import I32
from redraft.kv.edits import Encoding
from redraft.kv.table import Moves
from redraft.ops.backend import Backend, Select
from redraft.ops.format import Arrays, Format


class Store:
    """`blocks` times 32 tokens of keys and values of all layers and heads. A block may be cut into units of any format."""

    def __init__(self, backend: Backend, spec: ModelSpec, blocks: int) -> None:
        self.backend = backend
        self.spec = spec
        self.block_bytes = backend.block_bytes(spec)
        self.bytes = blocks * self.block_bytes
        self.pool = backend.allocate(spec, blocks)

    def define(self, fmt: Format) -> int:
        """Makes a format known to the backend; returns how many of its units a block holds."""
        return self.backend.define(self.pool, fmt)

    def zero(self, fresh: list[tuple[Space, int]]) -> None:
        """Zeroes pages that were just handed out: 0 times an old NaN would be NaN."""
        if fresh:
            self.backend.zero(self.pool, fresh)

    def read(self, space: Space, pages: I32) -> Arrays:
        """A copy of all arrays of these pages."""
        return self.backend.read(self.pool, space, pages)

    def write(self, space: Space, pages: I32, arrays: Arrays) -> None:
        """What read() returned, into other pages."""
        self.backend.write(self.pool, space, pages, arrays)

    def move(self, moves: list[Moves]) -> None:
        for space, src, dst, delta in moves:
            if len(src):
                self.backend.move(self.pool, space, src, dst, delta)

    def fold(self, space: Space, pages: I32, read: Select) -> None:
        """Full pages get the whole arrays of a sparse read."""
        self.backend.fold(self.pool, space, pages, read)

    def encode(self, encodings: list[Encoding]) -> None:
        for source, target, src, dst in encodings:
            if len(src):
                self.backend.encode(self.pool, source, target, src, dst)
