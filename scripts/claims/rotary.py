"""How much scores change if query and keys move by the same number of positions."""

from __future__ import annotations

from types import SimpleNamespace

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from redraft.core.spec import Attention, Rotary
from redraft.ops.numpy_ops import NumpyOps

OFFSETS = (0, 1_000, 10_000, 100_000)
SIZE, KEYS = 64, 48
LAYER = Attention(1, 1, SIZE, Rotary(tuple(10_000.0 ** (-2 * i / SIZE) for i in range(SIZE // 2)), 1.0))


def turned(x: NDArray[np.float32], positions: NDArray[np.int64], exact: bool = True) -> NDArray[np.float32]:
    """x [n, SIZE] at its positions, by the NumPy backend; exact=False: angles rounded to bfloat16."""
    if exact:
        plan = SimpleNamespace(positions=positions, turns={})
        return np.asarray(NumpyOps().rope(x[:, None], LAYER, plan)[:, 0])  # type: ignore[arg-type]
    angles = positions.astype(ml_dtypes.bfloat16)[:, None] * np.array(LAYER.rotary.frequencies, ml_dtypes.bfloat16)  # type: ignore[union-attr]
    cos, sin = np.cos(angles.astype(np.float32)), np.sin(angles.astype(np.float32))
    low, high = x[:, : SIZE // 2], x[:, SIZE // 2 :]
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], 1)


def shift_errors(pairs: int, dtype: str, seed: int = 0, exact: bool = True) -> NDArray[np.float64]:
    """f64[pairs, offsets, 2]: mean |score - that in float64 without a shift|, for the key at 0 and for the others. A query stands behind
    KEYS keys; all are normal, and scores are divided by sqrt(SIZE)."""
    dice, kind = np.random.default_rng(seed), np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
    found = np.zeros((pairs, len(OFFSETS), 2))
    places = np.arange(KEYS + 1)
    for pair in range(pairs):
        x = dice.standard_normal((KEYS + 1, SIZE)).astype(np.float32)
        right = scores(np.float64, x, places)
        for i, offset in enumerate(OFFSETS):
            moved = turned(x, places + offset, exact).astype(kind).astype(np.float64)
            error = np.abs(moved[:-1] @ moved[-1] / SIZE**0.5 - right)
            found[pair, i] = error[0], error[1:].mean()
    return found


def scores(kind: type, x: NDArray[np.float32], places: NDArray[np.int64]) -> NDArray[np.float64]:
    """Of the last row for the others, computed in `kind`."""
    angles = places[:, None] * np.array(LAYER.rotary.frequencies, kind)  # type: ignore[union-attr]
    low, high = x[:, : SIZE // 2].astype(kind), x[:, SIZE // 2 :].astype(kind)
    cos, sin = np.cos(angles), np.sin(angles)
    moved = np.concatenate([low * cos - high * sin, high * cos + low * sin], 1)
    return np.asarray(moved[:-1] @ moved[-1] / SIZE**0.5)
