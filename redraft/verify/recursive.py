"""Tests samples drawn without replacement in draw order, each against the distribution from which it was drawn.

Wonseok Jeon, Mukul Gagrani, Raghavv Goel, Junyoung Park, Mingu Lee, Christopher Lott: Recursive Speculative Decoding:
Accelerating LLM Inference via Sampling Without Replacement, 2024, arXiv 2402.14160. Sequoia and DySpec use
the same rule.

1. Start with r = p, the target distribution, and s = q, the draft distribution.
2. Accept the next drawn token x with probability min(1, r(x) / s(x)).
3. If x is rejected, r becomes max(r - s, 0), normalised. x is removed from s, and s is normalised: the next token was drawn from it.
4. If all are rejected, draw from r.

The rule is exact if each child, conditioned on everything that decided its existence, is a sample of s. So drafters must not drop or
sort children by their own probability. Differs: coins are a function of seed and position, not of the step.
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
class Recursive(Rejecting):
    card: ClassVar[Card] = Card(
        "Recursive rejection sampling",
        "Jeon, Gagrani, Goel, Park, Lee, Lott, Recursive Speculative Decoding: Accelerating LLM Inference via Sampling Without "
        "Replacement, 2024, arXiv 2402.14160",
        Guarantee.SAME_DISTRIBUTION,
        deviates="coins are a function of seed and position",
        summary="Samples without replacement; for rsd-c, rsd-s, dyspec",
    )
    supports: ClassVar[frozenset[Kind]] = frozenset({Kind.FIXED, Kind.SINGLE, Kind.WITHOUT_REPLACEMENT})

    def stages(self, p: F64, q: F64, drawn: Seq[int], kind: Kind) -> Stages:
        r, s = p, q.copy()  # 1.
        for x in drawn:
            if not s[x]:  # by the given distribution x cannot be a sample of s: do not test it, it stays in r
                yield 0.0
                continue
            yield float(r[x] / max(r[x], s[x])) if r[x] else 0.0  # 2.
            r = np.maximum(r - s, 0)
            r /= r.sum() or 1
            s[x] = 0
            s /= s.sum() or 1  # 3.
        return r  # 4.
