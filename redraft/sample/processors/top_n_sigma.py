"""Top-n-sigma: keeps the logits that are at most n standard deviations below the largest (Tang, Liu, Xu, Huang and Zhang, Top-n-sigma: Not
all logits are you need, 2024, arXiv 2411.07641). The temperature does not change which these are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

from redraft.config import SamplingParams
from redraft.sample.processors.processor import Row, Vocabulary


@dataclass(frozen=True)
class TopNSigma:
    n: float

    @classmethod
    def of(cls, params: SamplingParams, vocabulary: Vocabulary) -> Self | None:
        return cls(params.top_n_sigma) if params.top_n_sigma > 0 and not params.greedy else None

    def apply(self, row: Row) -> None:
        top = row.values.max()
        if top > -np.inf:  # else all are banned
            with np.errstate(over="ignore"):  # at a tiny temperature
                deviation = np.std(row.values[row.values > -np.inf])
            row.keep(np.flatnonzero(row.values >= top - self.n * deviation))
