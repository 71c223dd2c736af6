"""Logit bias: a number added to the logits of given tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np

from redraft.config import SamplingParams
from redraft.errors import InvalidInput
from redraft.sample.processors.processor import F64, I64, Row, Vocabulary


@dataclass(frozen=True)
class Bias:
    ids: I64
    amounts: F64
    by_id: ClassVar[bool] = True

    @classmethod
    def of(cls, params: SamplingParams, vocabulary: Vocabulary) -> Self | None:
        for token, amount in params.logit_bias.items():
            if not 0 <= token < vocabulary.size:
                raise InvalidInput(f"logit_bias: token id {token} is not in 0..{vocabulary.size - 1}")
            if not amount < np.inf:
                raise InvalidInput(f"logit_bias[{token}] = {amount}: must be a finite number, or -inf to ban the token")
        bias = params.logit_bias
        return cls(np.asarray(list(bias), np.int64), np.asarray(list(bias.values()), np.float64)) if bias else None

    def apply(self, row: Row) -> None:
        row.values[self.ids] += self.amounts
