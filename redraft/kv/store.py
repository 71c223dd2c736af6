"""The tensors behind the page table: one pool, whose layout is the backend's affair."""

from __future__ import annotations

from redraft.core.sequence import Lanes
from redraft.kv.table import Moves
from redraft.models.spec import ModelSpec
from redraft.ops.backend import Backend


class Store:
    """`slabs` times 32 tokens of keys and values of all layers and heads."""

    def __init__(self, backend: Backend, spec: ModelSpec, slabs: int) -> None:
        self.backend = backend
        self.slab_bytes = backend.slab_bytes(spec)
        self.bytes = slabs * self.slab_bytes
        self.pool = backend.allocate(spec, slabs)

    def zero(self, fresh: list[tuple[Lanes, int]]) -> None:
        """Zeroes pages that were just handed out: 0 times an old NaN would be NaN."""
        if fresh:
            self.backend.zero(self.pool, fresh)

    def move(self, moves: list[Moves]) -> None:
        for kind, src, dst in moves:
            self.backend.move(self.pool, kind, src, dst)
