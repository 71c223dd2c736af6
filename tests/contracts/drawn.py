"""Trees drawn by the real builders from a toy draft distribution, and the toy target's distribution over a forest of them."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import cast

import numpy as np

from redraft.config import SamplingParams
from redraft.core.distribution import TopLogprobs
from redraft.core.noise import Stream, gumbel, key, uniform
from redraft.core.plan import Budget
from redraft.core.sequence import Request, Sequence
from redraft.core.tree import TokenTree
from redraft.draft.second import SecondModel
from redraft.draft.sketch import Sketch
from redraft.sample.sampler import Sampler
from tests.contracts.algebra import VOCAB, Distributions

START = 1  # tokens of the toy's prompt
SAMPLED = SamplingParams(temperature=1.0)


def forest(
    method: SecondModel, distributions: Distributions, samples: int, budget: Budget, params: SamplingParams = SAMPLED
) -> list[TokenTree]:
    """A tree for each of `samples` sequences (of seeds 0, 1, ...) from draft distributions distributions[d][x_1, ..., x_d]."""
    sampler = Sampler(VOCAB, frozenset(), drafts=Stream.DRAFT)
    request = Request("toy", [0] * START, params)
    with np.errstate(divide="ignore"):
        logs = [np.log(p) for p in distributions]
    trees = []
    for seed in range(samples):
        seq = Sequence(seed, request, 0, [0] * START, START, seed, sync_point=99)
        seq.state[sampler] = sampler.begin(seq)
        trees.append(grow(method, Sketch(seq, budget, method.kind, sampler), logs))
    return trees


def grow(method: SecondModel, sketch: Sketch, logs: Distributions) -> TokenTree:
    """As SecondModelDrafter does it, with a table of distributions for the second model."""
    sketch.learn(-1, logs[0].copy())
    paths: list[tuple[int, ...]] = []
    for _ in method.grow(sketch):
        if len(sketch.tokens) == len(paths):
            break
        for node in range(len(paths), len(sketch.tokens)):
            above = sketch.parents[node]
            paths.append((*(paths[above] if above >= 0 else ()), sketch.tokens[node]))
            values = logs[len(paths[node])][paths[node]] if len(paths[node]) < len(logs) else np.zeros(VOCAB)
            sketch.learn(node, values.copy())
    return sketch.tree()


class ForestDistribution:
    """redraft.core.distribution.Distribution of sequences with one tree each. Sequence s has seed s. Token d of a text is at START + d."""

    def __init__(self, distributions: Distributions, trees: Seq[TokenTree]) -> None:
        self.distributions, self.trees = distributions, trees
        sizes = np.array([len(tree) + 1 for tree in trees])
        self.roots = (np.cumsum(sizes) - sizes).astype(np.int32)
        self.owner = np.repeat(np.arange(len(trees)), sizes)

    def _place(self, row: int) -> tuple[int, tuple[int, ...]]:
        s = int(self.owner[row])
        tree = self.trees[s]
        return s, tuple(tree.tokens[tree.path_to(row - int(self.roots[s]) - 1)].tolist())

    def probs(self, rows: Seq[int]) -> np.ndarray:
        return np.stack([self.distributions[len(path)][path] for _, path in map(self._place, rows)])

    def draw(self, rows: Seq[int]) -> list[int]:
        return [self._argmax(row, p, Stream.TARGET) for row, p in zip(rows, self.probs(rows) if rows else (), strict=True)]

    def choose(self, row: int, weights: np.ndarray) -> int:
        return self._argmax(row, weights, Stream.RESIDUAL)

    def uniform(self, rows: Seq[int], n: int) -> np.ndarray:
        return np.stack([uniform(self._key(row, Stream.ACCEPT), np.arange(n)) for row in rows])

    def logprobs(self, rows: Seq[int], ids: Seq[int], k: int) -> list[TopLogprobs]:
        raise AssertionError("no verifier asks for logprobs")

    def _key(self, row: int, stream: Stream) -> int:
        s, path = self._place(row)
        return key(s, stream, START + len(path))

    def _argmax(self, row: int, weights: np.ndarray, stream: Stream) -> int:
        ids = np.flatnonzero(weights)
        return int(ids[np.argmax(np.log(weights[ids]) + gumbel(self._key(row, stream), ids))])


def texts(distributions: Distributions, accepted: Seq[Seq[int]], length: int, rng: np.random.Generator) -> np.ndarray:
    """Each accepted text cut to `length` tokens, or continued to them by sampling the target: [samples, length]."""
    out = np.zeros((len(accepted), length), np.int64)
    for s, tokens in enumerate(accepted):
        own = list(tokens[:length])
        while len(own) < length:
            own.append(int(rng.choice(VOCAB, p=cast(np.ndarray, distributions[len(own)][tuple(own)]))))
        out[s] = own
    return out
