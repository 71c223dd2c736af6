"""Tests independent samples of the draft distribution in order, all against the same scaled-down ratio: k-sequential selection.

Ziteng Sun, Ananda Theertha Suresh, Jae Hun Ro, Ahmad Beirami, Himanshu Jain, Felix Yu: SpecTr: Fast Speculative Decoding
via Optimal Transport, 2023, arXiv 2310.15141. Rule V6 of the drafting cards' verification.md.

1. Of a division factor rho, m = min(q, p / rho) is the mass that one draw wins, b = sum(m). Take the least rho in [1, k]
   with 1 - (1 - b)^k <= rho b.
2. Accept the next of the k drawn tokens x with probability min(1, p(x) / (rho q(x))).
3. All rejected: draw from p - m (1 - (1 - b)^k) / b; from p where the distributions have no token in common (b = 0).

At least 1 - 1/e of the best acceptance that k independent draws allow. Differs: rho is the upper end of a bisection to
1e-6, since below its root the distribution in 3 would be negative; coins belong to the position, not to the step.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from redraft.card import Card, Guarantee
from redraft.core.tree import F64, Kind
from redraft.verify.verifier import Rejecting, Stages

WIDTH = 1e-6  # of the interval in which the bisection leaves rho


@dataclass(frozen=True)
class KSeq(Rejecting):
    card: ClassVar[Card] = Card(
        "k-sequential selection",
        "Sun, Suresh, Ro, Beirami, Jain, Yu, SpecTr: Fast Speculative Decoding via Optimal Transport, 2023, arXiv 2310.15141",
        Guarantee.SAME_DISTRIBUTION,
        deviates="rho is found to 1e-6, rounded up; coins are a function of seed and position",
        summary="Independent samples, one ratio for all; for spectr",
    )
    supports: ClassVar[frozenset[Kind]] = frozenset({Kind.FIXED, Kind.SINGLE, Kind.IID})

    def stages(self, p: F64, q: F64, drawn: Seq[int], kind: Kind) -> Stages:
        k = len(drawn)
        rho = division(p, q, k)  # 1.
        for x in drawn:
            share = p[x] / rho
            yield float(share / max(share, q[x])) if share else 0.0  # 2.
        m = np.minimum(q, p / rho)
        b = m.sum()
        return np.maximum(p - m * (1 - (1 - b) ** k) / b, 0) if b else p  # 3. less than 0 by rounding only


def division(p: F64, q: F64, k: int) -> float:
    """rho of step 1, at most WIDTH too large."""
    low, rho = 1.0, float(k)
    if _affordable(p, q, k, low):
        return low
    while rho - low > WIDTH:
        middle = (low + rho) / 2
        if _affordable(p, q, k, middle):
            rho = middle
        else:
            low = middle
    return rho


def _affordable(p: F64, q: F64, k: int, rho: float) -> bool:
    """Whether no token wins more than its mass under p: true from the root upwards."""
    b = np.minimum(q, p / rho).sum()
    return bool(1 - (1 - b) ** k <= rho * b)
