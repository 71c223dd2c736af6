"""Every drafter that samples, with every verifier that undoes its kind: the law of three tokens is the target's."""

from __future__ import annotations

import numpy as np
import pytest

from redraft import registry
from redraft.core.plan import Budget
from redraft.core.tree import Kind, TokenTree
from redraft.draft.second import SecondModel
from redraft.verify.verifier import Rejecting, Verifier
from tests.contracts.algebra import LEAST_P, chi_square_p, random_laws
from tests.contracts.drawn import ForestLaw, forest, texts
from tests.contracts.identity import complete

SAMPLES = 6000
BUDGET = Budget(8, 2)

METHODS = {name: registry.create("draft", name) for name in registry.METHODS["draft"] if complete("draft", name)}
DRAWN = {name: method for name, method in METHODS.items() if isinstance(method, SecondModel)}
RULES = {name: rule for name in registry.METHODS["verify"] if isinstance(rule := registry.create("verify", name), Rejecting)}
PAIRS = [(d, v) for d, method in DRAWN.items() for v, rule in RULES.items() if method.kind in rule.supports]  # type: ignore[attr-defined]


def p_value(verifier: Verifier, trees: list[TokenTree], laws: list[np.ndarray]) -> float:
    """Of the joint law of three tokens."""
    accepted = verifier.accept(trees, ForestLaw(laws, trees))  # type: ignore[arg-type]
    assert {len(a.path) for a in accepted} == {0, 1, 2}, "rejected, partly and wholly accepted somewhere"
    joint = laws[0]
    for p in laws[1:]:
        joint = joint[..., None] * p
    found = texts(laws, [a.tokens for a in accepted], 3, np.random.default_rng(9))
    cells = np.ravel_multi_index(tuple(found.T), joint.shape)
    return chi_square_p(np.bincount(cells, minlength=joint.size), joint.ravel() * len(trees))


@pytest.mark.parametrize(("drafter", "verifier"), PAIRS)
def test_the_law_is_the_targets(drafter: str, verifier: str) -> None:
    rng = np.random.default_rng(3)
    laws, draft = random_laws(rng), random_laws(rng)
    trees = forest(DRAWN[drafter], draft, SAMPLES, BUDGET)
    assert any(len(tree) > 1 for tree in trees)
    assert p_value(RULES[verifier], trees, laws) >= LEAST_P  # type: ignore[arg-type]


@pytest.mark.parametrize("drafter", DRAWN)
def test_a_tree_is_within_its_budget_and_of_its_kind(drafter: str) -> None:
    draft = random_laws(np.random.default_rng(4))
    for rows, depth in ((1, 2), (2, 1), (5, 2)):
        for tree in forest(DRAWN[drafter], draft, 50, Budget(rows, depth)):
            tree.check(vocab=5, rows=rows, depth=depth)
            inner = {int(parent) + 1 for parent in tree.parents}
            assert all((Kind(kind) == DRAWN[drafter].kind) == (i in inner) for i, kind in enumerate(tree.kinds))
            assert tree.laws is not None
            assert tree.scores is not None
            q = tree.laws.probs(sorted(inner))
            np.testing.assert_allclose(q.sum(1), 1)
            for parent, law in zip(sorted(inner), q, strict=True):
                assert all(law[tree.tokens[node]] > 0 for node in tree.drawn(parent - 1))
