"""The algebra contract of verifiers: over a vocabulary of 5, in float64, what a verifier accepts has the target's law.

A toy target with an arbitrary law for every context, and as many sequences as samples are wanted, all with the same
tree: a verifier sees one large batch. `check_law` compares the joint law of the first three tokens with p1 p2 p3;
outputs that end sooner are completed by plain sampling, as an engine would in later steps.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq

import numpy as np
import torch

from redraft.core.law import TopLogprobs
from redraft.core.noise import Stream, gumbel, key, uniform
from redraft.core.plan import Accepted
from redraft.core.tree import TokenTree
from redraft.verify.verifier import Verifier

VOCAB = 5
LENGTH = 3
LEAST_P = 1e-4

Laws = list[np.ndarray]  # laws[d][x_1, ..., x_d] is the law of token d + 1


def random_laws(rng: np.random.Generator, length: int = LENGTH) -> Laws:
    """A law for every context, with zeros here and there."""
    laws = [rng.dirichlet(np.full(VOCAB, 0.7), size=(VOCAB,) * d) for d in range(length)]
    for p in laws:
        p[p < 0.02] = 0
        p /= p.sum(-1, keepdims=True)
    return laws


def random_tree(rng: np.random.Generator, nodes: int, depth: int = LENGTH - 1) -> TokenTree:
    """Tokens and parents at random; a fixed tree, since nothing looks at the target's sample."""
    parents = [int(rng.integers(-1, i)) for i in range(nodes)]
    return TokenTree.build(rng.integers(0, VOCAB, nodes).tolist(), parents, vocab=VOCAB, rows=nodes, depth=depth)


class ToyLaw:
    """redraft.core.law.Law of `samples` sequences with one tree each, all alike. Sequence s has seed s."""

    def __init__(self, laws: Laws, tree: TokenTree, samples: int, greedy: bool = False) -> None:
        self.laws, self.tree, self.samples, self.greedy = laws, tree, samples, greedy
        self.roots = np.arange(samples, dtype=np.int32) * (len(tree) + 1)
        paths = [tree.tokens[tree.path_to(node)].tolist() for node in range(-1, len(tree))]
        self.depths = np.asarray([len(path) for path in paths])
        self.law_probs = np.stack([laws[len(path)][tuple(path)] for path in paths])

    def draw(self, rows: Seq[int]) -> list[int]:
        seeds, places = np.divmod(np.asarray(rows), len(self.tree) + 1)
        return self.tokens(self.law_probs[places], seeds, self.depths[places]).tolist()

    def probs(self, rows: Seq[int]) -> np.ndarray:
        return self.law_probs[np.asarray(rows) % (len(self.tree) + 1)]

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
        """Each text cut or continued to `length` tokens by the plain loop: [samples, length]."""
        out = np.zeros((self.samples, length), np.int64)
        given = np.asarray([min(len(text), length) for text in texts])
        for s, text in enumerate(texts):
            out[s, : given[s]] = text[: given[s]]
        for d in range(length):
            short = np.flatnonzero(given <= d)
            probs = self.laws[d][tuple(out[short, :d].T)]
            out[short, d] = self.tokens(probs, short, np.full(len(short), d))
        return out

    def plain(self, length: int = LENGTH) -> np.ndarray:
        return self.complete([()] * self.samples, length)


class FreshLaw(ToyLaw):
    """Other noise at every call, so that one node may be drawn more than once: for controls."""

    rng = np.random.default_rng(0)

    def noise(self, seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
        return self.rng.gumbel(size=(len(seeds), VOCAB))


def chi_square_p(counts: np.ndarray, expected: np.ndarray) -> float:
    """Upper tail of the chi-square test; cells expected under 5 times are joined. 0 where the impossible was seen."""
    if counts[expected == 0].any():
        return 0.0
    rare = expected < 5
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic = ((counts - expected) ** 2 / expected).sum()
    half = torch.tensor([(len(counts) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def check_law(
    verifier: Verifier, laws: Laws, tree: TokenTree, samples: int, law: Callable[..., ToyLaw] = ToyLaw
) -> tuple[float, list[Accepted]]:
    """p-value of the law of the first tokens, and what was accepted."""
    toy = law(laws, tree, samples)
    accepted = verifier.accept([tree] * samples, toy)
    for a in accepted:
        assert tree.tokens[list(a.path)].tolist() == list(a.tokens[:-1]), "tokens are the path's and one bonus"
        assert [int(tree.parents[node]) for node in a.path] == [-1, *a.path][: len(a.path)], "a path goes from parent to child"
    texts = toy.complete([a.tokens for a in accepted])
    joint = laws[0]
    for p in laws[1:]:
        joint = joint[..., None] * p
    cells = np.ravel_multi_index(tuple(texts.T), joint.shape)
    return chi_square_p(np.bincount(cells, minlength=joint.size), joint.ravel() * samples), accepted


def check_text(verifier: Verifier, laws: Laws, tree: TokenTree, samples: int, greedy: bool = False) -> None:
    """SAME_TEXT: with every seed, the tokens of the plain loop."""
    toy = ToyLaw(laws, tree, samples, greedy)
    accepted = verifier.accept([tree] * samples, toy)
    np.testing.assert_array_equal(toy.complete([a.tokens for a in accepted]), toy.plain())
