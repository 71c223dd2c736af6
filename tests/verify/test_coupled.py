"""Coupled with a distribution that draws given tokens."""

from __future__ import annotations

import numpy as np

from redraft.core.plan import Accepted
from redraft.core.tree import EMPTY, TokenTree
from redraft.verify.coupled import Coupled


class Written:
    """Draws tokens from a table and records which rows were requested together."""

    def __init__(self, roots, drawn):
        self.roots, self.drawn, self.asked = np.asarray(roots, np.int32), drawn, []

    def draw(self, rows):
        self.asked.append(list(rows))
        return [self.drawn[row] for row in rows]


#   root -> 4, 5;  4 -> 6, 7;  7 -> 8
TREE = TokenTree.build([4, 5, 6, 7, 8], [-1, -1, 0, 0, 3], vocab=10, rows=9, depth=9)


def test_follows_matches_and_stops_with_the_bonus():
    distribution = Written([0], {0: 4, 1: 7, 4: 9})
    assert Coupled().accept([TREE], distribution) == [Accepted((0, 3), (4, 7, 9))]
    assert distribution.asked == [[0], [1], [4]]


def test_full_acceptance_gets_its_bonus():
    assert Coupled().accept([TREE], Written([0], {0: 4, 1: 7, 4: 8, 5: 1})) == [Accepted((0, 3, 4), (4, 7, 8, 1))]


def test_a_token_of_another_branch_does_not_match():
    assert Coupled().accept([TREE], Written([0], {0: 5, 2: 6})) == [Accepted((1,), (5, 6))]


def test_a_batch_goes_level_by_level_and_skips_unfinished_chunks():
    distribution = Written([3, -1, 0, 9], {3: 4, 4: 6, 6: 0, 0: 2, 9: 5, 11: 5})
    accepted = Coupled().accept([TREE, EMPTY, EMPTY, TREE], distribution)
    assert accepted == [Accepted((0, 2), (4, 6, 0)), Accepted(), Accepted((), (2,)), Accepted((1,), (5, 5))]
    assert distribution.asked == [[3, 0, 9], [4, 11], [6]]


def test_nothing_to_do():
    distribution = Written([-1], {})
    assert Coupled().accept([EMPTY], distribution) == [Accepted()]
    assert not distribution.asked
