"""Repetition, frequency and presence penalties. The drafted tokens on a row's path count too.

Repetition (Keskar et al., CTRL, 2019, arXiv 1909.05858, with the sign rule in common use): the logit of a token that occurs
in prompt or output is divided by the penalty if it is positive, and multiplied by it otherwise. The frequency penalty is
subtracted for each occurrence in the output, the presence penalty once.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import ClassVar, Self

import numpy as np

from redraft.config import SamplingParams
from redraft.core.sequence import Sequence
from redraft.sample.processors.processor import F64, I64, Row, Vocabulary


@dataclass
class Penalties:
    """counts: token -> occurrences in the output, 0 if it occurs only in the prompt; upto: the number of tokens counted."""

    repetition: float
    frequency: float
    presence: float
    counts: dict[int, int] = field(default_factory=dict)
    upto: int = 0
    committed: tuple[I64, F64] = field(default_factory=lambda: (np.zeros(0, np.int64), np.zeros(0)))
    by_id: ClassVar[bool] = True

    @classmethod
    def of(cls, params: SamplingParams, vocabulary: Vocabulary) -> Self | None:
        chosen = (params.repetition_penalty, params.frequency_penalty, params.presence_penalty)
        return cls(*chosen) if chosen != (1, 0, 0) else None

    def apply(self, row: Row) -> None:
        self._follow(row.seq)
        ids, counts = self.committed
        changed = [(ids, self._penalised(row.values[ids], counts))]
        if row.drafted:
            more = Counter(row.drafted)
            own = np.asarray([self.counts.get(token, 0) + n for token, n in more.items()], np.float64)
            drafted = np.asarray(list(more), np.int64)
            changed.append((drafted, self._penalised(row.values[drafted], own)))
        for at, values in changed:  # the drafted tokens last, because their counts include the committed tokens
            row.values[at] = values

    def _penalised(self, values: F64, counts: F64) -> F64:
        values = np.where(values > 0, values / self.repetition, values * self.repetition)
        return values - self.frequency * counts - self.presence * (counts > 0)

    def _follow(self, seq: Sequence) -> None:
        if self.upto == len(seq.tokens):
            return
        if self.upto < seq.prompt_len and self.repetition != 1:
            self.counts |= dict.fromkeys(seq.words, 0)
        for token in seq.tokens[max(self.upto, seq.prompt_len) :]:
            self.counts[token] = self.counts.get(token, 0) + 1
        self.upto = len(seq.tokens)
        n = len(self.counts)
        self.committed = np.fromiter(self.counts, np.int64, n), np.fromiter(self.counts.values(), np.float64, n)
