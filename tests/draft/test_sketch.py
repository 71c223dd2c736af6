"""Distributions of drafted tokens."""

from __future__ import annotations

import numpy as np
import pytest

from redraft.draft.sketch import NextDistribution


@pytest.mark.parametrize(("bias", "least"), [(0.0, 0.9), (100.0, 1.0)])
def test_a_total_from_before_a_bias_makes_no_probability_above_one(bias: float, least: float) -> None:
    values = np.array([3.0, 1.0, 2.0])
    total = float(np.logaddexp.reduce(np.append(values, -1.0)))
    made = NextDistribution(np.arange(3), values + np.array([0, bias, 0]), None, target=True, total=total)
    assert least <= np.exp(made.logq).sum() <= 1 + 1e-12
    assert made.best(1) == [1 if bias else 0]
