"""Speculative sampling from a target that is mixed with the draft's distribution, for a drafter that may know better. Not lossless.

Guanzheng Chen, Qilong Feng, Jinjie Ni, Xin Li, Michael Qizhe Shieh: Long-Context Inference with Retrieval-Augmented Speculative
Decoding, 2025, arXiv 2502.20330.

1. Mix: p'(x) is proportional to p(x) exp(eta (q(x) - p(x))) for tokens with q(x) of `tail` of the largest q or more, to p(x) for others.
2. Accept the drafted token x with probability min(1, p'(x) / q(x)) and continue at its node.
3. If x is rejected, draw from max(p - q, p - p', 0), normalised, and stop.

Differs: the coin is a function of seed and position, not of the step.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from redraft.card import Card, Guarantee
from redraft.core.tree import F64, Kind
from redraft.options import Options, number
from redraft.verify.verifier import Rejecting, Stages


@dataclass(frozen=True)
class Rapid(Options, Rejecting):
    """eta: the strength of the draft's distribution in the mix, 0: rejection; tail: the share of the largest draft probability below which
    a token keeps its place."""

    eta: float = number(10.0, ge=0, le=1000)
    tail: float = number(0.1, ge=0, le=1)

    card: ClassVar[Card] = Card(
        "RAPID",
        "Chen, Feng, Ni, Li, Shieh, Long-Context Inference with Retrieval-Augmented Speculative Decoding, 2025, arXiv 2502.20330",
        Guarantee.LOSSY,
        deviates="coins are a function of seed and position",
        summary="Moves towards the draft; for drafts that know better",
    )
    supports: ClassVar[frozenset[Kind]] = frozenset({Kind.FIXED, Kind.SINGLE})

    def stages(self, p: F64, q: F64, drawn: Seq[int], kind: Kind) -> Stages:
        (x,) = drawn
        mixed = self.mixed(p, q)
        yield float(mixed[x] / max(mixed[x], q[x])) if mixed[x] else 0.0  # 2.
        return np.maximum(p - np.minimum(q, mixed), 0)  # 3.

    def mixed(self, p: F64, q: F64) -> F64:
        """f64[V], the distribution p'. With eta 0 it is p, bit for bit."""
        if not self.eta:
            return p
        pull = np.where(q >= self.tail * q.max(), self.eta * (q - p), 0.0)
        weights: F64 = p * np.exp(pull - pull.max())
        total = weights.sum()
        return weights / total if total else p  # 1.
