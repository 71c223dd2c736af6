"""Accepts a drafted token that the target finds likely enough for how unsure it is: typical acceptance, not lossless.

Tianle Cai, Yuhong Li, Zhengyang Geng, Hongwu Peng, Jason D. Lee, Deming Chen, Tri Dao: Medusa: Simple LLM Inference
Acceleration Framework with Multiple Decoding Heads, 2024, arXiv 2401.10774.

1. At a node with the target's distribution p, a child's token x passes where p(x) > min(eps, delta exp(-H(p))), H the entropy in nats.
2. Go on below every child that passes.
3. Keep the longest path of nodes that passed; of equally long ones that of the largest summed log p.
4. Behind it the target draws the bonus token, which is all there is where no child of the root passes.

Differs: the token behind the path is drawn from the target's own distribution with its own noise. At temperature 0 that distribution is
one-hot and the text is the greedy one without a special case.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from redraft.card import Card, Guarantee
from redraft.core.distribution import Distribution
from redraft.core.noise import Stream
from redraft.core.plan import Accepted
from redraft.core.tree import F64, Kind, TokenTree
from redraft.options import Options, number


@dataclass(frozen=True)
class Typical(Options):
    """eps: a token of more probability always passes; delta: scale of the bound that falls with entropy."""

    eps: float = number(0.09, gt=0, lt=1)
    delta: float = number(0.3, gt=0, lt=1)

    card: ClassVar[Card] = Card(
        "Typical acceptance",
        "Cai, Li, Geng, Peng, Lee, Chen, Dao, Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads, "
        "2024, arXiv 2401.10774",
        Guarantee.LOSSY,
        deviates="the token behind the accepted path is sampled as in the plain loop",
        summary="Accepts likely tokens; when other texts will do",
    )
    supports: ClassVar[frozenset[Kind]] = frozenset(Kind)
    drafts: ClassVar[Stream] = Stream.TARGET

    def accept(self, trees: Seq[TokenTree], distribution: Distribution) -> list[Accepted]:
        roots = distribution.roots.tolist()
        # Of each sequence, its nodes that were reached: (depth, summed log p), -1 the root.
        reached: dict[int, dict[int, tuple[int, float]]] = {s: {-1: (0, 0.0)} for s, root in enumerate(roots) if root >= 0}
        level = [(s, -1) for s in reached]
        while level := [(s, node) for s, node in level if trees[s].drawn(node)]:
            distributions = distribution.probs([roots[s] + 1 + node for s, node in level])
            below = []
            for (s, node), p in zip(level, distributions, strict=True):
                depth, score = reached[s][node]
                least = self.least(p)
                for child in dict.fromkeys(trees[s].drawn(node)):
                    chance = p[trees[s].tokens[child]]
                    if chance > least:  # 1.
                        reached[s][child] = (depth + 1, score + float(np.log(chance)))
                        below.append((s, child))
            level = below  # 2.
        ends = {s: max(own, key=own.__getitem__) for s, own in reached.items()}  # 3.
        bonus = distribution.draw([roots[s] + 1 + node for s, node in ends.items()])  # 4.
        accepted = [Accepted()] * len(trees)
        for (s, node), token in zip(ends.items(), bonus, strict=True):
            path = trees[s].path_to(node)
            accepted[s] = Accepted(tuple(path), (*trees[s].tokens[path].tolist(), token))
        return accepted

    def least(self, p: F64) -> float:
        """The probability that a token must exceed; p: f64[V]."""
        some = p[p > 0]
        entropy = -float(some @ np.log(some))
        return min(self.eps, self.delta * float(np.exp(-entropy)))
