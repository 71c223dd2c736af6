"""Tests independent samples of the draft distribution in order, each against the residual of the target after the rejections.

Xupeng Miao, Gabriele Oliaro, Zhihao Zhang, Xinhao Cheng et al.: SpecInfer: Accelerating Generative Large Language Model
Serving with Tree-based Speculative Inference and Verification, 2023, arXiv 2305.09781. The same rule: Sen Yang, Shujian
Huang, Xinyu Dai, Jiajun Chen: Multi-Candidate Speculative Decoding, 2024, arXiv 2401.06706.

1. Start with r = p, the target distribution. The draft distribution q is the same for every draw.
2. Accept the next drawn token x with probability min(1, r(x) / q(x)).
3. If x is rejected, r becomes max(r - q, 0), normalised.
4. If all are rejected, draw from r.

Differs: a token that is drawn again after its rejection is always rejected, because r is 0 there. Coins are a function of seed
and position, not of the step.
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
class MultiCandidate(Rejecting):
    card: ClassVar[Card] = Card(
        "Multi-candidate speculative sampling",
        "Miao et al., SpecInfer, 2023, arXiv 2305.09781; Yang, Huang, Dai, Chen, Multi-Candidate Speculative Decoding, 2024, "
        "arXiv 2401.06706",
        Guarantee.SAME_DISTRIBUTION,
        deviates="coins are a function of seed and position",
        summary="Independent samples, one by one; for small trees",
    )
    supports: ClassVar[frozenset[Kind]] = frozenset({Kind.FIXED, Kind.SINGLE, Kind.IID})

    def stages(self, p: F64, q: F64, drawn: Seq[int], kind: Kind) -> Stages:
        r = p  # 1.
        for x in drawn:
            yield float(r[x] / max(r[x], q[x])) if r[x] else 0.0  # 2.
            r = np.maximum(r - q, 0)
            r /= r.sum() or 1  # 3.
        return r  # 4.
