"""A smaller model with the same vocabulary drafts a chain, one token after the other. It can stop when it becomes unsure.

Yaniv Leviathan, Matan Kalman, Yossi Matias: Fast Inference from Transformers via Speculative Decoding, 2022,
arXiv 2211.17192. The stopping rule: Kaixuan Huang, Xudong Guo, Mengdi Wang: SpecDec++: Boosting Speculative Decoding via
Adaptive Candidate Lengths, 2024, arXiv 2405.19715.

1. Sample a token from the draft distribution (the likeliest token at temperature 0).
2. Multiply the estimated probability that all tokens so far are accepted by the token's probability.
3. Stop after the token if the estimated probability of a rejection exceeds `stop`, or at `length` tokens. No token is removed.

Differs: SpecDec++ trains a head that predicts acceptance. Here a token's draft probability is the estimate.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from redraft.card import Card, Guarantee
from redraft.core.tree import Kind
from redraft.draft.second import SecondModel
from redraft.draft.sketch import Sketch
from redraft.options import number


@dataclass(frozen=True)
class DraftModel(SecondModel):
    """length: the most tokens a step; stop: the probability of a rejection above which drafting stops, 1: never; least: the
    fewest tokens before drafting may stop."""

    length: int = number(5, ge=1)
    stop: float = number(1.0, ge=0, le=1)
    least: int = number(1, ge=1)

    card: ClassVar[Card] = Card(
        "Draft model",
        "Leviathan, Kalman, Matias, Fast Inference from Transformers via Speculative Decoding, 2022, arXiv 2211.17192; "
        "Huang, Guo, Wang, SpecDec++, 2024, arXiv 2405.19715",
        Guarantee.SAME_TEXT,
        needs="a draft model of the same vocabulary",
        deviates="the draft's own probabilities replace SpecDec++'s trained head",
        summary="A smaller model drafts a chain; when there is one",
    )
    kind: ClassVar[Kind] = Kind.SINGLE

    def grow(self, tree: Sketch) -> Iterator[None]:
        node, sure = -1, 1.0
        for drafted in range(1, min(self.length, tree.room) + 1):
            distribution = tree.distribution(node)
            if (place := distribution.nth(0)) is None:
                return
            node = tree.add(node, place)  # 1.
            sure *= float(np.exp(distribution.logq[place]))  # 2.
            if not tree.open(node) or (drafted >= self.least and 1 - sure > self.stop):
                return  # 3.
            yield
