"""Minimum length: tokens that end the text are banned until there are `min_tokens` new tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np

from redraft.config import SamplingParams
from redraft.sample.processors.processor import I64, Row, Vocabulary


@dataclass(frozen=True)
class MinTokens:
    minimum: int
    ends: I64
    by_id: ClassVar[bool] = True

    @classmethod
    def of(cls, params: SamplingParams, vocabulary: Vocabulary) -> Self | None:
        # with ignore_eos the end-of-text token does not end the text, so it is not banned
        ends = set(params.stop_token_ids) | (frozenset() if params.ignore_eos else vocabulary.eos)
        known = sorted(token for token in ends if 0 <= token < vocabulary.size)
        return cls(params.min_tokens, np.asarray(known, np.int64)) if params.min_tokens and known else None

    def apply(self, row: Row) -> None:
        if row.generated < self.minimum:
            row.values[self.ends] = -np.inf
