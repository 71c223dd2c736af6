"""Bad words: the token that would complete a banned text gets probability 0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np

from redraft.config import SamplingParams
from redraft.errors import InvalidInput
from redraft.sample.processors.processor import I64, Row, Vocabulary


@dataclass(frozen=True)
class BadWords:
    """single: ids that are always banned; longer: (first ids, last id), where the last id is banned if the path ends with the
    first ids."""

    single: I64
    longer: tuple[tuple[list[int], int], ...]
    reach: int  # the number of last tokens that are compared
    by_id: ClassVar[bool] = True

    @classmethod
    def of(cls, params: SamplingParams, vocabulary: Vocabulary) -> Self | None:
        if not params.bad_words:
            return None
        if vocabulary.encode is None:
            raise InvalidInput(f"bad_words = {params.bad_words!r}: needs a model with a tokenizer")
        words = [ids for text in params.bad_words for ids in vocabulary.encode(text) if ids]
        longer = tuple((ids[:-1], ids[-1]) for ids in words if len(ids) > 1)
        single = np.asarray([ids[0] for ids in words if len(ids) == 1], np.int64)
        return cls(single, longer, max((len(rest) for rest, _ in longer), default=0))

    def apply(self, row: Row) -> None:
        row.values[self.single] = -np.inf
        if self.longer:
            path = row.seq.tokens[-self.reach :] + row.drafted
            for rest, last in self.longer:
                if path[-len(rest) :] == rest:
                    row.values[last] = -np.inf
