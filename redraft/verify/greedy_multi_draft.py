"""Follows the draft's likeliest tokens wherever the target draws them, and tests one random token from the rest.

Zhengmian Hu, Tong Zheng, Vignesh Viswanathan, Ziyi Chen, Ryan A. Rossi, Yihan Wu, Dinesh Manocha, Heng Huang: Towards
Optimal Multi-draft Speculative Decoding, 2025, arXiv 2502.18779. Rule V7 of the drafting cards' verification.md.

1. Of the drawn tokens the last, x, is the random one and those before it are the tops T. x was drawn from qt, the draft distribution
   outside of T, normalised.
2. No top is tested by itself.
3. Accept x with probability min(1, p(x) / qt(x)).
4. Rejected: draw from p on T and max(p - qt, 0) elsewhere; where that gives a top, its child is followed.

The best acceptance that this way of drawing allows: p(T) + the sum of min(p, qt) outside of T. T is read off the draws, so
ties among the likeliest need no rule. Where the draft distribution has n < k tokens a drafter makes n children: all of them, the last
being what qt draws with certainty; one child is the case of no tops, plain speculative sampling.
Differs: coins belong to the position (noise of seed and position), not to the step.
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
        if not qt[x]:  # no sample of qt, as the distribution tells it: untested, nothing is taken from p
            yield 0.0
            return p
        yield float(p[x] / max(p[x], qt[x])) if p[x] else 0.0  # 3.
        return np.maximum(p - qt, 0)  # 4. qt is 0 on the tops
