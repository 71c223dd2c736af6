"""RAPID's rule: with eta 0 that of rejection, and its mix by its definition."""

from __future__ import annotations

import numpy as np
import pytest

from redraft.core.tree import Kind
from redraft.errors import InvalidInput
from redraft.verify.rapid import Rapid
from redraft.verify.rejection import Rejection
from redraft.verify.verifier import residual
from tests.contracts.exact import pairs


@pytest.mark.parametrize("vocab", [4, 6])
def test_eta_0_is_rejection_bit_for_bit(vocab: int) -> None:
    for p, q in pairs(np.random.default_rng(3), vocab):
        for x in np.flatnonzero(q).tolist():
            ours, its = (rule.stages(p, q, [x], Kind.SINGLE) for rule in (Rapid(eta=0), Rejection()))
            assert next(ours) == next(its)
            assert (residual(ours) == residual(its)).all()


def test_the_mix_moves_likely_tokens_of_the_draft_only() -> None:
    p, q = np.array([0.5, 0.3, 0.15, 0.05, 0.0]), np.array([0.1, 0.6, 0.25, 0.04, 0.01])
    mixed = Rapid(eta=4).mixed(p, q)
    weights = p * np.exp([4 * (0.1 - 0.5), 4 * (0.6 - 0.3), 4 * (0.25 - 0.15), 0, 0])
    np.testing.assert_allclose(mixed, weights / weights.sum())
    rule = Rapid(eta=4).stages(p, q, [0], Kind.SINGLE)
    assert next(rule) == pytest.approx(min(1, mixed[0] / 0.1))
    np.testing.assert_allclose(residual(rule), np.maximum(np.maximum(p - q, p - mixed), 0))
    assert mixed[4] == 0, "what the target cannot say stays impossible"


def test_more_is_accepted_the_larger_eta_is() -> None:
    rng = np.random.default_rng(1)
    p, q = rng.dirichlet(np.full(50, 0.3), 2)
    shares = [np.minimum(Rapid(eta=eta).mixed(p, q), q).sum() for eta in (0, 2, 5)]
    assert shares[0] < shares[1] < shares[2]


def test_sharp_distributions_give_numbers() -> None:
    p, q = np.eye(4)[0], np.eye(4)[1]
    for eta in (10, 1000):
        np.testing.assert_allclose(Rapid(eta=eta).mixed(p, q), p)
        assert np.isfinite(Rapid(eta=eta).mixed(p * 0.5 + q * 0.5, q)).all()


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(InvalidInput, match="rapid:eta=-1"):
        Rapid(eta=-1)
    with pytest.raises(InvalidInput, match="rapid:tail=2"):
        Rapid(tail=2)
