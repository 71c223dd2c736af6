"""Exact selection of the largest values, ties by the lowest place: the one order that all of Redraft sorts by."""

from __future__ import annotations

import numpy as np

from redraft.core.tree import F64, I64


def top(values: F64, k: int) -> I64:
    """The places of the k largest, best first; of equal ones the first. One partition, no sort of them all."""
    if k == 0:
        return np.zeros(0, np.int64)
    least = values[np.argpartition(values, -k)[-k:]].min() if k < len(values) else -np.inf
    places = np.flatnonzero(values >= least)
    return places[np.argsort(-values[places], kind="stable")][:k]
