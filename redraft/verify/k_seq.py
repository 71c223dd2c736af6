"""K-sequential selection: tests independent samples of the draft distribution in order, all with the same scaled ratio.

Ziteng Sun, Ananda Theertha Suresh, Jae Hun Ro, Ahmad Beirami, Himanshu Jain, Felix Yu: SpecTr: Fast Speculative Decoding
via Optimal Transport, 2023, arXiv 2310.15141.

1. For a division factor rho, m = min(q, p / rho) is the mass that one draw accepts, and b = sum(m). Take the smallest rho in
   [1, k] with 1 - (1 - b)^k <= rho b.
2. Accept the next of the k drawn tokens x with probability min(1, p(x) / (rho q(x))).
3. If all are rejected, draw from p - m (1 - (1 - b)^k) / b. If the distributions have no token in common (b = 0), draw from p.

The acceptance is at least 1 - 1/e of the best acceptance that k independent draws allow. Differs: rho is the upper end of a
bisection to 1e-6, because below the root the distribution in step 3 would be negative. Coins are a function of seed and position,
not of the step.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from redraft.card import Card, Guarantee
from redraft.core.tree import F64, Kind
from redraft.verify.verifier import Rejecting, Stages

WIDTH = 1e-6  # width of the bisection's final interval for rho


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
        return np.maximum(p - m * (1 - (1 - b) ** k) / b, 0) if b else p  # 3. negative only by rounding


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
    """Whether no token is accepted with more than its mass under p. True for rho at or above the root."""
    b = np.minimum(q, p / rho).sum()
    return bool(1 - (1 - b) ** k <= rho * b)
