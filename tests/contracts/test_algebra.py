"""Every registered verifier under the algebra contract, and the controls that must fail it."""

from __future__ import annotations

import numpy as np
import pytest

from redraft import registry
from redraft.card import Guarantee
from redraft.core.plan import Accepted
from redraft.core.tree import EMPTY, Kind, TokenTree
from tests.contracts.algebra import LEAST_P, VOCAB, FreshLaw, ToyLaw, check_law, check_text, random_laws, random_tree

VERIFIERS = [registry.method("verify", name)() for name in registry.METHODS["verify"]]
FIXED = [v for v in VERIFIERS if Kind.FIXED in v.undoes and v.card.guarantee <= Guarantee.SAME_LAW]
SAME_TEXT = [v for v in VERIFIERS if v.card.guarantee == Guarantee.SAME_TEXT]


def full_tree() -> TokenTree:
    pairs = [(token, -1) for token in range(VOCAB)] + [(token, parent) for parent in range(VOCAB) for token in range(VOCAB)]
    return TokenTree.build(*map(list, zip(*pairs, strict=True)), vocab=VOCAB, rows=99, depth=2)


@pytest.mark.parametrize("verifier", FIXED, ids=lambda v: v.card.title)
@pytest.mark.parametrize("seed", range(3))
def test_law_of_fixed_trees(verifier, seed):
    rng = np.random.default_rng(seed)
    p_value, accepted = check_law(verifier, random_laws(rng), random_tree(rng, 8), 50_000)
    assert p_value >= LEAST_P
    assert {len(a.path) for a in accepted} == {0, 1, 2}, "the tree must be rejected, partly and wholly accepted somewhere"


@pytest.mark.parametrize("verifier", FIXED, ids=lambda v: v.card.title)
def test_law_with_independent_noise(verifier):
    rng = np.random.default_rng(7)
    assert check_law(verifier, random_laws(rng), random_tree(rng, 8), 50_000, FreshLaw)[0] >= LEAST_P


@pytest.mark.parametrize("verifier", SAME_TEXT, ids=lambda v: v.card.title)
@pytest.mark.parametrize("greedy", [False, True])
def test_text_of_any_tree(verifier, greedy):
    rng = np.random.default_rng(11)
    trees = [EMPTY, full_tree(), TokenTree.chain([2, 2]), *(random_tree(rng, int(rng.integers(1, 20))) for _ in range(25))]
    for tree in trees:
        check_text(verifier, random_laws(rng), tree, 300, greedy)


class PerRow:
    """The control: every root-to-leaf row draws for itself, and the longest match is taken."""

    def accept(self, trees, law):
        tree = trees[0]
        leaves = [i for i in range(len(tree)) if i not in tree.parents]
        best = [Accepted()] * len(trees)
        for leaf in leaves:
            path = tree.path_to(leaf)
            drawn = np.stack([law.draw((law.roots + 1 + node).tolist()) for node in [-1, *path]], axis=1)
            matches = np.cumprod(drawn[:, :-1] == tree.tokens[path], axis=1).sum(1)
            for s, n in enumerate(matches):
                if not best[s].tokens or n > len(best[s].path):
                    best[s] = Accepted(tuple(path[:n]), tuple(drawn[s, : n + 1].tolist()))
        return best


def test_control_one_draw_per_row_is_biased():
    rng = np.random.default_rng(0)
    laws, tree = random_laws(rng), random_tree(rng, 8)
    assert check_law(PerRow(), laws, tree, 50_000, FreshLaw)[0] < LEAST_P


class NodeNoise(ToyLaw):
    """The control: noise that depends on where a node lies in the tree."""

    def draw(self, rows):
        seeds, places = np.divmod(np.asarray(rows), len(self.tree) + 1)
        return self.tokens(self.law_probs[places], seeds, places).tolist()


@pytest.mark.parametrize("verifier", SAME_TEXT, ids=lambda v: v.card.title)
def test_control_noise_by_node_changes_the_text(verifier):
    rng = np.random.default_rng(0)
    toy = NodeNoise(random_laws(rng), full_tree(), 300)
    accepted = verifier.accept([toy.tree] * 300, toy)
    assert (toy.complete([a.tokens for a in accepted]) != toy.plain()).any()
