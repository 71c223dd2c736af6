"""Temperature: divides the logits by it. At temperature 0 the row is greedy: the largest logit wins, without filters or noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

from redraft.config import SamplingParams
from redraft.sample.processors.processor import Row, Vocabulary


@dataclass(frozen=True)
class Temperature:
    temperature: float

    @classmethod
    def of(cls, params: SamplingParams, vocabulary: Vocabulary) -> Self | None:
        return None if params.temperature in (0, 1) or params.dynatemp_range else cls(params.temperature)

    def apply(self, row: Row) -> None:
        top = row.values.max()
        if top > -np.inf:
            with np.errstate(over="ignore"):
                row.values -= top  # prevents an overflow at a tiny temperature
                row.values /= self.temperature
