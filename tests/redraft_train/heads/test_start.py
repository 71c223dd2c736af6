"""The linear start: least squares, and heads that can guess before any step."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from redraft_train import heads
from redraft_train.heads.start import regressed
from redraft_train.target import Target
from tests.redraft_train.heads import toys


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return toys.target(tmp_path_factory.mktemp("target"))


def test_is_that_of_least_squares() -> None:
    random = torch.Generator().manual_seed(0)
    embedding = torch.randn(50, 6, generator=random)
    window = toys.window_of(torch.randint(0, 50, (4, 40), generator=random), torch.randn(4, 40, 6, generator=random))
    window.text[0, 25:] = 1
    window.text[3, 30:] = -1
    found = regressed([window], embedding, 2.0, 2)
    inside = (window.text[:, :-2] == window.text[:, 2:]) & (window.text[:, :-2] >= 0)
    parts = [window.state[:, :-2], 2 * embedding[window.tokens[:, 1:-1]], 2 * embedding[window.tokens[:, 2:]]]
    for i, matrix in enumerate(found):
        x, y = torch.cat(parts[: i + 2], -1)[inside], window.state[:, i + 1 : 38 + i + 1][inside]
        expected = np.linalg.lstsq(x.numpy(), y.numpy(), rcond=None)[0].T
        np.testing.assert_allclose(matrix.numpy(), expected, atol=0.01)
    assert regressed([], embedding, 2.0, 2) == []


@pytest.mark.parametrize("text", ["eagle:rollout=1", "hydra:heads=2"])
def test_guesses_before_any_step(text: str, target: Target) -> None:
    window = toys.chains(target, 0)
    window = replace(
        window, state=5 * target.final_norm * torch.nn.functional.normalize(target.head[toys.successor(window.tokens)].float(), dim=-1)
    )
    head = heads.create(text, target, toys.KEPT)
    before = head.loss(window)
    head.begin([window])
    after = head.loss(window)
    assert after.hits.sum() > 0.9 * after.counts.sum() > 2 * before.hits.sum()
