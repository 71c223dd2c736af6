"""Draws whole draft sequences without replacement, a few per level, by stochastic beam search over a draft model.

Wonseok Jeon, Mukul Gagrani, Raghavv Goel, Junyoung Park, Mingu Lee, Christopher Lott: Recursive Speculative Decoding:
Accelerating LLM Inference via Sampling Without Replacement, 2024, arXiv 2402.14160 (RSD-S). The search: Wouter Kool, Herke
van Hoof, Max Welling: Stochastic Beams and Where to Find Them, 2019, arXiv 1903.06059.

1. Each beam element has phi, the log-probability of its sequence, and psi, its perturbed value. Both are 0 at the root.
2. Perturb the log-probability of every continuation with Gumbel noise, and condition the noise on its maximum being psi.
3. Keep the continuations with the `width` largest psi as children of their parents, siblings in decreasing order. Continue
   for `depth` levels. Every kept node is verified, including nodes without children.

Differs: at temperature 0 the noise is zero, so this is plain beam search.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from redraft.card import Card, Guarantee
from redraft.core.ranking import top
from redraft.core.tree import F64, Kind
from redraft.draft.second import SecondModel
from redraft.draft.sketch import Sketch
from redraft.options import number


@dataclass(frozen=True)
class RSDS(SecondModel):
    """width: sequences kept on each level; depth: levels."""

    width: int = number(4, ge=1)
    depth: int = number(4, ge=1)

    card: ClassVar[Card] = Card(
        "Recursive speculative decoding, stochastic beam search",
        "Jeon, Gagrani, Goel, Park, Lee, Lott, Recursive Speculative Decoding: Accelerating LLM Inference via Sampling Without "
        "Replacement, 2024, arXiv 2402.14160",
        Guarantee.SAME_TEXT,
        needs="a draft model of the same vocabulary",
        summary="A draft model's best sequences; with recursive",
    )
    kind: ClassVar[Kind] = Kind.WITHOUT_REPLACEMENT

    def grow(self, tree: Sketch) -> Iterator[None]:
        beam = [(-1, 0.0, 0.0)]  # 1. node, phi, psi
        for level in range(self.depth):
            if level:
                yield
            found: list[tuple[float, float, int, int]] = []  # psi, phi, parent, place
            for node, phi, psi in beam:
                if tree.open(node):
                    distribution = tree.distribution(node)
                    if not (places := distribution.best(self.width)):  # only the `width` best children of a node can be kept
                        continue
                    own = phi + distribution.logq[places]
                    perturbed = own if tree.greedy else condition(phi + distribution.keys[places], psi)  # 2.
                    found += zip(perturbed.tolist(), own.tolist(), [node] * len(places), places, strict=True)
            kept = top(np.array([psi for psi, _, _, _ in found]), min(self.width, tree.room, len(found)))  # 3.
            beam = [(tree.add(found[i][2], found[i][3]), found[i][1], found[i][0]) for i in kept.tolist()]
            if not beam:
                return


def condition(perturbed: F64, psi: float) -> F64:
    """Conditions perturbed values (decreasing) on their maximum being psi: the order stays, and the first becomes psi."""
    with np.errstate(divide="ignore"):
        v = psi - perturbed + np.log1p(-np.exp(perturbed - perturbed[0]))
    out: F64 = psi - np.maximum(0, v) - np.log1p(np.exp(-np.abs(v)))
    out[0] = psi
    return out
