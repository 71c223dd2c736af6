"""Scores do not change if query and keys move by the same number of positions, because angles are in float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from redraft.core.batch import Batch
from redraft.core.spec import Attention, LayerSpec, Mlp, ModelSpec, Norm, Rotary, WeightSource
from redraft.core.testing import view, work
from redraft.core.tree import EMPTY
from redraft.ops.native import NativeOps
from redraft.ops.numpy_ops import NumpyOps

SIZE, ROWS = 64, 33
LAYER = Attention(1, 1, SIZE, Rotary(tuple(10_000.0 ** (-2 * i / SIZE) for i in range(SIZE // 2)), 1.0))
SPEC = ModelSpec(9, 8, 512, (LayerSpec(LAYER, Mlp(8)),), Norm(), True, lambda name: WeightSource((name,)))


def scores(ops: NumpyOps, x: np.ndarray, offset: int) -> np.ndarray:
    """Of the last row for the rows before it, all at their places + offset."""
    works = [work([1]) for _ in range(ROWS)]
    batch = replace(Batch.pack(works, [EMPTY] * ROWS, view(works)), positions=np.arange(offset, offset + ROWS, dtype=np.int32))
    turned = ops.rope(x[:, None], LAYER, ops.plan(batch, SPEC))[:, 0].astype(np.float64)
    return np.asarray(turned[:-1] @ turned[-1] / SIZE**0.5)


@pytest.mark.parametrize("offset", [1_000, 10_000, 100_000])
@pytest.mark.parametrize("backend", [NumpyOps, NativeOps])
def test_a_shift_of_all_positions_changes_no_score(backend: type[NumpyOps], offset: int) -> None:
    x = np.random.default_rng(0).standard_normal((ROWS, SIZE)).astype(np.float32)
    ops = backend("float32")
    at_zero, moved = scores(ops, x, 0), scores(ops, x, offset)
    assert np.abs(moved - at_zero).max() < 1e-5
    assert np.abs(moved - np.roll(at_zero, 1)).max() > 0.1  # the scores differ from each other
