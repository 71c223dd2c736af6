"""The bound of optimal transport against brute force over all sets, and the rules against the bound and their published order."""

from __future__ import annotations

import math

import numpy as np
import pytest

from redraft.core.tree import Kind
from redraft.verify import bound as bounds
from redraft.verify.bound import bound, gauge, independent, top_plus_one, without_replacement
from tests.contracts.exact import RULES, draws, likeliest, outcome, pairs


def brute(p, ways):
    """1 + min over all sets H of p(H) - Q(H)."""
    chances = np.array([chance for chance, _ in ways])
    drawn = np.array([sum(1 << x for x in set(tokens)) for _, tokens in ways])
    cuts = [sum(p[x] for x in range(len(p)) if inside >> x & 1) - chances[(drawn & ~inside) == 0].sum() for inside in range(1 << len(p))]
    return 1 + min(cuts)


@pytest.mark.parametrize("kind", [Kind.SINGLE, Kind.IID, Kind.WITHOUT_REPLACEMENT, Kind.TOP_PLUS_ONE])
@pytest.mark.parametrize(("vocab", "most"), [(5, 4), (8, 3)])
def test_a_scan_over_prefixes_finds_the_best_of_all_sets(kind, vocab, most):
    for k in range(1, 2 if kind is Kind.SINGLE else most + 1):
        for p, q in pairs(np.random.default_rng(10 * vocab + k), vocab):
            ways = list(draws(q, k, kind))
            assert bound(p, q, ways[0][1], kind) == pytest.approx(brute(p, ways), abs=1e-12), (p, q, k)


def test_more_children_than_tokens_are_all_of_them():
    p, q = np.array([0.1, 0.2, 0.3, 0.4]), np.array([0.5, 0, 0.5, 0])
    for k in (2, 3, 9):
        assert without_replacement(p, q, k) == pytest.approx(0.4)


def test_a_draft_that_is_all_but_certain():
    p, q = np.random.default_rng(0).dirichlet(np.ones(6), 2)
    for rest in (1e-6, 1e-13, 1e-20, 1e-200):
        peaked = np.where(np.arange(6) == 2, 1, rest * q)
        peaked /= peaked.sum()
        for k in (2, 3, 4):
            assert without_replacement(p, peaked, k) == pytest.approx(brute(p, list(draws(peaked, k, Kind.WITHOUT_REPLACEMENT))), abs=1e-11)


def test_the_integral_is_the_closed_form_where_there_is_one():
    rng = np.random.default_rng(2)
    for spread in (0.1, 1, 4):
        q = np.exp(spread * rng.normal(size=3000))
        q /= q.sum()
        np.testing.assert_allclose(bounds._race(q, 2), bounds._pair(q), rtol=0, atol=1e-12)
    for k in (2, 5, 9):  # of 50 equally likely tokens
        even = [math.comb(m, k) / math.comb(50, k) for m in range(1, 51)]
        np.testing.assert_allclose(bounds._race(np.full(50, 0.02), k), even, rtol=0, atol=1e-12)


@pytest.mark.parametrize("spread", [0.3, 1.0])
def test_more_children_and_distinct_ones_allow_more(spread):
    for p, q in np.random.default_rng(3).dirichlet(np.full(30, spread), (20, 2)):
        with_, without = [[rule(p, q, k) for k in range(1, 6)] for rule in (independent, without_replacement)]
        assert with_ == sorted(with_)
        assert without == sorted(without)
        assert with_[0] == pytest.approx(np.minimum(p, q).sum(), abs=1e-12)
        assert without[0] == pytest.approx(with_[0], abs=1e-12)
        assert all(a < b for a, b in zip(with_[1:], without[1:], strict=True))


def test_fixed_children_are_accepted_as_often_as_the_target_draws_them():
    p = np.array([0.5, 0.3, 0.2])
    for rule in RULES.values():
        assert gauge(rule, p, np.zeros(3), [1, 2], Kind.FIXED) == pytest.approx((0.5, 0.5))


# ---- claims of the papers about single rules

# The gain of two draws over one in mean acceptance (0.545) for 6 tokens, p and q from Dirichlet(1): exact sums over all draws,
# averaged over 40,000 pairs with other code than this.
GAINS = {
    "multi-candidate": (Kind.IID, 0.096),
    "k-seq": (Kind.IID, 0.113),
    "recursive": (Kind.WITHOUT_REPLACEMENT, 0.139),
    "greedy-multi-draft": (Kind.TOP_PLUS_ONE, 0.140),
}
PAIRS = np.random.default_rng(4).dirichlet(np.ones(6), (400, 2))
ONE = np.array([np.minimum(p, q).sum() for p, q in PAIRS])


def gains(found, expected):
    """Within three standard errors, which are small enough to distinguish the numbers."""
    error = np.std(found - ONE) / len(ONE) ** 0.5
    return error < 0.005 and abs(np.mean(found - ONE) - expected) < 3 * error


@pytest.mark.parametrize("name", sorted(GAINS.keys() & RULES.keys()))
def test_mean_acceptance(name):
    kind, expected = GAINS[name]
    assert gains([outcome(RULES[name], p, q, kind, draws(q, 2, kind))[1] for p, q in PAIRS], expected)


def test_mean_bound():
    assert np.mean(ONE) == pytest.approx(0.545, abs=0.02)
    assert gains([independent(p, q, 2) for p, q in PAIRS], 0.148)
    assert gains([without_replacement(p, q, 2) for p, q in PAIRS], 0.202)
    assert gains([top_plus_one(p, q, likeliest(q, 1)) for p, q in PAIRS], 0.140)


@pytest.mark.parametrize("name", sorted({"greedy-multi-draft"} & RULES.keys()))
@pytest.mark.parametrize("k", [1, 2, 3])
def test_greedy_multi_draft_reaches_its_bound(name, k):
    kind = Kind.TOP_PLUS_ONE
    for p, q in pairs(np.random.default_rng(k), 6):
        ways = list(draws(q, k, kind))
        gauged = [(chance, *gauge(RULES[name], p, q, tokens, kind)) for chance, tokens in ways]
        assert sum(chance * own for chance, own, _ in gauged) == pytest.approx(gauged[0][2], abs=1e-12)


@pytest.mark.parametrize("name", sorted({"k-seq"} & RULES.keys()))
@pytest.mark.parametrize("k", [2, 3])
def test_k_seq_reaches_most_of_its_bound(name, k):
    for p, q in pairs(np.random.default_rng(k), 5):
        _, accepted = outcome(RULES[name], p, q, Kind.IID, draws(q, k, Kind.IID))
        assert accepted >= (1 - 1 / math.e) * independent(p, q, k) - 1e-12
        if (p == q).all():
            assert accepted > 1 - 1e-9
