"""Exact selection of the largest values; of equal values the lowest index comes first. All of Redraft uses this order."""

from __future__ import annotations

import numpy as np

from redraft.core.tree import F64, I64


def top(values: F64, k: int) -> I64:
    """The indices of the k largest values, best first; of equal values the first. Partitions once and sorts only the candidates."""
    if k == 0:
        return np.zeros(0, np.int64)
    least = values[np.argpartition(values, -k)[-k:]].min() if k < len(values) else -np.inf
    places = np.flatnonzero(values >= least)
    return places[np.argsort(-values[places], kind="stable")][:k]
