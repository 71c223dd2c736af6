"""Top-p: keeps the fewest likeliest tokens that together have the share p of the probability that earlier filters left (Holtzman
et al., The curious case of neural text degeneration, 2020, arXiv 1904.09751)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

from redraft.config import SamplingParams
from redraft.sample.processors.processor import Row, Vocabulary, largest, weigh


@dataclass(frozen=True)
class TopP:
    p: float

    @classmethod
    def of(cls, params: SamplingParams, vocabulary: Vocabulary) -> Self | None:
        return cls(params.top_p) if params.top_p < 1 and not params.greedy else None

    def apply(self, row: Row) -> None:
        weights = weigh(row.values)
        total = weights.sum()
        # tokens below this weight have at most the share (1 - p) / 2 together, so p is reached without them
        likely = np.flatnonzero(weights > (1 - self.p) / 2 * total / len(weights))
        row.keep(likely[largest(row.values[likely], weights[likely], self.p * total)])
