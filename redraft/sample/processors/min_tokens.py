"""Minimum length: no token that ends the text before `min_tokens` new tokens exist."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

from redraft.config import SamplingParams
from redraft.sample.processors.processor import I64, Row, Vocabulary


@dataclass(frozen=True)
class MinTokens:
    least: int
    ends: I64

    @classmethod
    def of(cls, params: SamplingParams, vocabulary: Vocabulary) -> Self | None:
        # with ignore_eos the end-of-text token ends nothing, so nothing is to be banned
        ends = set(params.stop_token_ids) | (frozenset() if params.ignore_eos else vocabulary.eos)
        known = sorted(token for token in ends if 0 <= token < vocabulary.size)
        return cls(params.min_tokens, np.asarray(known, np.int64)) if params.min_tokens and known else None

    def apply(self, row: Row) -> None:
        if row.generated < self.least:
            row.values[self.ends] = -np.inf
