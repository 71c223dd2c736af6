"""The parts of policies that merge slots: which kept slot an evicted one joins, and the weights of the mean that replaces it.

All are functions of stored keys and of order, so they do not depend on how tokens were grouped into steps. Cosines are computed in
float64 and rounded to float32, which hides the order of their sums.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from redraft.core.tree import F32, F64, I32, I64
from redraft.kv.slots import Held, Merged


class Means(NamedTuple):
    """Slot dst[i] of a lane becomes the mean, over the entries with this dst, of the slots src[i] with weights[i], whose sum is 1; i32[n],
    i32[n], f32[n]."""

    dst: I32
    src: I32
    weights: F32


def evicted(kept: I32, length: int) -> I32:
    """The slots of a lane with `length` slots that are not kept, ascending."""
    gone = np.ones(length, bool)
    gone[kept] = False
    return np.flatnonzero(gone).astype(np.int32)


def nearest(kept: I32, gone: I32) -> I64:
    """i64[gone]: the index of the nearest kept slot of each evicted one; of two, the older."""
    after = np.searchsorted(kept, gone)
    older, newer = np.maximum(after - 1, 0), np.minimum(after, len(kept) - 1)
    return np.where(abs(gone - kept[older]) <= abs(kept[newer] - gone), older, newer)


def cosines(a: F32, b: F32) -> F32:
    """f32[n, m]: the cosine of every a [n, D] and every b [m, D]; 0 for a vector of zeros."""
    found: F32 = (unit(a) @ unit(b).T).astype(np.float32)
    return found


def neighbours(keys: F32) -> F32:
    """f32[n - 1]: the cosine of each of keys [n, D] and the next one."""
    held = unit(keys)
    found: F32 = np.einsum("nd,nd->n", held[:-1], held[1:]).astype(np.float32)
    return found


def unit(x: F32) -> F64:
    """x [n, D], each vector of length 1."""
    wide = x.astype(np.float64)
    found: F64 = wide / np.maximum(np.sqrt(np.einsum("nd,nd->n", wide, wide)), np.finfo(np.float64).tiny)[:, None]
    return found


def runs(joined: Seq[bool] | NDArray[np.bool_], most: int) -> I64:
    """i64[n]: the run of each of n slots, numbered from the oldest. joined [n - 1]: whether a slot may be in the run of the next one. Runs
    have at most `most` slots and are filled from the newest slot backwards."""
    starts, size = np.ones(len(joined) + 1, np.int64), 1
    for i in range(len(joined) - 1, -1, -1):
        if joined[i] and size < most:
            starts[i + 1], size = 0, size + 1
        else:
            size = 1
    return np.cumsum(starts) - 1


def means(dst: I32, src: I32, weights: F64) -> Means:
    """The entries by ascending dst, in the given order for each. The weights of a dst are divided by their sum."""
    order = np.argsort(dst, kind="stable")
    dst, src, weights = dst[order], src[order], weights[order]
    slots, place = np.unique(dst, return_inverse=True)
    total = np.zeros(len(slots))
    np.add.at(total, place, weights)
    return Means(dst.astype(np.int32), src.astype(np.int32), (weights / total[place]).astype(np.float32))


def joins(kept: I32, gone: I32, target: I64, own: float = 1.0, weights: F64 | None = None) -> Means:
    """Slot gone[i] joins slot kept[target[i]] with weights[i], 1 if None; the kept slot has the weight `own` in its mean."""
    into = np.unique(kept[target])
    given = np.ones(len(gone)) if weights is None else weights
    return means(np.concatenate([into, kept[target]]), np.concatenate([into, gone]), np.concatenate([np.full(len(into), own), given]))


def contents(kept: Seq[I32], each: Seq[Means], held: Held, count: bool = False) -> Merged | None:
    """The new contents of the slots `kept` of the lanes of one kv head, in float32: terms are added one after the other. count: a slot
    stands for as many tokens as entries, otherwise for one. None if nothing is merged."""
    found: list[list[NDArray[np.generic]]] = []
    for lane, (slots, mean) in enumerate(zip(kept, each, strict=True)):
        if not len(mean.dst):
            continue
        into, place, tokens = np.unique(mean.dst, return_inverse=True, return_counts=True)
        at = np.searchsorted(slots, into)
        parts: list[NDArray[np.generic]] = [np.full(len(into), lane), at]
        for given in held.read(lane):
            added = given[0, into]  # a copy: differences are added to it, so that merging equals changes nothing
            np.add.at(added, place, mean.weights[:, None] * (given[0, mean.src] - given[0, mean.dst]))
            parts.append(added)
        found.append([*parts, tokens if count else np.ones(len(into))])
    if not found:
        return None
    lanes, places, keys, values, tokens = (np.concatenate(part) for part in zip(*found, strict=True))
    return Merged(
        lanes.astype(np.int32), places.astype(np.int32), keys.astype(np.float32), values.astype(np.float32), tokens.astype(np.int32)
    )
