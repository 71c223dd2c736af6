"""Rows that start from trained vectors follow the newest token and every draft: the target itself guesses tokens further on.

Hao (Mark) Chen, Wayne Luk, Ka Fai Cedric Yiu, Rui Li, Konstantin Mishchenko, et al.: Hardware-Aware Parallel Prompt Decoding for
Memory-Efficient Acceleration of LLM Inference, 2024, arXiv 2405.18628. As a chain with a threshold, ranks=1,least=0.9, it decodes as
Chenxi Sun, Hongzhi Zhang, Zijia Lin, et al.: Decoding at the Speed of Thought: Harnessing Parallel Decoding of Lexical Units for LLMs,
2024, arXiv 2405.15208.

1. Below a node come rows that start from vectors 1, 2, ... instead of tokens, each below the one before. They see the text, the path of
   their node, and the vectors before them. No other row sees them, and none of their keys and values are kept.
2. The likeliest tokens at vector i of the last accepted row are offered at depth i of the next tree.
3. Of these nodes and of the vectors below them the step has those that promise most tokens: a node its chance to be accepted, vector i of
   a node the chance that the path ends there times what depth i adds to the next step. The newest token has all vectors.

Differs: both chances come from rates measured in use, for any budget, instead of from a search before over the sizes of the trees; where a
path ends is estimated from the rates alone. One vector for each distance. Lexical units are verified, so the text does not change, and the
model is not trained.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from itertools import accumulate
from operator import mul
from typing import Any, ClassVar

import numpy as np

from redraft.card import Card, Guarantee
from redraft.core.plan import Budget, StepResult
from redraft.core.sequence import Sequence
from redraft.core.taps import Taps
from redraft.core.tree import EMPTY, F32, TokenTree
from redraft.draft.drafter import Stateless
from redraft.draft.heads import Arrays
from redraft.draft.template import Growth, HitRates, Offer
from redraft.draft.trained_file import TrainedFile
from redraft.errors import CheckpointError, InvalidInput
from redraft.options import number

METHOD = "ppd"


@dataclass(frozen=True)
class PPD(TrainedFile):
    """path: the folder or file of `redraft train`; ranks: the most tokens that are offered at a distance; least: the smallest probability
    of a token at its vector that is drafted."""

    ranks: int = number(10, ge=1, le=64)
    least: float = number(0.0, ge=0, le=1)

    holds: ClassVar[str] = "trained vectors"
    card: ClassVar[Card] = Card(
        "Parallel prompt decoding",
        "Chen, Luk, Yiu, Li, Mishchenko, et al., Hardware-Aware Parallel Prompt Decoding for Memory-Efficient Acceleration of LLM "
        "Inference, 2024, arXiv 2405.18628",
        Guarantee.SAME_TEXT,
        needs="vectors trained for the target: redraft train --head ppd",
        deviates="the tree follows rates measured in use; one vector for each distance",
        summary="The target guesses ahead at trained vectors; idle GPUs",
    )

    def max_bytes(self, runner: Any) -> int:
        try:
            return 4 * sum(int(one.size) for one in self.read().arrays.values())
        except (CheckpointError, InvalidInput):
            return 0  # `open` says why

    def open(self, runner: Any, sampler: Any) -> PromptVectors:
        """Raises InvalidInput if there is no such file or it was made for another model, CheckpointError if it is damaged."""
        trained = self.load(runner)
        arrays, hidden = Arrays(trained, self.path, runner), runner.spec.hidden
        stored = trained.arrays.get("vectors")
        count = 1 if stored is None or not stored.shape else max(1, stored.shape[0])
        return PromptVectors(self, arrays.floats("vectors", count, hidden), runner.spec.vocab, trained.about.get("rates", ()))


@dataclass(eq=False, slots=True)
class TextState:
    """The state of one request. offers: by depth, of what follows the last of `length` tokens; tree: what this step checks; growth: its
    nodes; places: node (-1: the root) -> its first vector among the nodes, and how many."""

    offers: Seq[Offer] = ()
    length: int = 0
    tree: TokenTree = EMPTY
    growth: Growth | None = None
    places: dict[int, tuple[int, int]] = field(default_factory=dict)


class PromptVectors(Stateless):
    """The opened form. vectors: f32[distances, hidden]."""

    alone = "ppd: its rows start from vectors, so it drafts alone: --draft ppd:path=FOLDER"

    def __init__(self, method: PPD, vectors: F32, vocab: int, rates: Seq[Seq[float]] = ()) -> None:
        self.method, self.vectors, self.ranks = method, vectors, min(method.ranks, vocab)
        self.taps = Taps(top_k=self.ranks, logits=method.least > 0)
        self.rates = HitRates(len(vectors), self.ranks, rates)

    @property
    def bytes(self) -> int:
        return self.vectors.nbytes

    def begin(self, seq: Sequence) -> TextState:
        return TextState()

    def fork(self, state: TextState, seq: Sequence) -> TextState:
        return TextState(state.offers, state.length)

    def propose(self, seqs: Seq[Sequence], budgets: Seq[Budget]) -> list[TokenTree]:
        trees = []
        for seq, budget in zip(seqs, budgets, strict=True):
            state: TextState = seq.state[self]
            offers = state.offers if state.length == len(seq.tokens) else ()
            state.growth, state.places, state.tree = None, {}, EMPTY
            if min(budget) > 0:
                self._draft(state, offers, budget)
            trees.append(state.tree)
        return trees

    def _draft(self, state: TextState, offers: Seq[Offer], budget: Budget) -> None:
        below = min(len(self.vectors), *budget)  # vectors of the root
        rows, tree = budget.rows - below, EMPTY
        if rows and offers:
            growth = state.growth = Growth(rows, min(budget.depth, len(offers)))
            growth.every = offers[: growth.depth]
            for depth, offer in enumerate(growth.every):
                values = [
                    value if chance >= self.method.least else 0.0
                    for value, chance in zip(self.rates.rates(depth), offer.chances, strict=False)
                ]
                for node in growth.open(values[0]):
                    growth.extend(node, offer, values, values)
            tree = growth.tree()
        nodes, counts = self._chosen(tree, rows, budget.depth)
        self._place(state, tree, nodes, {-1: below, **counts})

    def _chosen(self, tree: TokenTree, rows: int, most: int) -> tuple[list[int], dict[int, int]]:
        """The nodes of a tree and the number of vectors of each that `rows` rows hold, by what they promise. 3."""
        hits = [min(1.0, sum(self.rates.rates(depth))) for depth in range(len(self.vectors))]
        gains, depths = list(accumulate(hits, mul)), tree.depths().tolist() if len(tree) else []
        chances = [] if tree.scores is None else tree.scores.tolist()
        wanted = [(-chance, -1, node) for node, chance in enumerate(chances)]
        for node, (chance, depth) in enumerate(zip(chances, depths, strict=True)):
            ends = chance * (1 - (hits[depth] if depth < len(hits) else 0.0))
            wanted += [(-ends * gain, i, node) for i, gain in enumerate(gains[: most - depth]) if ends * gain > 0]
        nodes, counts = [], dict[int, int]()
        for _, i, node in sorted(wanted)[:rows]:
            if i < 0:
                nodes.append(node)
            else:
                counts[node] = i + 1
        return sorted(nodes), counts

    def _place(self, state: TextState, tree: TokenTree, nodes: Seq[int], counts: dict[int, int]) -> None:
        """The tree of these nodes of another one, with so many vectors below each, in the state."""
        new = {-1: -1, **{node: i for i, node in enumerate(nodes)}}
        tokens = tree.tokens[nodes].tolist() if nodes else []
        parents = [new[parent] for parent in tree.parents[nodes].tolist()] if nodes else []
        given: list[int] = []
        for node, count in counts.items():
            first = len(tokens)
            state.places[new[node]] = first, count
            tokens += [0] * count  # stands in
            parents += [new[node], *range(first, first + count - 1)]
            given += range(count)
        scores = np.zeros(len(tokens), np.float32)
        if nodes and tree.scores is not None:
            scores[: len(nodes)] = tree.scores[nodes]
        made = TokenTree(np.array(tokens, np.int32), np.array(parents, np.int32), np.zeros(len(tokens) + 1, np.uint8), scores=scores)
        state.tree = replace(made, vectors=self.vectors[given])

    def observe(self, result: StepResult) -> None:
        """Takes what the target guesses at the vectors of the last accepted row, and learns which ranks were right."""
        roots = result.batch.roots.tolist()
        for s, (work, root, accepted) in enumerate(zip(result.work, roots, result.accepted, strict=True)):
            state: TextState | None = work.seq.state.get(self)
            if state is None or not accepted.tokens:
                continue
            if state.growth is not None:
                self.rates.learn(state.growth, accepted.tokens)
                state.growth = None
            first, count = 0, 0
            if result.trees[s] is state.tree:  # a constraint leaves the vectors out
                first, count = state.places.get(accepted.path[-1] if accepted.path else -1, (0, 0))
            rows = range(root + 1 + first, root + 1 + first + count)
            state.offers, state.length = [self._offer(result.out, row) for row in rows], len(work.seq.tokens)  # 2.

    def _offer(self, out: Any, row: int) -> Offer:
        tokens = out.top_k[row, : self.ranks].tolist()
        if not self.method.least:
            return Offer(tokens, [1.0] * len(tokens))
        logits = np.asarray(out.logits[row], np.float64)
        shares = np.exp(logits - logits.max())
        return Offer(tokens, (shares[tokens] / shares.sum()).tolist())

    def snapshot(self) -> Any:
        return self.rates.snapshot()

    def restore(self, snapshot: Any) -> None:
        self.rates.restore(snapshot)
