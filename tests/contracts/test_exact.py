"""Every registered rule that tosses coins, enumerated exactly: the next token has the target distribution."""

from __future__ import annotations

import numpy as np
import pytest

from redraft.core.tree import Kind
from redraft.verify.bound import acceptance, bound
from tests.contracts.exact import RULES, SAMPLED, Reused, draws, likeliest, outcome, pairs

RANDOM = np.random.default_rng(1).dirichlet(np.ones(6), 2)
RANDOM.setflags(write=False)  # a rule must not modify the distributions


@pytest.mark.parametrize(("name", "kind"), SAMPLED)
@pytest.mark.parametrize("vocab", [4, 5, 6])
def test_the_distribution_is_the_targets_and_acceptance_is_within_the_bound(name, kind, vocab):
    rule = RULES[name]
    for k in (1, 2, 3)[: 1 if kind is Kind.SINGLE else 3]:
        for p, q in pairs(np.random.default_rng(100 * vocab + k), vocab):
            ways = list(draws(q, k, kind))
            assert sum(chance for chance, _ in ways) == pytest.approx(1, abs=1e-12)
            distribution, accepted = outcome(rule, p, q, kind, ways)
            assert np.abs(distribution - p).max() < 1e-12, (p, q, k)
            most = bound(p, q, ways[0][1], kind)
            assert accepted <= most + 1e-12, (p, q, k)
            assert accepted == pytest.approx(sum(chance * acceptance(rule, p, q, x, kind) for chance, x in ways), abs=1e-12)
            if k == 1:
                assert accepted == pytest.approx(np.minimum(p, q).sum(), abs=1e-12)
                assert most == pytest.approx(accepted, abs=1e-12)


DISTINCT = (Kind.WITHOUT_REPLACEMENT, Kind.TOP_PLUS_ONE)


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, kind in SAMPLED if kind in DISTINCT])
def test_a_child_whose_probability_is_lost_to_rounding_is_not_tested(name, kind):
    """A token drawn in log space can have a q below the smallest float64. The result still has the target distribution."""
    p, q = np.array([0.1, 0.4, 0.5, 0.0]), np.array([1.0, 0.0, 0.0, 0.0])
    distribution, _ = outcome(RULES[name], p, q, kind, [(1.0, [0, 1])])
    assert np.abs(distribution - p).max() < 1e-12


# ---- controls


def bias(rule, p, q, kind, ways):
    """Total variation between the distribution of the next token and the target."""
    return np.abs(outcome(rule, p, q, kind, ways)[0] - p).sum() / 2


@pytest.mark.parametrize(("name", "kind"), SAMPLED)
def test_control_a_deterministic_tree_is_biased(name, kind):
    found = []
    for seed in range(20):
        p, q = np.random.default_rng(seed).dirichlet(np.ones(6), 2)
        found.append(bias(RULES[name], p, q, kind, [(1.0, likeliest(q, 1 if kind is Kind.SINGLE else 2))]))
    assert np.mean(found) > 0.05


# (supported kind, given kind) of pairs that must be biased. Other pairs are exact. A rule for TOP_PLUS_ONE takes all draws except
# the last as given, so samples without replacement work. A rule for WITHOUT_REPLACEMENT skips a token that it has seen, and
# independent draws without their repeats are samples without replacement.
WRONG = [
    (Kind.IID, Kind.WITHOUT_REPLACEMENT),
    (Kind.IID, Kind.TOP_PLUS_ONE),
    (Kind.WITHOUT_REPLACEMENT, Kind.TOP_PLUS_ONE),
]


@pytest.mark.parametrize(("name", "kind", "other"), [(name, kind, other) for name, own in SAMPLED for kind, other in WRONG if own is kind])
def test_control_children_of_another_kind_are_biased(name, kind, other):
    p, q = RANDOM
    assert bias(RULES[name], p, q, kind, draws(q, 2, other)) > 0.005


def test_control_q_reused_after_a_rejection_is_biased():
    p, q = RANDOM
    kind = Kind.WITHOUT_REPLACEMENT
    assert bias(Reused(), p, q, kind, draws(q, 1, kind)) < 1e-12
    assert bias(Reused(), p, q, kind, draws(q, 2, kind)) > 0.005
