"""The algebra contract of verifiers: with a vocabulary of 5, in float64, accepted tokens have the target distribution.

A toy target has an arbitrary distribution for every context. A batch has one sequence for each sample, all with the same tree.
`check_distribution` compares the joint distribution of the first three tokens with p1 p2 p3. Shorter outputs are completed by
plain sampling, as an engine does in later steps. `drawn_tree` makes the trees of a batch in which each sequence has its own tree,
drawn from a draft distribution.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np

from redraft.core.distribution import TopLogprobs
from redraft.core.noise import Stream, gumbel, key, uniform
from redraft.core.plan import Accepted
from redraft.core.tree import Kind, TokenTree
from redraft.verify.verifier import Verifier

VOCAB = 5
LENGTH = 3
LEAST_P = 1e-4

Distributions = list[np.ndarray]  # distributions[d][x_1, ..., x_d] is the distribution of token d + 1


def random_distributions(rng: np.random.Generator, length: int = LENGTH) -> Distributions:
    """A distribution for every context, with some zeros."""
    distributions = [rng.dirichlet(np.full(VOCAB, 0.7), size=(VOCAB,) * d) for d in range(length)]
    for p in distributions:
        p[p < 0.02] = 0
        p /= p.sum(-1, keepdims=True)
    return distributions


def random_tree(rng: np.random.Generator, nodes: int, depth: int = LENGTH - 1) -> TokenTree:
    """Random tokens and parents. The tree is fixed, because it does not depend on the target's sample."""
    parents = [int(rng.integers(-1, i)) for i in range(nodes)]
    return TokenTree.build(rng.integers(0, VOCAB, nodes).tolist(), parents, vocab=VOCAB, rows=nodes, depth=depth)


@dataclass(frozen=True)
class Table:
    """redraft.core.tree.Probs of a drawn tree; rows: f64[N + 1, V]."""

    rows: np.ndarray

    def probs(self, rows: Seq[int]) -> np.ndarray:
        return self.rows[list(rows)]


def draw(rng: np.random.Generator, q: np.ndarray, k: int, kind: Kind) -> list[int]:
    """k children drawn from q, in draw order; fewer if fewer tokens have mass, with repeats if `kind` allows them."""
    if kind in (Kind.IID, Kind.SINGLE):
        return rng.choice(len(q), 1 if kind is Kind.SINGLE else k, p=q).tolist()
    k = min(k, np.count_nonzero(q))
    with np.errstate(divide="ignore"):
        keys = np.log(q) + (rng.gumbel(size=len(q)) if kind is Kind.WITHOUT_REPLACEMENT else 0)
    best = np.argsort(-keys, kind="stable")[:k].tolist()
    if kind is Kind.TOP_PLUS_ONE:
        rest = q.copy()
        rest[best[:-1]] = 0
        best[-1] = int(rng.choice(len(q), p=rest / rest.sum()))
    return best


def drawn_tree(
    rng: np.random.Generator, distributions: Distributions, kinds: Seq[Kind], k: int = 3, draw: Callable[..., list[int]] = draw
) -> TokenTree:
    """A tree drawn from draft distributions; each inner node has one of `kinds`. The root has k children and each of these k - 1.
    With independent samples a node has as many children as it was drawn times, so k whole sequences are drawn."""
    tokens: list[int] = []
    parents: list[int] = []
    draws: list[int] = []
    own, rows = [Kind.FIXED], np.zeros((1 + k + k * k, VOCAB))
    open_nodes: list[tuple[int, tuple[int, ...], int]] = [(-1, (), k)]
    for node, path, count in open_nodes:
        kind = own[node + 1] = kinds[rng.integers(len(kinds))]
        q = rows[node + 1] = distributions[len(path)][path]
        drawn = draw(rng, q, count, kind)
        place = {}
        for x in dict.fromkeys(drawn):
            place[x] = len(tokens)
            tokens.append(x)
            parents.append(node)
            own.append(Kind.FIXED)
            if len(path) + 2 < LENGTH:
                open_nodes.append((place[x], (*path, x), drawn.count(x) if kind is Kind.IID else k - 1))
        draws += [place[x] for x in drawn]
    as_i32 = [np.asarray(ints, np.int32) for ints in (tokens, parents, draws)]
    return TokenTree(as_i32[0], as_i32[1], np.asarray(own, np.uint8), Table(rows), as_i32[2])


class ToyDistribution:
    """redraft.core.distribution.Distribution of `samples` sequences with equal trees. Sequence s has seed s."""

    def __init__(self, distributions: Distributions, tree: TokenTree, samples: int, greedy: bool = False) -> None:
        self.distributions, self.tree, self.samples, self.greedy = distributions, tree, samples, greedy
        self.roots = np.arange(samples, dtype=np.int32) * (len(tree) + 1)
        paths = [tree.tokens[tree.path_to(node)].tolist() for node in range(-1, len(tree))]
        self.depths = np.asarray([len(path) for path in paths])
        self.distribution_probs = np.stack([distributions[len(path)][tuple(path)] for path in paths])

    def draw(self, rows: Seq[int]) -> list[int]:
        seeds, places = np.divmod(np.asarray(rows), len(self.tree) + 1)
        return self.tokens(self.distribution_probs[places], seeds, self.depths[places]).tolist()

    def probs(self, rows: Seq[int]) -> np.ndarray:
        return self.distribution_probs[np.asarray(rows) % (len(self.tree) + 1)]

    def uniform(self, rows: Seq[int], n: int) -> np.ndarray:
        seeds, places = np.divmod(np.asarray(rows), len(self.tree) + 1)
        keys = self.keys(Stream.ACCEPT, seeds, self.depths[places])
        return uniform(keys[:, None], np.arange(n))

    def choose(self, row: int, weights: np.ndarray) -> int:
        seed, place = divmod(row, len(self.tree) + 1)
        noise = gumbel(self.keys(Stream.RESIDUAL, np.array([seed]), self.depths[[place]])[0], np.arange(VOCAB))
        with np.errstate(divide="ignore"):
            return int(np.argmax(np.log(weights) + noise))

    def logprobs(self, rows: Seq[int], ids: Seq[int], k: int) -> list[TopLogprobs]:
        raise AssertionError("no verifier asks for logprobs")

    def tokens(self, probs: np.ndarray, seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore"):
            scores = np.log(probs)
        return np.argmax(scores if self.greedy else scores + self.noise(seeds, positions), axis=-1)

    def noise(self, seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
        return gumbel(self.keys(Stream.TARGET, seeds, positions)[:, None], np.arange(VOCAB))

    def keys(self, stream: Stream, seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
        return np.asarray([key(int(s), stream, int(at)) for s, at in zip(seeds, positions, strict=True)], np.uint64)

    def complete(self, texts: Seq[Seq[int]], length: int = LENGTH) -> np.ndarray:
        """Each text cut to `length` tokens, or continued to them by plain decoding: [samples, length]."""
        out = np.zeros((self.samples, length), np.int64)
        given = np.asarray([min(len(text), length) for text in texts])
        for s, text in enumerate(texts):
            out[s, : given[s]] = text[: given[s]]
        for d in range(length):
            short = np.flatnonzero(given <= d)
            probs = self.distributions[d][tuple(out[short, :d].T)]
            out[short, d] = self.tokens(probs, short, np.full(len(short), d))
        return out

    def plain(self, length: int = LENGTH) -> np.ndarray:
        return self.complete([()] * self.samples, length)


class FreshDistribution(ToyDistribution):
    """New noise at every call, so that one node can be drawn more than once: for controls."""

    rng = np.random.default_rng(0)

    def noise(self, seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
        return self.rng.gumbel(size=(len(seeds), VOCAB))


def chi_square_p(counts: np.ndarray, expected: np.ndarray) -> float:
    """Upper tail of the chi-square test. Cells with an expected count below 5 are merged. 0 if an impossible outcome occurred."""
    if counts[expected == 0].any():
        return 0.0
    rare = expected < 5
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic = ((counts - expected) ** 2 / expected).sum()
    return upper_tail(float(statistic), len(counts) - 1)


def upper_tail(statistic: float, freedom: int) -> float:
    """Of the chi-square distribution: the regularised upper gamma function of freedom / 2 and statistic / 2, which is a finite sum."""
    if (half := statistic / 2) <= 0:
        return 1.0
    powers = np.arange(freedom / 2 - 1, -0.25, -1)
    first = math.erfc(math.sqrt(half)) if freedom % 2 else 0.0
    return first + sum(math.exp(power * math.log(half) - half - math.lgamma(power + 1)) for power in powers)


def check_distribution(
    verifier: Verifier,
    distributions: Distributions,
    tree: TokenTree,
    samples: int,
    distribution: Callable[..., ToyDistribution] = ToyDistribution,
) -> tuple[float, list[Accepted]]:
    """p-value of the distribution of the first tokens, and the accepted paths."""
    toy = distribution(distributions, tree, samples)
    accepted = verifier.accept([tree] * samples, toy)
    for a in accepted:
        check_path(tree, a)
    return distribution_p(distributions, toy.complete([a.tokens for a in accepted])), accepted


def check_path(tree: TokenTree, accepted: Accepted) -> None:
    assert tree.tokens[list(accepted.path)].tolist() == list(accepted.tokens[:-1]), "tokens are the path's and one bonus"
    assert [int(tree.parents[node]) for node in accepted.path] == [-1, *accepted.path][:-1], "a path goes from parent to child"


def distribution_p(distributions: Distributions, texts: np.ndarray) -> float:
    """p-value of the joint distribution of the tokens of `texts`, [samples, len(distributions)]."""
    joint = distributions[0]
    for p in distributions[1:]:
        joint = joint[..., None] * p
    cells = np.ravel_multi_index(tuple(texts.T), joint.shape)
    return chi_square_p(np.bincount(cells, minlength=joint.size), joint.ravel() * len(texts))


def check_text(
    verifier: Verifier,
    distributions: Distributions,
    tree: TokenTree,
    samples: int,
    greedy: bool = False,
    distribution: Callable[..., ToyDistribution] = ToyDistribution,
) -> None:
    """SAME_TEXT: with every seed, the tokens of plain decoding."""
    toy = distribution(distributions, tree, samples, greedy)
    accepted = verifier.accept([tree] * samples, toy)
    np.testing.assert_array_equal(toy.complete([a.tokens for a in accepted]), toy.plain())
