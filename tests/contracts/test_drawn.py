"""Every drafter that samples, with every verifier that supports its kind: the distribution of three tokens is the target's."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from redraft import registry
from redraft.card import Guarantee
from redraft.core.plan import Budget
from redraft.core.tree import Kind, TokenTree
from redraft.draft.second import SecondModel
from redraft.verify.verifier import Rejecting, Verifier
from tests.contracts.algebra import LEAST_P, chi_square_p, random_distributions
from tests.contracts.drawn import ForestDistribution, forest, texts
from tests.contracts.identity import complete

SAMPLES = 2000
BUDGET = Budget(8, 2)

METHODS = {name: registry.create("draft", name) for name in registry.METHODS["draft"] if complete("draft", name)}
DRAWN = {name: method for name, method in METHODS.items() if isinstance(method, SecondModel)}
RULES = {
    name: rule
    for name in registry.METHODS["verify"]
    if isinstance(rule := registry.create("verify", name), Rejecting) and rule.card.guarantee <= Guarantee.SAME_DISTRIBUTION  # type: ignore[attr-defined]
}
PAIRS = [(d, v) for d, method in DRAWN.items() for v, rule in RULES.items() if method.kind in rule.supports]  # type: ignore[attr-defined]


def p_value(verifier: Verifier, trees: list[TokenTree], distributions: list[np.ndarray]) -> float:
    """The p-value of the joint distribution of three tokens."""
    accepted = verifier.accept(trees, ForestDistribution(distributions, trees))  # type: ignore[arg-type]
    assert {len(a.path) for a in accepted} == {0, 1, 2}, "rejected, partly and wholly accepted somewhere"
    joint = distributions[0]
    for p in distributions[1:]:
        joint = joint[..., None] * p
    found = texts(distributions, [a.tokens for a in accepted], 3, np.random.default_rng(9))
    cells = np.ravel_multi_index(tuple(found.T), joint.shape)
    return chi_square_p(np.bincount(cells, minlength=joint.size), joint.ravel() * len(trees))


@cache
def drawn(drafter: str) -> tuple[list[np.ndarray], list[TokenTree]]:
    """The target's distributions, and trees that are drawn from others."""
    rng = np.random.default_rng(3)
    distributions, draft = random_distributions(rng), random_distributions(rng)
    return distributions, forest(DRAWN[drafter], draft, SAMPLES, BUDGET)


@pytest.mark.parametrize(("drafter", "verifier"), PAIRS)
def test_the_distribution_is_the_targets(drafter: str, verifier: str) -> None:
    distributions, trees = drawn(drafter)
    assert any(len(tree) > 1 for tree in trees)
    assert p_value(RULES[verifier], trees, distributions) >= LEAST_P  # type: ignore[arg-type]


@pytest.mark.parametrize("drafter", DRAWN)
def test_a_tree_is_within_its_budget_and_of_its_kind(drafter: str) -> None:
    draft = random_distributions(np.random.default_rng(4))
    for rows, depth in ((1, 2), (2, 1), (5, 2)):
        for tree in forest(DRAWN[drafter], draft, 50, Budget(rows, depth)):
            tree.check(vocab=5, rows=rows, depth=depth)
            inner = {int(parent) + 1 for parent in tree.parents}
            assert all((Kind(kind) == DRAWN[drafter].kind) == (i in inner) for i, kind in enumerate(tree.kinds))
            assert tree.distributions is not None
            assert tree.scores is not None
            q = tree.distributions.probs(sorted(inner))
            np.testing.assert_allclose(q.sum(1), 1)
            for parent, distribution in zip(sorted(inner), q, strict=True):
                assert all(distribution[tree.tokens[node]] > 0 for node in tree.drawn(parent - 1))
