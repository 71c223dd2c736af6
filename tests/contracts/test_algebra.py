"""Every registered verifier under the algebra contract, and the controls that must fail it."""

from __future__ import annotations

import numpy as np
import pytest

from redraft import registry
from redraft.card import Guarantee
from redraft.core.plan import Accepted
from redraft.core.tree import EMPTY, Kind, TokenTree
from redraft.errors import Unsupported
from tests.contracts.algebra import (
    LEAST_P,
    VOCAB,
    FreshDistribution,
    ToyDistribution,
    check_distribution,
    check_path,
    check_text,
    distribution_p,
    draw,
    drawn_tree,
    random_distributions,
    random_tree,
)
from tests.contracts.drawn import ForestDistribution, texts
from tests.contracts.exact import RULES, Reused, likeliest

VERIFIERS = [registry.method("verify", name)() for name in registry.METHODS["verify"]]
SAME_DISTRIBUTION = [v for v in VERIFIERS if v.card.guarantee <= Guarantee.SAME_DISTRIBUTION]
FIXED = [v for v in SAME_DISTRIBUTION if Kind.FIXED in v.supports and not hasattr(v, "stages")]  # those meet them in mixed trees
SAME_TEXT = [v for v in VERIFIERS if v.card.guarantee == Guarantee.SAME_TEXT]


def full_tree() -> TokenTree:
    pairs = [(token, -1) for token in range(VOCAB)] + [(token, parent) for parent in range(VOCAB) for token in range(VOCAB)]
    return TokenTree.build(*map(list, zip(*pairs, strict=True)), vocab=VOCAB, rows=99, depth=2)


@pytest.mark.parametrize("verifier", FIXED, ids=lambda v: v.card.title)
@pytest.mark.parametrize("seed", range(3))
def test_distribution_of_fixed_trees(verifier, seed):
    rng = np.random.default_rng(seed)
    p_value, accepted = check_distribution(verifier, random_distributions(rng), random_tree(rng, 8), 30_000)
    assert p_value >= LEAST_P
    assert {len(a.path) for a in accepted} == {0, 1, 2}, "the tree must be rejected, partly and wholly accepted somewhere"


@pytest.mark.parametrize("verifier", FIXED, ids=lambda v: v.card.title)
def test_distribution_with_independent_noise(verifier):
    rng = np.random.default_rng(7)
    assert check_distribution(verifier, random_distributions(rng), random_tree(rng, 8), 30_000, FreshDistribution)[0] >= LEAST_P


# ---- trees drawn from a draft's distribution, one for each sequence

FOREST = 2500


def drawn_p(verifier, kinds, draw=draw):
    """p-value of the distribution of three tokens where each node of each tree is of one of `kinds`; numbers of accepted nodes."""
    rng = np.random.default_rng(5)
    distributions, draft = random_distributions(rng), random_distributions(rng)
    trees = [drawn_tree(rng, draft, kinds, draw=draw) for _ in range(FOREST)]
    accepted = verifier.accept(trees, ForestDistribution(distributions, trees))
    for tree, a in zip(trees, accepted, strict=True):
        check_path(tree, a)
        assert tree.child([-1, *a.path][-1], a.tokens[-1]) < 0, "a child that carries the token is followed"
    p_value = distribution_p(distributions, texts(distributions, [a.tokens for a in accepted], 3, np.random.default_rng(6)))
    return p_value, {len(a.path) for a in accepted}


@pytest.mark.parametrize("verifier", SAME_DISTRIBUTION, ids=lambda v: v.card.title)
def test_distribution_of_drawn_trees_of_mixed_kinds(verifier):
    many = sorted(verifier.supports - {Kind.FIXED, Kind.SINGLE})
    p_value, lengths = drawn_p(verifier, [*sorted(verifier.supports), *many, *many])
    assert p_value >= LEAST_P
    assert lengths == {0, 1, 2}, "rejected, partly and wholly accepted somewhere"


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, rule in RULES.items() for kind in set(Kind) - rule.supports])
def test_children_of_another_kind_are_refused_by_name(name, kind):
    rng = np.random.default_rng(8)
    tree = drawn_tree(rng, random_distributions(rng), [kind])
    with pytest.raises(Unsupported, match=f"{type(RULES[name]).__name__} .* {kind.name}"):
        RULES[name].accept([tree], ForestDistribution(random_distributions(rng), [tree]))


WITHOUT_REPLACEMENT = [name for name, rule in RULES.items() if Kind.WITHOUT_REPLACEMENT in rule.supports]


def test_control_q_reused_after_a_rejection_is_biased():
    assert drawn_p(Reused(), [Kind.WITHOUT_REPLACEMENT])[0] < LEAST_P


@pytest.mark.parametrize("name", WITHOUT_REPLACEMENT)
def test_control_pruning_by_probability_after_sampling_is_biased(name):
    def pruned(rng, q, k, kind):
        return [x for x in draw(rng, q, k, kind) if q[x] > 0.2]

    assert drawn_p(RULES[name], [Kind.WITHOUT_REPLACEMENT], pruned)[0] < LEAST_P


@pytest.mark.parametrize("name", WITHOUT_REPLACEMENT)
def test_control_a_deterministic_tree_is_biased(name):
    def best(rng, q, k, kind):
        return list(likeliest(q, min(k, np.count_nonzero(q))))

    assert drawn_p(RULES[name], [Kind.WITHOUT_REPLACEMENT], best)[0] < LEAST_P


# ---- the text


@pytest.mark.parametrize("verifier", SAME_TEXT, ids=lambda v: v.card.title)
@pytest.mark.parametrize("greedy", [False, True])
def test_text_of_any_tree(verifier, greedy):
    rng = np.random.default_rng(11)
    trees = [EMPTY, full_tree(), TokenTree.chain([2, 2]), *(random_tree(rng, int(rng.integers(1, 20))) for _ in range(25))]
    for tree in trees:
        check_text(verifier, random_distributions(rng), tree, 300, greedy)


class PerRow:
    """A control: every root-to-leaf path draws for itself, and the longest match is taken."""

    def accept(self, trees, distribution):
        tree = trees[0]
        leaves = [i for i in range(len(tree)) if i not in tree.parents]
        best = [Accepted()] * len(trees)
        for leaf in leaves:
            path = tree.path_to(leaf)
            drawn = np.stack([distribution.draw((distribution.roots + 1 + node).tolist()) for node in [-1, *path]], axis=1)
            matches = np.cumprod(drawn[:, :-1] == tree.tokens[path], axis=1).sum(1)
            for s, n in enumerate(matches):
                if not best[s].tokens or n > len(best[s].path):
                    best[s] = Accepted(tuple(path[:n]), tuple(drawn[s, : n + 1].tolist()))
        return best


def test_control_one_draw_per_row_is_biased():
    rng = np.random.default_rng(0)
    distributions, tree = random_distributions(rng), random_tree(rng, 8)
    assert check_distribution(PerRow(), distributions, tree, 30_000, FreshDistribution)[0] < LEAST_P


class NodeNoise(ToyDistribution):
    """A control: the noise depends on the place of a node in the tree."""

    def draw(self, rows):
        seeds, places = np.divmod(np.asarray(rows), len(self.tree) + 1)
        return self.tokens(self.distribution_probs[places], seeds, places).tolist()


@pytest.mark.parametrize("verifier", SAME_TEXT, ids=lambda v: v.card.title)
def test_control_noise_by_node_changes_the_text(verifier):
    rng = np.random.default_rng(0)
    toy = NodeNoise(random_distributions(rng), full_tree(), 300)
    accepted = verifier.accept([toy.tree] * 300, toy)
    assert (toy.complete([a.tokens for a in accepted]) != toy.plain()).any()
