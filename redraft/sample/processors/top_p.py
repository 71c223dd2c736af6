"""Top-p: the fewest likeliest tokens that hold probability p of what the filters before left (Holtzman et al., The
curious case of neural text degeneration, 2020, arXiv 1904.09751)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from redraft.config import SamplingParams
from redraft.sample.processors.processor import Row, Vocabulary, nucleus, weigh


@dataclass(frozen=True)
class TopP:
    p: float

    @classmethod
    def of(cls, params: SamplingParams, vocabulary: Vocabulary) -> Self | None:
        return cls(params.top_p) if params.top_p < 1 and not params.greedy else None

    def apply(self, row: Row) -> None:
        row.keep(nucleus(row.values, weigh(row.values), self.p))
