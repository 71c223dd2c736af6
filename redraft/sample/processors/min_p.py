"""Min-p: keeps the tokens with at least p times the probability of the likeliest token (Nguyen et al., Turning up the heat: min-p
sampling for creative and coherent LLM outputs, 2024, arXiv 2407.01082)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import numpy as np

from redraft.config import SamplingParams
from redraft.sample.processors.processor import Row, Vocabulary


@dataclass(frozen=True)
class MinP:
    p: float

    @classmethod
    def of(cls, params: SamplingParams, vocabulary: Vocabulary) -> Self | None:
        return cls(params.min_p) if params.min_p > 0 and not params.greedy else None

    def apply(self, row: Row) -> None:
        row.keep(np.flatnonzero(row.values >= row.values.max() + math.log(self.p)))
