"""Losses between distributions: 0 and flat where the distributions are equal, and with the gradients that their papers give."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from redraft_train.losses import LOSSES, distribution_of, total_variation, tvd_plus, with_rest

IDS = torch.tensor([[4, 0, 7], [1, 2, 3]])


def distributions(seed: int) -> tuple[Tensor, Tensor]:
    """p, and logits [2, 9] of q."""
    random = torch.Generator().manual_seed(seed)
    p = torch.randn(2, 9, generator=random, dtype=torch.float64)
    q = torch.randn(2, 9, generator=random, dtype=torch.float64).requires_grad_()
    return p, q


def test_a_distribution_is_the_listed_tokens_and_the_rest() -> None:
    logits, _ = distributions(0)
    distribution = distribution_of(logits, IDS).exp()
    p = logits.softmax(-1)
    torch.testing.assert_close(distribution[:, :3].double(), p.gather(-1, IDS), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(distribution.sum(-1), torch.ones(2))
    outside = distribution_of(logits, torch.tensor([[4, 99], [99, 1]])).exp()
    assert outside[0, 1] == outside[1, 0] == 0


@pytest.mark.parametrize("name", LOSSES)
def test_flat_where_the_distributions_are_equal(name: str) -> None:
    _, q = distributions(1)
    distribution = distribution_of(q, IDS)
    loss = LOSSES[name](distribution.detach(), distribution)
    loss.sum().backward()
    torch.testing.assert_close(q.grad, torch.zeros_like(q), rtol=0, atol=1e-6)
    if name != "ce":
        torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_descends_to_the_distribution(name: str) -> None:
    p, q = distributions(2)
    distribution = distribution_of(p, IDS)
    before = total_variation(distribution, distribution_of(q, IDS)).mean().item()
    optimizer = torch.optim.Adam([q], 0.05)
    for _ in range(300):
        optimizer.zero_grad()
        LOSSES[name](distribution, distribution_of(q, IDS)).sum().backward()
        optimizer.step()
    assert total_variation(distribution, distribution_of(q, IDS)).mean() < 0.2 * before


def test_total_variation_has_the_gradient_of_a_policy() -> None:
    p, q = distributions(3)
    target = p.log_softmax(-1)
    total_variation(target, q.log_softmax(-1)).sum().backward()
    by_autograd, q.grad = q.grad, None
    log_q = q.log_softmax(-1)
    reward = (target > log_q).double()
    (-(log_q.detach().exp() * reward * log_q).sum()).backward()
    torch.testing.assert_close(by_autograd, q.grad)


def test_tvd_plus_is_that_policy_with_a_normalised_reward() -> None:
    p, q = distributions(4)
    target = p.log_softmax(-1)
    tvd_plus(target, q.log_softmax(-1)).sum().backward()
    found, q.grad = q.grad, None
    log_q = q.log_softmax(-1)
    weight, reward = log_q.detach().exp() / 2, (target > log_q).double()  # over two rows
    mean = (weight * reward).sum()
    std = (weight * (reward - mean) ** 2).sum().sqrt()
    (-(log_q.detach().exp() * (reward - mean) / std * log_q).sum()).backward()
    torch.testing.assert_close(found, q.grad)


def test_merging_tokens_makes_no_divergence_larger() -> None:
    p, q = distributions(5)
    q = q.detach()
    for name in ("ce", "fkl", "rkl", "jsd", "tv"):
        whole = LOSSES[name](with_rest(p.log_softmax(-1)), with_rest(q.log_softmax(-1)))
        merged = LOSSES[name](distribution_of(p, IDS).double(), distribution_of(q, IDS).double())
        assert (merged <= whole + 1e-6).all(), name


@pytest.mark.parametrize("name", LOSSES)
def test_a_token_that_one_distribution_excludes(name: str) -> None:
    _, q = distributions(6)
    distribution = with_rest(torch.tensor([[0.0, -torch.inf, -torch.inf]] * 2))
    loss = LOSSES[name](distribution, distribution_of(q, IDS))
    loss.sum().backward()
    assert loss.isfinite().all() and q.grad is not None and q.grad.isfinite().all()
