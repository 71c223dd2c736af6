"""Typical acceptance with given distributions."""

from __future__ import annotations

import numpy as np
import pytest

from redraft.core.plan import Accepted
from redraft.core.tree import EMPTY, Kind, TokenTree
from redraft.errors import InvalidInput
from redraft.verify.typical import Typical
from tests.contracts.algebra import ToyDistribution, check_text, random_distributions, random_tree

FLAT = np.full(8, 1 / 8)
SHARP = np.array([0.9, 0.05, 0.01, 0.04, 0, 0, 0, 0])


class Written:
    """A distribution for each row and the token drawn there. It records which rows were requested."""

    def __init__(self, roots, distributions, drawn):
        self.roots, self.distributions, self.drawn, self.asked = np.asarray(roots, np.int32), distributions, drawn, []

    def probs(self, rows):
        self.asked += rows
        return np.stack([self.distributions[row] for row in rows])

    def draw(self, rows):
        return [self.drawn[row] for row in rows]


def test_the_bound_falls_with_entropy():
    assert Typical().threshold(np.eye(4)[0]) == 0.09
    assert Typical(eps=0.5).threshold(FLAT) == pytest.approx(0.3 / 8)
    assert Typical().threshold(FLAT) == pytest.approx(0.3 / 8)
    entropy = -sum(x * np.log(x) for x in SHARP if x)
    assert Typical(eps=0.5, delta=0.2).threshold(SHARP) == pytest.approx(0.2 * np.exp(-entropy))


#   root -> 0, 1;  0 -> 2, 3;  1 -> 5
TREE = TokenTree.build([0, 1, 2, 3, 5], [-1, -1, 0, 0, 1], vocab=8, rows=9, depth=9)


def test_the_longest_path_that_passes_then_the_targets_own_token():
    # token 0 is the likelier, but only below token 1 does a child pass
    distribution = Written([0], {0: FLAT, 1: SHARP, 2: FLAT}, {5: 7})
    assert Typical().accept([TREE], distribution) == [Accepted((1, 4), (1, 5, 7))]
    assert sorted(distribution.asked) == [0, 1, 2], "leaves need no distribution"


def test_of_equally_long_paths_the_likeliest():
    root = np.array([0.3, 0.4, 0, 0.3, 0, 0, 0, 0])
    lean = np.array([0, 0, 0.4, 0.6, 0, 0, 0, 0])
    sure = np.array([0, 0, 0, 0, 0, 1.0, 0, 0])
    half = np.array([0.5, 0, 0, 0, 0, 0.5, 0, 0])
    assert Typical().accept([TREE], Written([0], {0: root, 1: lean, 2: sure}, {5: 7})) == [Accepted((1, 4), (1, 5, 7))]  # 0.4
    # 0.3 * 0.6 against 0.4 * 0.5, then against 0.4 * 0.25
    assert Typical().accept([TREE], Written([0], {0: root, 1: lean, 2: half}, {5: 7})) == [Accepted((1, 4), (1, 5, 7))]
    quarter = np.array([0.25, 0.25, 0, 0, 0.25, 0.25, 0, 0])
    assert Typical().accept([TREE], Written([0], {0: root, 1: lean, 2: quarter}, {4: 7})) == [Accepted((0, 3), (0, 3, 7))]


def test_the_bonus_alone_where_nothing_passes():
    tree = TokenTree.chain([2, 3])
    distribution = Written([4, -1, 0], {4: SHARP}, {4: 6, 0: 1})
    assert Typical().accept([tree, EMPTY, EMPTY], distribution) == [Accepted((), (6,)), Accepted(), Accepted((), (1,))]
    assert distribution.asked == [4]
    assert Typical().accept([EMPTY], Written([-1], {}, {})) == [Accepted()]


def test_a_node_drawn_twice_is_one_node():
    tree = TokenTree(
        np.array([0, 1], np.int32), np.array([-1, -1], np.int32), np.array([Kind.IID, 0, 0], np.uint8), None, np.array([0, 1, 0])
    )
    assert Typical().accept([tree], Written([0], {0: FLAT}, {1: 3})) == [Accepted((0,), (0, 3))]


class Certain(ToyDistribution):
    """Temperature 0: the distribution is one-hot at the drawn token."""

    def probs(self, rows):
        return np.eye(self.distribution_probs.shape[1])[self.draw(rows)]


@pytest.mark.parametrize("seed", range(5))
def test_at_temperature_0_the_text_is_the_greedy_one(seed):
    rng = np.random.default_rng(seed)
    check_text(Typical(), random_distributions(rng), random_tree(rng, 12), 20, greedy=True, distribution=Certain)


@pytest.mark.parametrize("options", [{"eps": 0}, {"eps": 1}, {"delta": -0.1}, {"delta": float("nan")}])
def test_options_out_of_range_are_refused(options):
    (name,) = options
    with pytest.raises(InvalidInput, match=f"typical:{name}"):
        Typical(**options)
