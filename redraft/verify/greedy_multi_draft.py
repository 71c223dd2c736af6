"""Accepts the draft's likeliest tokens if the target draws them, and tests one random token from the rest.

Zhengmian Hu, Tong Zheng, Vignesh Viswanathan, Ziyi Chen, Ryan A. Rossi, Yihan Wu, Dinesh Manocha, Heng Huang: Towards
Optimal Multi-draft Speculative Decoding, 2025, arXiv 2502.18779.

1. The last drawn token, x, is the random one. The tokens before it are the top tokens T. x was drawn from qt, the normalised draft
   distribution outside of T.
2. Top tokens are not tested individually.
3. Accept x with probability min(1, p(x) / qt(x)).
4. If x is rejected, draw from p on T and max(p - qt, 0) elsewhere. If the drawn token is in T, its child is followed.

The acceptance is p(T) + the sum of min(p, qt) outside of T, the best possible for children drawn in this way. T is taken from the
draws, so ties among the likeliest tokens need no rule. If the draft distribution has n < k tokens, a drafter makes n children: all
of these tokens. Then qt has all its mass on the last one. With one child T is empty and the rule is plain speculative sampling.
Differs: coins are a function of seed and position, not of the step.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from redraft.card import Card, Guarantee
from redraft.core.tree import F64, Kind
from redraft.verify.verifier import Rejecting, Stages


@dataclass(frozen=True)
class GreedyMultiDraft(Rejecting):
    card: ClassVar[Card] = Card(
        "Greedy multi-draft",
        "Hu, Zheng, Viswanathan, Chen, Rossi, Wu, Manocha, Huang, Towards Optimal Multi-draft Speculative Decoding, 2025, arXiv 2502.18779",
        Guarantee.SAME_DISTRIBUTION,
        deviates="coins are a function of seed and position",
        summary="Top tokens and a random one; for optimal-multi-draft",
    )
    supports: ClassVar[frozenset[Kind]] = frozenset({Kind.FIXED, Kind.SINGLE, Kind.TOP_PLUS_ONE})

    def stages(self, p: F64, q: F64, drawn: Seq[int], kind: Kind) -> Stages:
        *tops, x = drawn
        qt = q.copy()
        qt[tops] = 0
        qt /= qt.sum() or 1  # 1.
        for _ in tops:
            yield 0.0  # 2.
        if not qt[x]:  # by the given distribution x cannot be a sample of qt: do not test it, take nothing from p
            yield 0.0
            return p
        yield float(p[x] / max(p[x], qt[x])) if p[x] else 0.0  # 3.
        return np.maximum(p - qt, 0)  # 4. qt is 0 on the tops
