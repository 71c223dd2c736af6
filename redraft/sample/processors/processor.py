"""The seam of processors: one row of logits on its way to a token, and what two filters share: exact selection."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from redraft.config import SamplingParams
from redraft.core.sequence import Sequence

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

FIRST = 1024  # the largest so many values are sorted first; seldom does a filter need more


@dataclass(frozen=True)
class Vocabulary:
    """`size` ids, of which `eos` end a text. `encode` gives all token id sequences that spell a text (with and without
    a space in front, say); None without a tokenizer."""

    size: int
    eos: frozenset[int]
    encode: Callable[[str], list[list[int]]] | None = None


@dataclass(slots=True)
class Row:
    """values: f64[M], the logits of the tokens that are left; ids: i64[M], theirs, ascending (all ids, so that an id is
    its own place, until the first filter); drafted: the tokens on the row's own path behind seq.tokens."""

    ids: I64
    values: F64
    seq: Sequence
    drafted: list[int]

    @property
    def generated(self) -> int:
        """New tokens before the one that this row draws."""
        return self.seq.generated + len(self.drafted)

    def keep(self, places: I64) -> None:
        """Drops every token but those at `places` (ascending)."""
        self.ids, self.values = self.ids[places], self.values[places]


class Processor(Protocol):
    """Built once for each request that needs it. What it keeps may follow seq.tokens, which only grow; never the draft."""

    @classmethod
    def of(cls, params: SamplingParams, vocabulary: Vocabulary) -> Self | None:
        """None where the request leaves this processor nothing to do."""
        ...

    def apply(self, row: Row) -> None:
        """Changes row.values in place, or row.keep()s some. Only processors before the first filter index by id."""
        ...


def largest(values: F64, n: int) -> I64:
    """The places of the n largest, ascending; of equal ones the first. No sort: one partition."""
    if n >= len(values):
        return np.arange(len(values))
    top = np.argpartition(values, -n)[-n:]
    least = values[top].min()
    above = np.flatnonzero(values > least)
    ties = np.flatnonzero(values == least)[: n - len(above)]
    return np.sort(np.concatenate([above, ties]))


def ranked(values: F64, n: int) -> I64:
    """The places of the n largest, best first; of equal ones the first."""
    places = largest(values, n)
    return places[np.argsort(-values[places], kind="stable")]


def nucleus(keys: F64, weights: F64, mass: float) -> I64:
    """The places, ascending, of the fewest largest keys whose weights sum to `mass` of all the weights or more."""
    wanted, n = mass * weights.sum(), FIRST
    while True:
        order = ranked(keys, n)
        sums = np.cumsum(weights[order])
        if sums[-1] >= wanted or n >= len(keys):
            return np.sort(order[: int(np.searchsorted(sums, wanted)) + 1])
        n *= 2


def weigh(values: F64) -> F64:
    """exp(values), scaled so that the largest is 1; all 1 where every token is banned."""
    top = values.max()
    return np.exp(values - top) if top > -np.inf else np.ones_like(values)
