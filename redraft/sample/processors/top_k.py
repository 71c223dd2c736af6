"""Top-k: keeps the k likeliest tokens (Fan, Lewis and Dauphin, Hierarchical neural story generation, 2018, arXiv 1805.04833)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

from redraft.config import SamplingParams
from redraft.core.ranking import top
from redraft.sample.processors.processor import Row, Vocabulary


@dataclass(frozen=True)
class TopK:
    k: int

    @classmethod
    def of(cls, params: SamplingParams, vocabulary: Vocabulary) -> Self | None:
        return cls(params.top_k) if 0 < params.top_k < vocabulary.size and not params.greedy else None

    def apply(self, row: Row) -> None:
        row.keep(np.sort(top(row.values, self.k)))
