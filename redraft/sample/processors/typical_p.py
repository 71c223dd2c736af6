"""Typical-p: keeps the tokens with the information closest to the entropy, the fewest that together have probability p (Meister et
al., Locally typical sampling, 2023, arXiv 2202.00666)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

from redraft.config import SamplingParams
from redraft.sample.processors.processor import Row, Vocabulary, largest, weigh


@dataclass(frozen=True)
class TypicalP:
    p: float

    @classmethod
    def of(cls, params: SamplingParams, vocabulary: Vocabulary) -> Self | None:
        return cls(params.typical_p) if params.typical_p < 1 and not params.greedy else None

    def apply(self, row: Row) -> None:
        weights = weigh(row.values)
        probs = weights / weights.sum()
        with np.errstate(divide="ignore"):
            information = -np.log(probs)
        likely = probs > 0
        entropy = (probs[likely] * information[likely]).sum()  # not a dot product, because BLAS threads can change its last bit
        row.keep(largest(-np.abs(information - entropy), probs, self.p))
