"""DRY (don't repeat yourself; P. E. Weidmann, text-generation-webui pull request 5677, 2024): makes tokens that would go on with a
repetition less likely.

1. For each token t, n is the length of the longest end of the text that occurred before with t behind it.
2. If n is at least the allowed length, multiplier * base ** (n - allowed length) is subtracted from the logit of t. The power is at most
   1024, or one that float32 holds.
3. No such end goes across a sequence breaker, and a token that contains a breaker is not made less likely.

Differs: breakers are found in the text's bytes, so they may be spelled by any tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple, Self

import numpy as np

from redraft.config import SamplingParams
from redraft.core.sequence import Sequence
from redraft.errors import InvalidInput
from redraft.sample.processors.processor import Context, Path, Row, Vocabulary, repetitions

LARGEST = 88.0  # log of the largest penalty over the multiplier
POWERS = 1024


class Unbroken(NamedTuple):
    """The tokens since the last breaker, and the last bytes of the text, one fewer than the longest breaker has."""

    tokens: int
    tail: bytes


@dataclass(frozen=True)
class DRY:
    """allowed: the shortest repetition that counts; last: the number of last tokens that are compared, -1 for all; reach: repetitions
    beyond this length count as that long."""

    multiplier: float
    base: float
    allowed: int
    last: int
    reach: int
    breakers: tuple[bytes, ...]
    bytes_of: Callable[[int], bytes]
    context: Context
    unbroken: Path[Unbroken]
    by_id: ClassVar[bool] = True

    @classmethod
    def of(cls, params: SamplingParams, vocabulary: Vocabulary) -> Self | None:
        if not params.dry_multiplier or not params.dry_penalty_last_n:
            return None
        if params.dry_sequence_breakers and vocabulary.bytes_of is None:
            raise InvalidInput(f"dry_sequence_breakers = {params.dry_sequence_breakers!r}: needs a model with a tokenizer; () is allowed")
        breakers = tuple(text.encode() for text in params.dry_sequence_breakers)
        bytes_of = vocabulary.bytes_of or (lambda token: b"")
        advance = partial(_advance, breakers, bytes_of, max(map(len, breakers), default=1) - 1)
        allowed, log_base = params.dry_allowed_length, np.log(params.dry_base)
        reach = allowed + (int(min(LARGEST / log_base, POWERS)) if log_base else 0)
        path = Path(partial(_begin, advance), advance)
        multiplier, base, last = params.dry_multiplier, params.dry_base, params.dry_penalty_last_n
        return cls(multiplier, base, allowed, last, reach, breakers, bytes_of, Context(), path)

    def apply(self, row: Row) -> None:
        longest = min(self.unbroken.at(row.seq, row.drafted).tokens, self.reach)
        if longest < self.allowed:
            return
        tokens = self.context.at(row)
        lengths = repetitions(tokens if self.last < 0 else tokens[-self.last :], longest)
        for token, n in lengths.items():
            if n >= self.allowed and not any(breaker in self.bytes_of(token) for breaker in self.breakers):
                row.values[token] -= self.multiplier * self.base ** (n - self.allowed)


def _advance(breakers: tuple[bytes, ...], bytes_of: Callable[[int], bytes], kept: int, state: Unbroken, token: int) -> Unbroken:
    text = state.tail + (bytes_of(token) if token >= 0 else b"")
    tail = text[len(text) - kept :] if kept else b""
    broken = any(text.find(breaker, max(0, len(state.tail) - len(breaker) + 1)) >= 0 for breaker in breakers)
    return Unbroken(0 if broken else state.tokens + 1, tail)


def _begin(advance: Callable[[Unbroken, int], Unbroken], seq: Sequence) -> Unbroken:
    state = Unbroken(0, b"")
    for token in Context.prompt(seq):
        state = advance(state, token)
    return state
