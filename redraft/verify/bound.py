"""Compares the acceptance of a rule at a node with the best possible acceptance, the bound of optimal transport.

Zhengmian Hu, Tong Zheng, Vignesh Viswanathan, Ziyi Chen, Ryan A. Rossi, Yihan Wu, Dinesh Manocha, Heng Huang: Towards
Optimal Multi-draft Speculative Decoding, 2025, arXiv 2502.18779. With any lossless rule, the probability that the next token is
one of the drawn tokens is at most 1 + min over sets H of tokens of [p(H) - Q(H)]. Q(H) is the probability that all draws lie in H.
For independent draws and for draws without replacement the minimising H is a prefix of the tokens sorted by p / q, so one scan over
the prefixes finds it.

p, q: f64[V], the target distribution and the draft distribution; each sums to 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq

import numpy as np

from redraft.core.tree import F64, I64, Kind
from redraft.verify.verifier import Rejecting, residual

STEP = 0.2  # step of the trapezoid rule in log time; the error falls exponentially with 1 / STEP
NEGLIGIBLE = 1e-250  # draft probabilities up to this count as 0
SURE = 40.0  # exp(-SURE) is negligible compared with 1


def gauge(rule: Rejecting, p: F64, q: F64, drawn: Seq[int], kind: Kind) -> tuple[float, float]:
    """(acceptance, bound) at one visited node, to be averaged over many nodes. The acceptance is for these draws and the bound is an
    average over all possible draws, so the acceptance at a single node can exceed the bound. If the number of children depends on
    the draws (DySpec's heap), the bound is for the same number of children and only a reference value."""
    return acceptance(rule, p, q, drawn, kind), bound(p, q, drawn, kind)


def acceptance(rule: Rejecting, p: F64, q: F64, drawn: Seq[int], kind: Kind) -> float:
    """The probability that the next token is one of `drawn` (in draw order, with repeats), accepted by a coin or drawn from the
    rule's residual."""
    children = sorted(set(drawn))
    if kind is Kind.FIXED:
        return float(p[children].sum())
    stages, rejected = rule.stages(p, q, drawn, kind), 1.0
    for _ in drawn:
        rejected *= 1 - next(stages)
    rest = residual(stages)
    return float(1 - rejected * (1 - rest[children].sum() / (rest.sum() or 1)))


def bound(p: F64, q: F64, drawn: Seq[int], kind: Kind) -> float:
    """The best average acceptance of any lossless rule if children are drawn in this way."""
    match kind:
        case Kind.FIXED:
            return float(p[sorted(set(drawn))].sum())
        case Kind.TOP_PLUS_ONE:
            return top_plus_one(p, q, drawn[:-1])
        case Kind.WITHOUT_REPLACEMENT:
            return without_replacement(p, q, len(drawn))
        case Kind.IID | Kind.SINGLE:
            return independent(p, q, len(drawn))


def independent(p: F64, q: F64, k: int) -> float:
    """The bound for k samples with replacement."""
    order = _by_ratio(p, q)
    return _least_cut(p[order], np.cumsum(q[order]) ** k)


def without_replacement(p: F64, q: F64, k: int) -> float:
    """The bound for k samples without replacement, or for all tokens with mass if there are fewer than k."""
    order = _by_ratio(p, q)
    k = min(k, len(order))
    inside = _pair(q[order]) if k == 2 else _race(q[order], k) if k > 2 else np.cumsum(q[order])
    return _least_cut(p[order], inside)


def top_plus_one(p: F64, q: F64, tops: Seq[int]) -> float:
    """The bound for the tokens `tops` and one sample from q outside of them."""
    qt = q.copy()
    qt[list(tops)] = 0
    qt /= qt.sum() or 1
    return float(p[list(tops)].sum() + np.minimum(p, qt).sum())


def _by_ratio(p: F64, q: F64) -> I64:
    """The tokens that can be drawn, by p / q ascending. The other tokens only add to p(H)."""
    some = np.flatnonzero(q > NEGLIGIBLE)
    return some[np.argsort(p[some] / q[some], kind="stable")]


def _least_cut(p: F64, inside: F64) -> float:
    """The bound. p: in the order of _by_ratio; inside: Q of each prefix."""
    return float(np.clip(1 + (np.cumsum(p) - inside).min(), 0, 1))


def _pair(q: F64) -> F64:
    """For each prefix H, the probability that two samples without replacement lie in it: the sum over first tokens x in H
    of q(x) (q(H) - q(x)) / (1 - q(x))."""
    first = int(q.argmax())  # only its q can be close to 1; its 1 - q is computed as a sum to avoid cancellation
    others = q.copy()
    others[first] = 0
    odds = others / (1 - others)
    inside: F64 = np.cumsum(q) * np.cumsum(odds) - np.cumsum(others * odds)
    inside[first:] += q[first] / others.sum() * np.cumsum(others)[first:]
    return inside


def _race(q: F64, k: int) -> F64:
    """The same for k samples. Let each token x arrive at a random time with rate q(x): the order of arrival is that of samples
    without replacement. Integrate over the time t at which the k-th token arrives. The integrand is the sum over x in H of q(x)
    times the probability that exactly k - 1 other tokens, all in H, have arrived before: exp(-t) times the product of
    w = exp(q t) - 1 over these tokens, summed over all choices of them.

    The sums over choices are nested cumulative sums of positive terms, so nothing cancels. In round i, `last` sums over choices
    of x and i - 1 others in each prefix, and `many` over choices of i others.
    """
    inside = np.zeros(len(q))
    start, end = (1e-17 * math.factorial(k)) ** (1 / k), SURE / np.sort(q)[-k]
    for t in np.exp(np.arange(math.log(start), math.log(end) + STEP, STEP)):
        qt = np.minimum(q * t, SURE)
        w = np.expm1(qt) * math.exp(-qt.sum() / (k - 1))  # exp(-t) is distributed over the k - 1 factors
        x = np.where(qt < SURE, q, 0)
        last, many = np.cumsum(x), np.cumsum(w)
        for _ in range(1, k):
            last, many = np.cumsum(w * _before(last) + x * _before(many)), np.cumsum(w * _before(many))
        inside += STEP * t * last
    return inside


def _before(sums: F64) -> F64:
    """At each place, the sum over the prefix before it."""
    return np.concatenate(([0.0], sums[:-1]))
