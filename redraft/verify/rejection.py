"""Speculative sampling: accepts a sampled token with probability p / q and otherwise draws from the residual of p.

Yaniv Leviathan, Matan Kalman, Yossi Matias: Fast Inference from Transformers via Speculative Decoding, 2022,
arXiv 2211.17192; Charlie Chen et al.: Accelerating Large Language Model Decoding with Speculative Sampling, 2023,
arXiv 2302.01318.

1. Accept the drafted token x with probability min(1, p(x) / q(x)) and continue at its node.
2. If x is rejected, draw from max(p - q, 0), normalised, and stop.

Differs: the coin is a function of seed and position, not of the step.
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
class Rejection(Rejecting):
    card: ClassVar[Card] = Card(
        "Speculative sampling",
        "Leviathan, Kalman, Matias, Fast Inference from Transformers via Speculative Decoding, 2022, arXiv 2211.17192",
        Guarantee.SAME_DISTRIBUTION,
        deviates="coins are a function of seed and position",
        summary="One sample a node; for a draft model's chain",
    )
    supports: ClassVar[frozenset[Kind]] = frozenset({Kind.FIXED, Kind.SINGLE})

    def stages(self, p: F64, q: F64, drawn: Seq[int], kind: Kind) -> Stages:
        (x,) = drawn
        yield float(p[x] / max(p[x], q[x])) if p[x] else 0.0  # 1.
        return np.maximum(p - q, 0)  # 2.
