"""Noise as a pure function of (seed, stream, position, token id or draw number).

The noise does not depend on tree shape, batch or step, so speculation cannot change which tokens are drawn. The hash is the
finaliser of SplitMix64 (Steele, Lea and Flood, Fast splittable pseudorandom number generators, 2014), applied twice.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


class Stream(IntEnum):
    """Independent sources of noise, so that draws of a drafter do not change draws of the target."""

    TARGET = 0
    DRAFT = 1
    ACCEPT = 2
    RESIDUAL = 3
    COIN = 4  # of a processor that acts by chance


def _finalise(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def mix(seed: int, *words: int) -> int:
    """A 64-bit key from a seed and words; every word affects every bit."""
    state = seed & _MASK
    for word in words:
        state = _finalise((state + _GOLDEN * (2 * (word & _MASK) + 1)) & _MASK)
    return state


def sample_seed(seed: int, index: int) -> int:
    """The seed of sample `index` of n. The first sample uses the seed of the request."""
    return seed if index == 0 else mix(seed, index)


def key(seed: int, stream: Stream, position: int) -> int:
    """The key of one draw; `position` is the index of the token being drawn."""
    return mix(seed, stream, position)


def uniform(key: int, ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """f64, one number in (0, 1) for each id. It has 52 bits, so the half-step offset is exact and 1 is never reached."""
    with np.errstate(over="ignore"):
        x = np.uint64(key) + ids.astype(np.uint64) * np.uint64(_GOLDEN)
        for _ in range(2):
            x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            x ^= x >> np.uint64(31)
    return ((x >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def gumbel(key: int, ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """Standard Gumbel noise for each id: argmax(log p + gumbel) is a sample from p. Always with the logarithm of numpy, so texts do not
    depend on the device."""
    return -np.log(-np.log(uniform(key, ids)))


CHUNK = 1 << 14  # ids at once, so that temporaries fit the CPU's cache


def draw(key: int, ids: NDArray[np.int64], values: NDArray[np.float64]) -> int:
    """The place of the largest of `values` plus the noise of their ids, of equal ones the first: a sample from softmax(values)."""
    noisy = [values[at : at + CHUNK] + gumbel(key, ids[at : at + CHUNK]) for at in range(0, len(ids), CHUNK)]
    return int(np.concatenate(noisy).argmax())
