"""The trees of any drafter as offers of single tokens."""

from __future__ import annotations

from typing import Any

import numpy as np

from redraft.core.plan import Budget
from redraft.core.testing import sequence
from redraft.core.tree import EMPTY, TokenTree
from redraft.draft.drafter import Stateless
from redraft.draft.ngram import NGram
from redraft.draft.source import SCORES, WIDTHS, Trees, source_of


class Proposes(Stateless):
    def __init__(self, tree: TokenTree) -> None:
        self.tree, self.budgets = tree, list[Budget]()

    def propose(self, seqs: Any, budgets: Any) -> list[TokenTree]:
        self.budgets += budgets
        return [self.tree] * len(seqs)


def walk(source: Trees, place: Any, *tokens: int) -> Any:
    for token in tokens:
        place = source.follow(place, token)
    return place


def test_a_tree_is_walked_node_by_node() -> None:
    tree = TokenTree.build([5, 6, 7, 8], [-1, -1, 0, 2], vocab=9, rows=9, depth=9)
    drafter = Proposes(tree)
    source = Trees(drafter, max_rows=4)
    root = source.start(sequence([1, 2]))
    assert drafter.budgets == [Budget(4, 4)]
    assert source.offers(root) == [(5, SCORES), (6, SCORES + 1)], "without scores the bucket is the rank"
    assert source.offers(walk(source, root, 5)) == [(7, SCORES + WIDTHS)], "and the depth"
    assert source.offers(walk(source, root, 5, 7)) == [(8, SCORES + 2 * WIDTHS)]
    assert list(source.offers(walk(source, root, 5, 7, 8))) == [] and source.follow(root, 7) is None
    assert all(bucket < source.buckets for _, bucket in source.offers(root))


def test_scores_are_relative_to_the_parents() -> None:
    tree = TokenTree(
        np.array([5, 7], np.int32), np.array([-1, 0], np.int32), np.zeros(3, np.uint8), scores=np.array([0.5, 0.45], np.float32)
    )
    source = Trees(Proposes(tree))
    root = source.start(sequence([1]))
    assert source.offers(root) == [(5, SCORES // 2)] and source.offers(source.follow(root, 5)) == [(7, 7)]


def test_nothing_proposed_is_nothing_offered_and_sources_stay_themselves() -> None:
    assert Trees(Proposes(EMPTY)).start(sequence([1])) is None
    own = NGram().open(None, None)
    assert source_of(own) is own and isinstance(source_of(Proposes(EMPTY)), Trees)
