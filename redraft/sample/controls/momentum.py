"""Takes the likeliest token minus a resistance that grows with the repetition that the token would close, so greedy texts do not loop.

Tian Lan, Yixuan Su, Shuhang Liu, Heyan Huang, Xian-Ling Mao: Momentum Decoding: Open-ended Text Generation As Graph Exploration, 2022,
arXiv 2212.02175.

1. The candidates are the k likeliest tokens.
2. l of a candidate is 0 if it never occurred, else the length of the longest n-gram that it would close and that occurred before.
3. Its score is p - alpha f(l), with f = 0, 1, 3, 4, 5, 5 for l from 0 to 5. From l = `block` on it is below all others.
4. The best score is taken.

Differs: at a temperature above 0 a token is drawn in proportion to the scores above 0; the prompt may be left out; tokens without a letter
or digit may be exempt from l = 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from redraft.card import Card, Guarantee
from redraft.core.ranking import top
from redraft.core.sequence import Sequence
from redraft.errors import InvalidInput
from redraft.options import Options, number
from redraft.sample.controls.control import Stage
from redraft.sample.processors.processor import I64, Context, Row, Vocabulary, repetitions, weigh

RESISTANCE = np.array([0.0, 1.0, 3.0, 4.0, 5.0, 5.0])
BLOCKED = 1e3  # more than any other resistance


@dataclass(frozen=True)
class Momentum(Options):
    """alpha: weight of the resistance; k: candidates; block: n-grams of this length never occur twice if a candidate avoids it, 0: none are
    blocked; prompt: the prompt counts as text; exempt: a token without a letter or digit costs nothing at l = 1."""

    alpha: float = number(0.2, ge=0, le=10)
    k: int = number(5, ge=1, le=1024)
    block: int = number(6, ge=0, le=64)
    prompt: bool = True
    exempt: bool = False

    card: ClassVar[Card] = Card(
        "Momentum decoding",
        "Lan, Su, Liu, Huang, Mao, Momentum Decoding: Open-ended Text Generation As Graph Exploration, 2022, arXiv 2212.02175",
        Guarantee.LOSSY,
        deviates="draws by the scores at a temperature above 0; the prompt may be left out; exempt tokens",
        summary="Greedy texts without loops; for stories and essays",
    )

    def open(self, vocabulary: Vocabulary) -> Graph:
        return Graph(self, _marks(vocabulary) if self.exempt else np.zeros(0, np.int64))


def _marks(vocabulary: Vocabulary) -> I64:
    """The tokens without a letter or digit."""
    if vocabulary.bytes_of is None:
        raise InvalidInput("momentum:exempt=true: needs a model with a tokenizer")
    texts = (vocabulary.bytes_of(token).decode(errors="replace") for token in range(vocabulary.size))
    return np.array([token for token, text in enumerate(texts) if not any(letter.isalnum() for letter in text)], np.int64)


@dataclass(frozen=True, eq=False)
class Graph:
    """exempt: tokens, ascending."""

    method: Momentum
    exempt: I64
    stage: ClassVar[Stage] = Stage.FILTERED

    def begin(self, seq: Sequence) -> Walk:
        return Walk(self, Context())


@dataclass(frozen=True, eq=False)
class Walk:
    graph: Graph
    context: Context

    def apply(self, row: Row) -> None:
        method = self.graph.method
        weights = weigh(row.values)
        candidates = np.sort(top(row.values, method.k))  # 1.
        scores = (weights / weights.sum())[candidates] - self.resistance(row, row.ids[candidates])
        row.keep(candidates)
        if row.seq.params.greedy:
            row.values[:] = scores  # 4.
        elif (scores > 0).any():
            with np.errstate(divide="ignore"):
                row.values[:] = np.log(np.maximum(scores, 0))
        else:
            row.keep(scores.argmax()[None])

    def resistance(self, row: Row, ids: I64) -> np.ndarray:
        method, tokens = self.graph.method, self.context.at(row)
        tokens = tokens if method.prompt else tokens[row.seq.prompt_len :]
        if not len(tokens):
            return np.zeros(len(ids))
        repeated = repetitions(tokens, max(method.block, len(RESISTANCE)) - 1)
        lengths = np.array([1 + repeated.get(token, 0) for token in ids.tolist()])
        lengths[~np.isin(ids, tokens) | ((lengths == 1) & np.isin(ids, self.graph.exempt))] = 0  # 2.
        found = method.alpha * RESISTANCE[np.minimum(lengths, len(RESISTANCE) - 1)]  # 3.
        return np.where(lengths >= (method.block or np.inf), BLOCKED, found)
