"""Dynamic temperature (kalomaze, koboldcpp, 2023): a temperature between two bounds, higher where the tokens that remain are more even.

With H the entropy of the n tokens that the filters left, it is low + (high - low) * (H / log n) ** exponent, where low and high are the
request's temperature minus (at least 0) and plus the range. It is applied last, so filters see the distribution at temperature 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

from redraft.config import SamplingParams
from redraft.errors import InvalidInput
from redraft.sample.processors.processor import Row, Vocabulary, weigh


@dataclass(frozen=True)
class DynamicTemperature:
    low: float
    high: float
    exponent: float

    @classmethod
    def of(cls, params: SamplingParams, vocabulary: Vocabulary) -> Self | None:
        if not params.dynatemp_range or params.greedy:
            return None
        if params.mirostat:
            raise InvalidInput(f"dynatemp_range = {params.dynatemp_range}: must be 0 with mirostat, which has a temperature that is fixed")
        low, high = max(0.0, params.temperature - params.dynatemp_range), params.temperature + params.dynatemp_range
        return cls(low, high, params.dynatemp_exponent)

    def apply(self, row: Row) -> None:
        top = row.values.max()
        if len(row.values) < 2 or top == -np.inf:
            return
        weights = weigh(row.values)
        probs = weights / weights.sum()
        likely = probs[probs > 0]
        share = min(1.0, max(0.0, float(-(likely * np.log(likely)).sum() / np.log(len(row.values)))))
        temperature = self.low + (self.high - self.low) * share**self.exponent
        if not temperature:
            row.keep(np.flatnonzero(row.values == top)[:1])
            return
        with np.errstate(over="ignore"):
            row.values -= top  # prevents an overflow at a tiny temperature
            row.values /= temperature
