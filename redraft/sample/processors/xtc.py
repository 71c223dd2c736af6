"""XTC (exclude top choices; P. E. Weidmann, text-generation-webui, 2024): by chance, drops all likely tokens but the least likely of them.

The coin is a function of seed and position, so neither drafts nor batches change it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

from redraft.config import SamplingParams
from redraft.core.noise import Stream, key, uniform
from redraft.sample.processors.processor import Row, Vocabulary, weigh

COIN = np.zeros(1, np.int64)  # its number in the stream


@dataclass(frozen=True)
class XTC:
    """threshold: the probability from which a token is likely. Above 0.5 there is at most one, and nothing happens."""

    probability: float
    threshold: float

    @classmethod
    def of(cls, params: SamplingParams, vocabulary: Vocabulary) -> Self | None:
        if not params.xtc_probability or params.xtc_threshold > 0.5 or params.greedy:
            return None
        return cls(params.xtc_probability, params.xtc_threshold)

    def apply(self, row: Row) -> None:
        if uniform(key(row.seq.seed, Stream.COIN, row.position), COIN)[0] >= self.probability:
            return
        weights = weigh(row.values)
        places = np.flatnonzero(weights >= self.threshold * weights.sum())
        if len(places) > 1:
            kept = np.ones(len(weights), bool)
            kept[places] = False
            kept[places[::-1][row.values[places[::-1]].argmin()]] = True  # of equal ones the highest id
            row.keep(np.flatnonzero(kept))
