"""Exact enumeration of one node: every ordered draw of the children and every outcome of the coins."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import permutations, product

import numpy as np

from redraft import registry
from redraft.card import Guarantee
from redraft.core.tree import Kind
from redraft.verify.verifier import Rejecting, Stages, residual

Draws = Iterable[tuple[float, tuple[int, ...]]]  # probability, tokens in draw order

RULES: dict[str, Rejecting] = {
    name: rule
    for name in registry.METHODS["verify"]
    if hasattr(rule := registry.create("verify", name), "stages") and rule.card.guarantee <= Guarantee.SAME_DISTRIBUTION
}
SAMPLED = [(name, kind) for name, rule in RULES.items() for kind in sorted(rule.supports - {Kind.FIXED})]


def pairs(rng: np.random.Generator, vocab: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(p, q): some random pairs and the corner cases."""
    for spread in (0.3, 3.0, 1.0):
        p, q = rng.dirichlet(np.full(vocab, spread), 2)
        yield p, q
    one, other = np.eye(vocab)[rng.permutation(vocab)[:2]]
    few = _only(q, rng.permutation(vocab)[:2])
    yield p, p
    yield q, np.full(vocab, 1 / vocab)  # all equally likely: ties
    yield _only(p, np.arange(2)), _only(q, np.arange(2, vocab))  # disjoint
    yield p, _only(q, np.arange(vocab - 1))
    yield _only(p, np.arange(1, vocab)), q
    yield _only(p, np.arange(2)), _only(q, np.arange(1, vocab))
    yield p, few  # fewer tokens than draws
    yield _only(p, np.flatnonzero(few)), few
    yield one, q
    yield p, one
    yield one, one
    yield one, other
    yield p, (1 - 1e-9) * one + 1e-9 * q
    yield p, p * (1 + 1e-15 * rng.normal(size=vocab))  # the same but for rounding


def _only(distribution: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    out = np.zeros_like(distribution)
    out[tokens] = distribution[tokens]
    return out / out.sum()


def draws(q: np.ndarray, k: int, kind: Kind) -> Iterator[tuple[float, tuple[int, ...]]]:
    """All ways to draw k children (fewer if fewer tokens have mass), with their probabilities."""
    some = np.flatnonzero(q).tolist()
    if kind in (Kind.IID, Kind.SINGLE):
        for tokens in product(some, repeat=1 if kind is Kind.SINGLE else k):
            yield float(np.prod(q[list(tokens)])), tokens
    elif kind is Kind.WITHOUT_REPLACEMENT:
        for tokens in permutations(some, min(k, len(some))):
            left = [q[[x for x in some if x not in tokens[:i]]].sum() for i in range(len(tokens))]
            yield float(np.prod(q[list(tokens)] / left)), tokens
    else:
        assert kind is Kind.TOP_PLUS_ONE
        tops = likeliest(q, min(k, len(some)) - 1)
        rest = [x for x in some if x not in tops]
        for x in rest:
            yield float(q[x] / q[rest].sum()), (*tops, x)


def likeliest(q: np.ndarray, k: int) -> tuple[int, ...]:
    return tuple(np.argsort(-q, kind="stable")[:k].tolist())


def outcome(rule: Rejecting, p: np.ndarray, q: np.ndarray, kind: Kind, ways: Draws) -> tuple[np.ndarray, float]:
    """The distribution of the next token, and the probability that it is one of the drawn tokens."""
    distribution, accepted = np.zeros_like(p), 0.0
    for chance, tokens in ways:
        own, left = np.zeros_like(p), 1.0
        stages = rule.stages(p, q, list(tokens), kind)
        for x in tokens:
            passes = next(stages)
            assert 0 <= passes <= 1
            own[x] += left * passes
            left *= 1 - passes
        rest = residual(stages)
        assert (rest >= 0).all()
        if not rest.any():
            assert left < 1e-12, "nothing is left of the target though all draws may be rejected"
        own += left * rest / (rest.sum() or 1)
        distribution += chance * own
        accepted += chance * own[list(set(tokens))].sum()
    return distribution, accepted


class Reused(Rejecting):
    """A biased control: after a rejection q is used again, without normalising it to the tokens that can still be drawn."""

    supports = frozenset({Kind.WITHOUT_REPLACEMENT})

    def stages(self, p: np.ndarray, q: np.ndarray, drawn: Sequence[int], kind: Kind) -> Stages:
        r = p
        for x in drawn:
            yield float(r[x] / max(r[x], q[x])) if r[x] else 0.0
            r = np.maximum(r - q, 0)
            r /= r.sum() or 1
        return r
