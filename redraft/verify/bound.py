"""How much of the possible a rule accepts at a node: its acceptance beside the bound of optimal transport.

Zhengmian Hu, Tong Zheng, Vignesh Viswanathan, Ziyi Chen, Ryan A. Rossi, Yihan Wu, Dinesh Manocha, Heng Huang: Towards
Optimal Multi-draft Speculative Decoding, 2025, arXiv 2502.18779. No lossless rule makes the next token one of the drawn ones
with more probability than 1 + min over sets H of tokens of [p(H) - Q(H)], Q(H) being the probability that all draws lie in H.
For independent draws and those without replacement the best H is a prefix of the tokens sorted by p / q, so that one scan
over the prefixes finds it.

p, q: f64[V], the target's distribution and the draft's, each of sum 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq

import numpy as np

from redraft.core.tree import F64, I64, Kind
from redraft.verify.verifier import Rejecting, residual

STEP = 0.2  # of the trapezoid rule in log time; its error falls exponentially with 1 / STEP
NEVER = 1e-250  # a draft probability that counts as 0
SURE = 40.0  # exp(-SURE) is nothing beside 1


def gauge(rule: Rejecting, p: F64, q: F64, drawn: Seq[int], kind: Kind) -> tuple[float, float]:
    """(acceptance, bound) at one visited node, to be averaged over many: the first is of these draws, so that at a single
    node it may exceed the second, which is of all draws that could have been made. Where the number of children depends on
    the draws (DySpec's heap) the bound is that of as many children, and only a yardstick."""
    return acceptance(rule, p, q, drawn, kind), bound(p, q, drawn, kind)


def acceptance(rule: Rejecting, p: F64, q: F64, drawn: Seq[int], kind: Kind) -> float:
    """The probability that the next token is one of those drawn (in draw order, with repeats), by a coin or because what
    the rule falls back on gives it."""
    children = sorted(set(drawn))
    if kind is Kind.FIXED:
        return float(p[children].sum())
    stages, rejected = rule.stages(p, q, drawn, kind), 1.0
    for _ in drawn:
        rejected *= 1 - next(stages)
    rest = residual(stages)
    return float(1 - rejected * (1 - rest[children].sum() / (rest.sum() or 1)))


def bound(p: F64, q: F64, drawn: Seq[int], kind: Kind) -> float:
    """The most that any lossless rule accepts on average where children are drawn in this way."""
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
    """Of k samples with replacement."""
    order = _by_ratio(p, q)
    return _least_cut(p[order], np.cumsum(q[order]) ** k)


def without_replacement(p: F64, q: F64, k: int) -> float:
    """Of k samples without replacement, or of all tokens that have mass where they are fewer."""
    order = _by_ratio(p, q)
    k = min(k, len(order))
    inside = _pair(q[order]) if k == 2 else _race(q[order], k) if k > 2 else np.cumsum(q[order])
    return _least_cut(p[order], inside)


def top_plus_one(p: F64, q: F64, tops: Seq[int]) -> float:
    """Of the tokens `tops` and one sample of what q has outside of them."""
    qt = q.copy()
    qt[list(tops)] = 0
    qt /= qt.sum() or 1
    return float(p[list(tops)].sum() + np.minimum(p, qt).sum())


def _by_ratio(p: F64, q: F64) -> I64:
    """The tokens that can be drawn, by p / q ascending: the others only add to p(H)."""
    some = np.flatnonzero(q > NEVER)
    return some[np.argsort(p[some] / q[some], kind="stable")]


def _least_cut(p: F64, inside: F64) -> float:
    """inside: Q of each prefix."""
    return float(np.clip(1 + (np.cumsum(p) - inside).min(), 0, 1))


def _pair(q: F64) -> F64:
    """The probability, for each prefix H, that two samples without replacement lie in it: the sum over first tokens x in H
    of q(x) (q(H) - q(x)) / (1 - q(x))."""
    first = int(q.argmax())  # 1 - q(x) of the only token that may be close to 1 is summed, not subtracted
    others = q.copy()
    others[first] = 0
    odds = others / (1 - others)
    inside: F64 = np.cumsum(q) * np.cumsum(odds) - np.cumsum(others * odds)
    inside[first:] += q[first] / others.sum() * np.cumsum(others)[first:]
    return inside


def _race(q: F64, k: int) -> F64:
    """The same for k samples. Tokens that arrive at rates q come in the order of samples without replacement; so integrate
    over the time t at which the k-th arrives, x, the sum over x in H of q(x) times the chance that k - 1 others of H had
    arrived by then and nothing else: exp(-t) times the products of w = exp(q t) - 1 over all choices of those others.

    Sums over choices are nested cumulative sums of positive terms, so nothing cancels: in round i, `last` is over choices
    of x and i - 1 others in each prefix, `many` over those of i others.
    """
    inside = np.zeros(len(q))
    least, most = (1e-17 * math.factorial(k)) ** (1 / k), SURE / np.sort(q)[-k]
    for t in np.exp(np.arange(math.log(least), math.log(most) + STEP, STEP)):
        qt = np.minimum(q * t, SURE)
        w = np.expm1(qt) * math.exp(-qt.sum() / (k - 1))  # exp(-t), shared out among the k - 1 factors
        x = np.where(qt < SURE, q, 0)
        last, many = np.cumsum(x), np.cumsum(w)
        for _ in range(1, k):
            last, many = np.cumsum(w * _before(last) + x * _before(many)), np.cumsum(w * _before(many))
        inside += STEP * t * last
    return inside


def _before(sums: F64) -> F64:
    """The sum over the shorter prefix at each place."""
    return np.concatenate(([0.0], sums[:-1]))
