"""Counts the tri-grams of recent text and drafts the paths that a small tree search over them visits most.

Xukun Liu, Bowen Lei, Ruqi Zhang, Dongkuan Xu: Adaptive Draft-Verification for Efficient Large Language Model Decoding,
2024, arXiv 2407.12021.

1. The table maps (a, b) to {c: weight}, with at most `successors` entries per pair. It starts empty or is counted on a corpus
   with weight = count(abc) / count(ab).
2. Each drafting call adds `increment` to every tri-gram among the last `window` tokens of prompt and output, up to `cap`.
3. The root is the pair of the last two tokens. The children of a pair (u, v) are the pairs (v, w) for all successors w.
4. Search, `iterations` times. a. Select: go to the child with the largest S / N + (c1 + ln((M + c2 + 1) / c2)) P sqrt(M) /
   (1 + N), where S is the sum of its scores, N its visits, M its parent's visits and P its weight. A child without visits comes
   first. b. Expand: a pair that has successors but no children gets all of them; go to the last child. c. Roll out: draw
   successors by weight until the path has `length` pairs. d. Score: 1 + the sum of the weights on the path.
5. Take the paths to the `sequences` most visited pairs and append to each the heaviest successor of its last pair.
6. Merge the paths into a tree, the most visited first, until the node budget is used up.

A proposal takes 0.2 to 0.9 ms of one core on texts of pilot-16m, and 1.1 ms if every pair has 12 successors. A pair takes about
0.4 KB of memory, and 1.5 KB with 12 successors.
Differs: step 6 counts nodes of the merged tree. The published code drops long paths until the sum of the path lengths is 64; with
a budget of 16 this gives a shallow tree (scripts/prove aded, greedy, filled table: 2.25 tokens a forward against 3.01). In a full
pair a new successor replaces the lightest one. A full table drops the pair that was updated least recently. Rollouts draw from the
noise of (seed, position). If no path is found, nothing is drafted instead of a dummy token. increment=0 creates no successors of
weight 0.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from heapq import nlargest
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import safetensors
import safetensors.numpy

from redraft.card import Card, Guarantee
from redraft.core.noise import Stream, key, uniform
from redraft.core.plan import Budget
from redraft.core.sequence import Sequence
from redraft.core.tree import EMPTY, TokenTree
from redraft.draft.drafter import Stateless
from redraft.errors import InvalidInput
from redraft.options import Options, number

Pair = tuple[int, int]
Row = dict[int, float]  # successor -> weight, in insertion order, so nothing depends on hashes


@dataclass(frozen=True)
class ADED(Options):
    """increment: the weight that a drafting call adds to a tri-gram; cap: the largest weight; window: the number of recent tokens
    that a call learns from; iterations, c1, c2: of the search; length: pairs on a search path, including the root; sequences: the
    most paths in a draft; successors: the most successors per pair; keys: the most pairs in the table; path: a saved table to start
    from."""

    increment: float = number(0.04, ge=0)
    cap: float = number(3.0, gt=0)
    window: int = number(16, ge=3)
    iterations: int = number(150, ge=0)
    length: int = number(4, ge=1)
    sequences: int = number(24, ge=1)
    successors: int = number(12, ge=1)
    c1: float = number(32.0, ge=0)
    c2: float = number(8.0, gt=0)
    keys: int = number(100_000, ge=1)
    path: Path | None = None

    card: ClassVar[Card] = Card(
        "ADED",
        "Liu, Lei, Zhang, Xu, Adaptive Draft-Verification for Efficient Large Language Model Decoding, 2024, arXiv 2407.12021",
        Guarantee.SAME_TEXT,
        deviates="the tree is cut by visits to the node budget; no dummy token; pairs and successors are bounded",
        summary="Follows learned tri-grams; many similar texts",
    )

    def max_bytes(self, runner: Any) -> int:
        return self.keys * self.pair_bytes

    @property
    def pair_bytes(self) -> int:
        """The most memory that a pair with all its successors takes, as Python objects."""
        return 400 + 110 * self.successors

    def open(self, runner: Any, sampler: Any) -> TriGrams:
        opened = TriGrams(self, runner.spec.vocab)
        if self.path is not None:
            opened.load(self.path)
        return opened


class TriGrams(Stateless):
    """The opened drafter. table: ordered by last update, the least recent pair first."""

    def __init__(self, method: ADED, vocab: int) -> None:
        self.method, self.vocab = method, vocab
        self.table: OrderedDict[Pair, Row] = OrderedDict()  # 1.
        c1, c2 = method.c1, method.c2
        self.explore = [(c1 + math.log((visits + c2 + 1) / c2)) * math.sqrt(visits) for visits in range(method.iterations + 1)]

    @property
    def bytes(self) -> int:
        """An upper bound: every pair is counted with all its successors."""
        return len(self.table) * self.method.pair_bytes

    def propose(self, seqs: Seq[Sequence], budgets: Seq[Budget]) -> list[TokenTree]:
        """Learns from each text that has a budget, then searches from its last two tokens."""
        return [self._draft(seq, budget) for seq, budget in zip(seqs, budgets, strict=True)]

    def _draft(self, seq: Sequence, budget: Budget) -> TokenTree:
        if min(budget) < 1 or len(seq.tokens) < 2:
            return EMPTY
        self.learn(seq.tokens[-self.method.window :])  # 2.
        root = seq.tokens[-2], seq.tokens[-1]  # 3.
        if root not in self.table or not self.method.iterations:
            return EMPTY
        rolls = self.method.iterations * max(0, self.method.length - 2)
        noise = uniform(key(seq.seed, Stream.DRAFT, len(seq.tokens)), np.arange(rolls))
        tokens, parents, visits = self.search(root, iter(noise.tolist()))  # 4.
        drafted, above = self.extract(root, tokens, parents, visits)  # 5.
        return TokenTree.build(drafted, above, vocab=self.vocab, rows=budget.rows, depth=budget.depth)  # 6.

    def learn(self, recent: list[int]) -> None:
        """Adds `increment` to each tri-gram of `recent`, once per occurrence."""
        if not self.method.increment:
            return
        for a, b, c in zip(recent, recent[1:], recent[2:], strict=False):
            row = self.table.setdefault((a, b), {})
            self.table.move_to_end((a, b))
            if c not in row and len(row) == self.method.successors:
                del row[min(row, key=row.__getitem__)]
            row[c] = min(self.method.cap, row.get(c, 0.0) + self.method.increment)
        while len(self.table) > self.method.keys:
            self.table.popitem(last=False)

    def search(self, root: Pair, noise: Iterator[float]) -> tuple[list[int], list[int], list[int]]:
        """Tokens, parents and visits of all search nodes, parents before children; node 0 is the root.

        The inner loop visits a dozen children 150 times. For speed, all nodes share these lists, and a parent keeps its
        children's means and shares = P / (1 + N).
        """
        table, explore, length = self.table, self.explore, self.method.length
        tokens, parents, visits, totals, weights, values = [root[1]], [0], [0], [0.0], [0.0], [1.0]
        first, means, shares = [0], [[math.inf]], [[0.0]]  # of a node's children; first = 0: no children
        for _ in range(self.method.iterations):
            node, pairs, (u, v) = 0, 1, root
            while pairs < length:
                if first[node]:  # a.
                    scale = explore[visits[node]]
                    bounds = [mean + scale * share for mean, share in zip(means[node], shares[node], strict=True)]
                    node = first[node] + bounds.index(max(bounds))
                    u, v, pairs = v, tokens[node], pairs + 1
                    continue
                if row := table.get((u, v)):  # b.
                    new = len(row)
                    first[node], means[node], shares[node] = len(tokens), [math.inf] * new, list(row.values())
                    tokens += row
                    weights += shares[node]
                    values += [values[node] + weight for weight in shares[node]]
                    parents += [node] * new
                    visits += [0] * new
                    totals += [0.0] * new
                    first += [0] * new
                    means += [[]] * new
                    shares += [[]] * new
                    node = len(tokens) - 1
                    u, v, pairs = v, tokens[node], pairs + 1
                break
            score = values[node]
            while pairs < length and (row := table.get((u, v))):  # c.
                ends = list(accumulate(row.values()))
                w = list(row)[bisect(ends, next(noise) * ends[-1])]
                score += row[w]
                u, v, pairs = v, w, pairs + 1
            while node:  # d.
                visits[node] += 1
                totals[node] += score
                above = parents[node]
                child = node - first[above]
                means[above][child] = totals[node] / visits[node]
                shares[above][child] = weights[node] / (1 + visits[node])
                node = above
            visits[0] += 1
        return tokens, parents, visits

    def extract(self, root: Pair, tokens: list[int], parents: list[int], visits: list[int]) -> tuple[list[int], list[int]]:
        """Tokens and parents of the paths, the most visited first, each with the token appended in step 5.

        A node never has more visits than its parent, and comes after it if the visits are equal. So every prefix of a
        path is included.
        """
        drafted: list[int] = []
        above: list[int] = []
        place = {0: -1}
        for node in nlargest(self.method.sequences, range(len(tokens)), key=visits.__getitem__):
            if node:
                place[node] = len(drafted)
                drafted.append(tokens[node])
                above.append(place[parents[node]])
            row = self.table.get((tokens[parents[node]], tokens[node]) if node else root)
            if row:
                drafted.append(max(row, key=row.__getitem__))
                above.append(place[node])
        return drafted, above

    def prefill(self, texts: Iterable[Seq[int]]) -> None:
        """Replaces the table by one counted on a corpus: the most frequent pairs with the likeliest successors of each."""
        counts: dict[Pair, Counter[int]] = {}
        for text in texts:
            for a, b, c in zip(text, text[1:], text[2:], strict=False):
                counts.setdefault((a, b), Counter())[c] += 1
        common = nlargest(self.method.keys, counts, key=lambda pair: counts[pair].total())
        self.table.clear()
        for pair in reversed(common):  # the rarest pair is dropped first
            total = counts[pair].total()
            self.table[pair] = {c: n / total for c, n in counts[pair].most_common(self.method.successors)}

    def snapshot(self) -> list[tuple[Pair, Row]]:
        return [(pair, dict(row)) for pair, row in self.table.items()]

    def restore(self, snapshot: list[tuple[Pair, Row]]) -> None:
        self.table = OrderedDict((pair, dict(row)) for pair, row in snapshot)

    def save(self, path: Path) -> None:
        """Writes the table as safetensors: trigrams i32[M, 3] and weights f64[M] in the table's order, vocab i64[1].
        Raises InvalidInput if the file cannot be written."""
        trigrams = np.array([(*pair, c) for pair, row in self.table.items() for c in row], np.int32).reshape(-1, 3)
        weights = np.array([weight for row in self.table.values() for weight in row.values()], np.float64)
        tensors = {"trigrams": trigrams, "weights": weights, "vocab": np.array([self.vocab])}
        try:
            path.write_bytes(safetensors.numpy.save(tensors))
        except OSError as error:
            raise InvalidInput(f"aded:path={path}: cannot be written ({error.strerror})") from None

    def load(self, path: Path) -> None:
        """Loads a saved table and keeps the heaviest successors of each pair. Raises InvalidInput if the file is missing or
        damaged, belongs to another vocabulary, or has more pairs than `keys`."""
        at = f"aded:path={path}"
        try:
            found = safetensors.numpy.load(path.read_bytes())
        except OSError as error:
            raise InvalidInput(f"{at}: cannot be read ({error.strerror})") from None
        except (safetensors.SafetensorError, KeyError) as error:  # KeyError: a dtype that numpy does not have
            raise InvalidInput(f"{at}: not a safetensors file of tri-grams ({error})") from None
        trigrams, weights, vocab = (found.get(name, np.zeros(0, bool)) for name in ("trigrams", "weights", "vocab"))
        shapes = trigrams.shape == (*weights.shape, 3) and weights.ndim == 1 and vocab.shape == (1,)
        if not shapes or (trigrams.dtype, weights.dtype, vocab.dtype) != (np.int32, np.float64, np.int64):
            raise InvalidInput(f"{at}: contains no tri-grams with weights; save them with TriGrams.save")
        if vocab[0] != self.vocab:
            raise InvalidInput(f"{at}: made for a vocabulary of {vocab[0]}, here it is {self.vocab}")
        if ((trigrams < 0) | (trigrams >= self.vocab)).any() or len(np.unique(trigrams, axis=0)) < len(trigrams):
            raise InvalidInput(f"{at}: damaged, a tri-gram occurs twice or has an id outside 0..{self.vocab - 1}")
        if not (np.isfinite(weights) & (weights > 0)).all():
            raise InvalidInput(f"{at}: damaged, a weight is not a positive number")
        table: OrderedDict[Pair, Row] = OrderedDict()
        for (a, b, c), weight in zip(trigrams.tolist(), weights.tolist(), strict=True):
            table.setdefault((a, b), {})[c] = weight
        if len(table) > self.method.keys:
            raise InvalidInput(f"{at}: contains {len(table)} pairs, but keys = {self.method.keys}; keys must be {len(table)} or more")
        for pair, row in table.items():
            if len(row) > self.method.successors:
                table[pair] = {c: row[c] for c in nlargest(self.method.successors, row, key=row.__getitem__)}
        self.table = table
