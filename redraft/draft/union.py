"""Asks several drafters at once and merges their trees into one, within one budget of nodes.

The merge of trees: Xupeng Miao, Gabriele Oliaro, Zhihao Zhang, Xinhao Cheng, et al.: SpecInfer: Accelerating Generative
Large Language Model Serving with Tree-based Speculative Inference and Verification, 2023, arXiv 2305.09781.

1. Ask every part for a tree with the whole budget.
2. Score each node: the part's own confidence that the text goes through it, where its trees have scores. Else a node's
   first child gets SURE of its parent's score, the second SURE of what is left of it, and so on.
3. Nodes with the same parent and token are one; its score is the chance that not all who proposed it are wrong. Its origin
   is the part that proposed it first, in the order of `parts`.
4. Keep the best nodes that fit, of equal ones the first. No node scores above its parent, so parents come
   before their children and what stays is a tree.

Differs: the parts are any drafters instead of boost-tuned small models; the merged tree is cut to a budget. Its children
count as fixed, so verifiers that toss coins are refused where a part draws its children.
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
"""0.5, 0.7, 0.8, 0.9 give 1.92, 2.07, 2.08, 2.08 tokens a step (copyspec+token-recycling, pilot-16m, greedy, 8 rows; taking
the parts' nodes in turns 2.07, the better part alone 1.64), and 2.32, 2.44, 2.54, 2.42 (in turns 2.44) for
token-recycling+(draft-model:length=8) on the embedded pair."""


@dataclass(frozen=True)
class Union:
    """parts: drafters joined by +, each with its options in parentheses: copyspec+(token-recycling:k=4)."""

    parts: str = "copyspec+token-recycling"

    card: ClassVar[Card] = Card(
        "Union of drafters",
        "Miao, Oliaro, Zhang, Cheng, et al., SpecInfer: Accelerating Generative Large Language Model Serving with Tree-based "
        "Speculative Inference and Verification, 2023, arXiv 2305.09781",
        Guarantee.SAME_TEXT,
        needs="what its parts need",
        deviates="any drafters as parts; the merged tree is cut to the node budget by confidence",
        summary="Merges several drafters' trees; mixed traffic",
    )

    def __post_init__(self) -> None:
        if len(self.made()) < 2:
            raise InvalidInput(f"union:parts={self.parts}: two drafters or more are needed, joined by +")

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
                raise Unsupported(f"union: {name} makes children {kinds}, which no coin can undo in a merged tree; use verifier coupled")
        self.kinds = frozenset({Kind.FIXED})

    def propose(self, seqs: Seq[Sequence], budgets: Seq[Budget]) -> list[TokenTree]:
        asked = [part.propose(seqs, budgets) for part in self.parts]  # 1.
        return [merge(trees, budget.rows) for trees, budget in zip(zip(*asked, strict=True), budgets, strict=True)]


def merge(trees: Seq[TokenTree], rows: int) -> TokenTree:
    """One tree of at most `rows` nodes; equal paths are one node. origins: the first tree that has it."""
    nodes: dict[tuple[int, int], int] = {}  # (parent, token) -> node, parents before children
    wrong: list[float] = []  # the chance that all who proposed a node are wrong
    origins: list[int] = []
    for origin, tree in enumerate(trees):
        place = [-1]  # node of `tree`, from -1 on -> node
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
    """The chance that the text goes through each node: the tree's own scores, or what its place among siblings says."""
    scores: list[float] = []
    left = {-1: 1.0}  # node -> the chance that is left for its next children
    for node, parent in enumerate(tree.parents.tolist()):
        if tree.scores is None:
            scores.append(SURE * left[parent])
            left[parent] -= scores[node]
        else:
            scores.append(min(float(tree.scores[node]), scores[parent] if parent >= 0 else 1.0))
        left[node] = scores[node]
    return scores
