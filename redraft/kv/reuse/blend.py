"""How far the keys and values of reused rows are from computed ones, for methods that choose which rows run again."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, NamedTuple

import numpy as np

from redraft.core.tree import F32, F64, I32
from redraft.errors import Unsupported
from redraft.kv.reuse.reuse import Later, Pass, Seen, Spliced


class Differences(NamedTuple):
    """Of each reused row, the squared distance of its keys and of its values in a layer from computed ones, over all kv heads, in parts of
    their mean square."""

    keys: F64
    values: F64


def fit(name: str, runner: Any, check: int = 0) -> None:
    """Unsupported if keys cannot be moved to new positions, or the model has no layer `check`."""
    if any(layer.rotary is None for layer in runner.spec.attention):
        raise Unsupported(f"{name}: {runner.spec.family} has no rotary positions, so keys cannot be moved to new positions")
    if check >= len(runner.spec.layers):
        raise Unsupported(f"{name}:check={check}: the model has layers 0 to {len(runner.spec.layers) - 1}")


def differences(text: Spliced, check: int) -> Generator[Pass | Later, Seen | None, Differences]:
    """Runs all reused rows through the layers up to `check`, and compares."""
    before = text.read(check)
    yield Pass(text.rows, check + 1)
    return Differences(*map(_distances, before, text.read(check)))


def _distances(attached: F32, computed: F32) -> F64:
    """f64[n]: of keys or values f32[K, n, D]."""
    found: F64 = np.square(computed - attached).sum((0, 2), dtype=np.float64)
    return found / max(float(np.square(computed).sum((0, 2), dtype=np.float64).mean()), 1e-30)


def largest(scores: F64, count: int) -> I32:
    """The places of the `count` largest scores, ascending; of equal ones, the first."""
    return np.sort(np.argsort(-scores, kind="stable")[:count]).astype(np.int32)
