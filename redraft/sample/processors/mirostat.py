"""Mirostat 2.0: drops the tokens that are more surprising than a bound, which follows how surprising the text's tokens were.

Basu, Ramachandran, Keskar and Varshney, Mirostat: A neural text decoding algorithm that directly controls perplexity, 2020,
arXiv 2007.14966.

1. The bound mu begins at 2 tau.
2. Tokens with a surprise -log2 p above mu are dropped, but for the likeliest.
3. After each token, mu falls by eta (s - tau), where s was the surprise of the token among those that were kept.

So mu is a function of the sum of these surprises and the number of tokens. The text keeps this sum (Sequence.surprise), and a tree node
adds those of its own path.

Differs: s counts only the tokens that were kept, as in llama.cpp. Other filters act before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

from redraft.config import SamplingParams
from redraft.sample.processors.processor import Feedback, Row, Vocabulary, weigh


@dataclass(frozen=True)
class Mirostat(Feedback):
    tau: float
    eta: float

    @classmethod
    def of(cls, params: SamplingParams, vocabulary: Vocabulary) -> Self | None:
        return cls(params.mirostat_tau, params.mirostat_eta) if params.mirostat and not params.greedy else None

    def apply(self, row: Row) -> None:
        weights = weigh(row.values)
        with np.errstate(divide="ignore"):
            surprise = -np.log2(weights / weights.sum())
        total, count = row.surprises()
        kept = surprise <= 2 * self.tau - self.eta * (total - count * self.tau)  # 1. and 3.
        kept[surprise.argmin()] = True
        row.keep(np.flatnonzero(kept))  # 2.
