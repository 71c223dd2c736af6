"""Merges the trees of several drafters into one tree within the node budget.

The merge of trees: Xupeng Miao, Gabriele Oliaro, Zhihao Zhang, Xinhao Cheng, et al.: SpecInfer: Accelerating Generative
Large Language Model Serving with Tree-based Speculative Inference and Verification, 2023, arXiv 2305.09781.

1. Every part proposes a tree with the whole budget.
2. Score each node with the part's confidence that the text passes through it, if its trees have scores. Otherwise a node's
   first child gets the share SURE of its parent's score, the second the share SURE of the remainder, and so on.
3. Merge nodes with the same parent and token. The merged score is the probability that at least one of the parts that propose
   the node is right. The node's origin is the first of these parts, in the order of `parts`.
4. Keep the best nodes that fit, and of equal nodes the first. No node scores above its parent, so parents come before their
   children and the kept nodes form a tree.

Differs: the parts are any drafters instead of boost-tuned small models. The merged tree is cut to a budget. Its children
count as fixed, so a verifier that tosses coins is refused if a part samples its children.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from redraft import registry
from redraft.card import Card, Guarantee
from redraft.core.noise import Stream
from redraft.core.plan import Budget
from redraft.core.sequence import Sequence
from redraft.core.tree import EMPTY, Kind, TokenTree
from redraft.draft.drafter import Drafter, DraftSampler, OpenDrafter, Wrapper, max_bytes
from redraft.errors import InvalidInput, Unsupported

SURE = 0.8
"""0.5, 0.7, 0.8, 0.9 give 1.92, 2.07, 2.08, 2.08 tokens a step for copyspec+token-recycling (pilot-16m, greedy, 8 rows).
Taking the parts' nodes in turns gives 2.07, and the better part alone 1.64. For token-recycling+(draft-model:length=8) on the
embedded models they give 2.32, 2.44, 2.54, 2.42, and taking nodes in turns 2.44."""


@dataclass(frozen=True)
class Union:
    """parts: drafters joined by +, each with its options in parentheses: copyspec+(token-recycling:k=4)."""

    parts: str = "copyspec+token-recycling"

    card: ClassVar[Card] = Card(
        "Union of drafters",
        "Miao, Oliaro, Zhang, Cheng, et al., SpecInfer: Accelerating Generative Large Language Model Serving with Tree-based "
        "Speculative Inference and Verification, 2023, arXiv 2305.09781",
        Guarantee.SAME_TEXT,
        needs="whatever its parts need",
        deviates="any drafters as parts; the merged tree is cut to the node budget by confidence",
        summary="Merges several drafters' trees; mixed traffic",
    )

    def __post_init__(self) -> None:
        if len(self.made()) < 2:
            raise InvalidInput(f"union:parts={self.parts}: must be two or more drafters joined by +")

    def made(self) -> list[Drafter]:
        return [registry.create("draft", part) for part in registry.split(self.parts, "+")]

    def max_bytes(self, runner: Any) -> int:
        return sum(max_bytes(part, runner) for part in self.made())

    def open(self, runner: Any, sampler: Any) -> Merger:
        names = registry.split(self.parts, "+")
        return Merger(names, [part.open(runner, sampler) for part in self.made()], sampler)


class Merger(Wrapper):
    """The opened form."""

    def __init__(self, names: Seq[str], parts: Seq[OpenDrafter], sampler: DraftSampler) -> None:
        super().__init__(parts)
        self.names = names
        for name, part in zip(names, parts, strict=True):
            drawn = part.kinds - {Kind.FIXED}
            if drawn and sampler.drafts is not Stream.TARGET:
                kinds = ", ".join(sorted(kind.name for kind in drawn))
                raise Unsupported(f"union: {name} samples children ({kinds}); in a merged tree only verifier coupled can verify these")
        self.kinds = frozenset({Kind.FIXED})

    def propose(self, seqs: Seq[Sequence], budgets: Seq[Budget]) -> list[TokenTree]:
        proposed = [part.propose(seqs, budgets) for part in self.parts]  # 1.
        return [merge(trees, budget.rows) for trees, budget in zip(zip(*proposed, strict=True), budgets, strict=True)]


def merge(trees: Seq[TokenTree], rows: int) -> TokenTree:
    """One tree of at most `rows` nodes, in which equal paths are one node. A node's origin is the first tree that has it."""
    nodes: dict[tuple[int, int], int] = {}  # (parent, token) -> node, parents before children
    wrong: list[float] = []  # the probability that all parts that proposed a node are wrong
    origins: list[int] = []
    for origin, tree in enumerate(trees):
        place = [-1]  # place[i + 1]: the merged node of node i of `tree`; -1 is the root
        for token, parent, score in zip(tree.tokens.tolist(), tree.parents.tolist(), confidence(tree), strict=True):  # 2.
            node = nodes.setdefault((place[parent + 1], token), len(nodes))
            place.append(node)
            if node == len(wrong):
                wrong.append(1.0)
                origins.append(origin)
            wrong[node] *= 1 - score  # 3.
    if not nodes:
        return EMPTY
    kept = sorted(range(len(nodes)), key=wrong.__getitem__)[:rows]  # 4.
    new = {-1: -1, **{node: i for i, node in enumerate(kept)}}
    paths = list(nodes)
    return TokenTree(
        np.array([paths[node][1] for node in kept], np.int32),
        np.array([new[paths[node][0]] for node in kept], np.int32),
        np.zeros(len(kept) + 1, np.uint8),
        origins=np.array([origins[node] for node in kept], np.uint16),
        scores=1 - np.array([wrong[node] for node in kept], np.float32),
    )


def confidence(tree: TokenTree) -> list[float]:
    """The probability that the text passes through each node: the tree's own scores, or an estimate from its place among siblings."""
    scores: list[float] = []
    left = {-1: 1.0}  # node -> the probability that remains for its next children
    for node, parent in enumerate(tree.parents.tolist()):
        if tree.scores is None:
            scores.append(SURE * left[parent])
            left[parent] -= scores[node]
        else:
            scores.append(min(float(tree.scores[node]), scores[parent] if parent >= 0 else 1.0))
        left[node] = scores[node]
    return scores
