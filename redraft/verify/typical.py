"""Typical acceptance: accepts a drafted token if it is likely enough given the target's uncertainty. Not lossless.

Tianle Cai, Yuhong Li, Zhengyang Geng, Hongwu Peng, Jason D. Lee, Deming Chen, Tri Dao: Medusa: Simple LLM Inference
Acceleration Framework with Multiple Decoding Heads, 2024, arXiv 2401.10774.

1. At a node with target distribution p, a child with token x passes if p(x) > min(eps, delta exp(-H(p))). H is the entropy in nats.
2. Continue at every child that passes.
3. Keep the longest path of nodes that passed. Among equally long paths keep the one with the largest sum of log p.
4. The target draws the bonus token after the path. If no child of the root passes, the bonus token is the only new token.

Differs: the token after the path is drawn from the target distribution with the target's noise. At temperature 0 this distribution
is one-hot, so the text is the greedy text without a special case.
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
    """eps: tokens with a higher probability always pass; delta: factor of the threshold that falls with entropy."""

    eps: float = number(0.09, gt=0, lt=1)
    delta: float = number(0.3, gt=0, lt=1)

    card: ClassVar[Card] = Card(
        "Typical acceptance",
        "Cai, Li, Geng, Peng, Lee, Chen, Dao, Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads, "
        "2024, arXiv 2401.10774",
        Guarantee.LOSSY,
        deviates="the token after the accepted path is sampled as in plain decoding",
        summary="Accepts likely tokens; when the text may change",
    )
    supports: ClassVar[frozenset[Kind]] = frozenset(Kind)
    drafts: ClassVar[Stream] = Stream.TARGET
    exact: ClassVar[bool] = False

    def accept(self, trees: Seq[TokenTree], distribution: Distribution) -> list[Accepted]:
        roots = distribution.roots.tolist()
        # sequence -> node -> (depth, sum of log p) for the nodes that were reached; -1 is the root
        reached: dict[int, dict[int, tuple[int, float]]] = {s: {-1: (0, 0.0)} for s, root in enumerate(roots) if root >= 0}
        level = [(s, -1) for s in reached]
        while level := [(s, node) for s, node in level if trees[s].drawn(node)]:
            distributions = distribution.probs([roots[s] + 1 + node for s, node in level])
            below = []
            for (s, node), p in zip(level, distributions, strict=True):
                depth, score = reached[s][node]
                threshold = self.threshold(p)
                for child in dict.fromkeys(trees[s].drawn(node)):
                    chance = p[trees[s].tokens[child]]
                    if chance > threshold:  # 1.
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

    def threshold(self, p: F64) -> float:
        """The probability that a token must exceed; p: f64[V], the target distribution."""
        some = p[p > 0]
        entropy = -float(some @ np.log(some))
        return min(self.eps, self.delta * float(np.exp(-entropy)))
