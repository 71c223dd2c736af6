"""Faults to plant. Each is a bug that such an engine could have, and the identity contract must detect it."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np
import pytest

from redraft import registry
from redraft.core.noise import Stream, key
from redraft.core.plan import Accepted, Work
from redraft.core.sequence import Sequence
from redraft.core.spec import ModelSpec
from redraft.core.tree import TokenTree
from redraft.kv.store import Store
from redraft.kv.table import Moves, PageTable
from tests.arrays import QUICK

Plant = Callable[[pytest.MonkeyPatch], None]


def position_by_row(patch: pytest.MonkeyPatch) -> None:
    """A node's position follows from its row instead of its depth."""
    patch.setattr(TokenTree, "depths", lambda tree: np.arange(1, len(tree) + 1, dtype=np.int32))
    patch.setattr(TokenTree, "check", lambda tree, **limits: None)  # without this, budgets would forbid such trees


def visible_sibling(patch: pytest.MonkeyPatch) -> None:
    """A node attends to the sibling before it."""
    right = TokenTree.ancestors

    def wrong(tree: TokenTree) -> np.ndarray:
        bits = right(tree).copy()
        last: dict[int, int] = {}
        for node, parent in enumerate(tree.parents.tolist()):
            if parent in last:
                bits[node, last[parent] // 64] |= np.uint64(1 << last[parent] % 64)
            last[parent] = node
        return bits

    patch.setattr(TokenTree, "ancestors", wrong)


def _commit(patch: pytest.MonkeyPatch, change: Callable[[Work, TokenTree, Accepted], tuple[Accepted, int]]) -> None:
    """Commits another path than the accepted one. `change` returns this path and the error of seq.stored."""
    right, reserve = PageTable.commit, PageTable.reserve
    trees: dict[int, TokenTree] = {}

    def remember(table: PageTable, work: Seq[Work], drafts: Seq[TokenTree]) -> object:
        trees.update((w.seq.id, tree) for w, tree in zip(work, drafts, strict=True))
        return reserve(table, work, drafts)

    def wrong(table: PageTable, work: Seq[Work], accepted: Seq[Accepted]) -> list[Moves]:
        changed = [change(w, trees[w.seq.id], a) for w, a in zip(work, accepted, strict=True)]
        moves = right(table, work, [a for a, _ in changed])
        for w, (_, off) in zip(work, changed, strict=True):
            w.seq.stored += off
        return moves

    patch.setattr(PageTable, "reserve", remember)
    patch.setattr(PageTable, "commit", wrong)


def rejected_slot_kept(patch: pytest.MonkeyPatch) -> None:
    """The node after the accepted path also stays in the cache."""

    def change(w: Work, tree: TokenTree, a: Accepted) -> tuple[Accepted, int]:
        extra = a.path[-1] + 1 if a.path else 0
        if not a.tokens or extra >= len(tree):
            return a, 0
        return Accepted((*a.path, extra), a.tokens, a.reason), -1

    _commit(patch, change)


def path_one_short(patch: pytest.MonkeyPatch) -> None:
    """The last accepted node is counted as stored, but its slot is not kept."""
    _commit(patch, lambda w, tree, a: (Accepted(a.path[:-1], a.tokens, a.reason), 1) if a.path else (a, 0))


def moves_forgotten(patch: pytest.MonkeyPatch) -> None:
    """The table returns the moves, but nothing is copied: slots keep their old contents."""
    patch.setattr(Store, "move", lambda store, moves: None)


def page_not_zeroed(patch: pytest.MonkeyPatch) -> None:
    """New pages keep their old contents, here NaN."""
    backend = registry.backend(QUICK)
    allocate = backend.allocate

    def filled(ops: Any, spec: ModelSpec, blocks: int, room: Any = None) -> Any:
        pool = allocate(ops, spec, blocks, room)
        pool.data[:] = np.nan
        return pool

    patch.setattr(backend, "allocate", filled)
    patch.setattr(Store, "zero", lambda store, fresh: None)


def noise_by_step(patch: pytest.MonkeyPatch) -> None:
    """Noise depends on the row in the step instead of the position."""
    from redraft.sample import sampler

    def wrong(distribution: sampler.TargetDistribution, seq: Sequence, stream: Stream, packed: int) -> int:
        starts = distribution.batch.starts
        row = packed - int(starts[np.searchsorted(starts, packed, side="right") - 1])
        return key(seq.seed, stream, int(distribution.batch.positions[packed]) + 1 + row)

    patch.setattr(sampler.TargetDistribution, "_key", wrong)


FAULTS: tuple[Plant, ...] = (
    position_by_row,
    visible_sibling,
    rejected_slot_kept,
    path_one_short,
    moves_forgotten,
    page_not_zeroed,
    noise_by_step,
)
