"""Losses that make the distribution q of a drafter like the distribution p of its target.

Yongchao Zhou, Kaifeng Lyu, Ankit Singh Rawat, et al.: DistillSpec, 2023, arXiv 2310.08461 (the divergences).
Raghavv Goel, Mukul Gagrani, Wonseok Jeon, et al.: Direct Alignment of Draft Model, 2024, arXiv 2403.00858 (TVD++).

A distribution is f32[..., K + 1]: the log-probabilities of K listed tokens and of all others together. Merging tokens makes no loss but
TVD++ larger, and none smaller if their probabilities are in proportion.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

TINY = 1e-9


def distribution_of(logits: Tensor, ids: Tensor) -> Tensor:
    """The distribution of logits [..., V] over ids i64[..., K] and the rest. ids >= V have probability 0."""
    logits = logits.float()
    inside = ids < logits.shape[-1]
    picked = logits.gather(-1, ids.where(inside, 0)).masked_fill(~inside, -torch.inf) - logits.logsumexp(-1, keepdim=True)
    return with_rest(picked)


def with_rest(picked: Tensor) -> Tensor:
    """Log-probabilities of listed tokens [..., K] -> the same and that of the rest."""
    rest = (1 - picked.exp().sum(-1, keepdim=True)).clamp_min(TINY).log()
    return torch.cat([picked, rest], -1)


def cross_entropy(p: Tensor, q: Tensor) -> Tensor:
    """-sum p log q. Its gradient is that of the forward KL."""
    return -(p.exp() * _finite(q)).sum(-1)


def forward_kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q): q covers all that p does."""
    return (p.exp() * (_finite(p) - _finite(q))).sum(-1)


def reverse_kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(q || p): q stays where p is."""
    return forward_kl(q, p)


def jensen_shannon(p: Tensor, q: Tensor, beta: float = 0.5) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q."""
    mixed = (beta * p.exp() + (1 - beta) * q.exp()).clamp_min(TINY).log()
    return beta * forward_kl(p, mixed) + (1 - beta) * forward_kl(q, mixed)


def total_variation(p: Tensor, q: Tensor) -> Tensor:
    """1 - sum min(p, q), the probability that a token drawn from q is rejected."""
    return (p.exp() - q.exp()).abs().sum(-1) / 2


def tvd_plus(p: Tensor, q: Tensor) -> Tensor:
    """A loss with the gradient of TVD++: that of total variation as the gradient of a policy q, E_q[-advantage grad log q], whose reward
    1[p > q] is normalised by its mean and standard deviation over all tokens and rows, weighted by q. Where all rewards are equal, as
    for p = q, it is 0."""
    weight = q.detach().exp()
    reward = (p > q.detach()).to(q.dtype)
    mean = (weight * reward).sum() / weight.sum()
    spread = ((weight * (reward - mean).square()).sum() / weight.sum()).sqrt()
    advantage = (reward - mean) / spread if spread > 1e-6 else torch.zeros_like(reward)
    return -(weight * advantage * _finite(q)).sum(-1)


def _finite(distribution: Tensor) -> Tensor:
    """Log-probabilities without minus infinity, whose product with 0 is not a number."""
    return distribution.clamp_min(-100.0)


Loss = Callable[[Tensor, Tensor], Tensor]
"""(p, q), log-probabilities [..., K + 1] -> [...]; the gradient flows through q."""

LOSSES: dict[str, Loss] = {
    "ce": cross_entropy,
    "fkl": forward_kl,
    "rkl": reverse_kl,
    "jsd": jensen_shannon,
    "tv": total_variation,
    "tvd++": tvd_plus,
}
