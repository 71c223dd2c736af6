"""Drafters for tests: deterministic, with every shape of tree, and with right tokens as often as a test needs."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from random import Random

from redraft.core.noise import mix
from redraft.core.plan import Budget
from redraft.core.sequence import Sequence
from redraft.core.tree import EMPTY, TokenTree
from redraft.draft.drafter import Stateless


def _random(seq: Sequence, seed: int) -> Random:
    return Random(mix(seed, len(seq.tokens), *seq.tokens[-4:]))


@dataclass(frozen=True, eq=False)
class RandomTrees(Stateless):
    """Random trees of random tokens, a function of the last tokens. With `known` texts, by request id, each node also
    gets the right child with probability `right`, at a random place among its siblings."""

    vocab: int
    seed: int = 0
    right: float = 0.0
    known: Mapping[tuple[str, int], Seq[int]] | None = None

    def propose(self, seqs: Seq[Sequence], budgets: Seq[Budget]) -> list[TokenTree]:
        return [self._grow(seq, budget) for seq, budget in zip(seqs, budgets, strict=True)]

    def _grow(self, seq: Sequence, budget: Budget) -> TokenTree:
        if min(budget) < 1:
            return EMPTY
        dice = _random(seq, self.seed)
        future = list((self.known or {}).get((seq.request.id, seq.index), ()))[seq.generated :]
        tokens: list[int] = []
        parents: list[int] = []
        on_path = {-1: 0}  # nodes on the path of the true text -> their depth
        level = [-1]
        while level and len(tokens) < budget.rows:
            nodes = []
            for parent in level:
                children = [dice.randrange(self.vocab) for _ in range(dice.choice([0, 1, 1, 2, 3]))]
                depth = on_path.get(parent)
                truth = future[depth] if depth is not None and depth < len(future) else None
                if truth is not None and dice.random() < self.right:
                    children.insert(dice.randrange(len(children) + 1), truth)
                for token in children:
                    if depth is not None and token == truth:
                        on_path[len(tokens)] = depth + 1
                    nodes.append(len(tokens))
                    tokens.append(token)
                    parents.append(parent)
            level = nodes
        return TokenTree.build(tokens, parents, vocab=self.vocab, rows=budget.rows, depth=budget.depth)


@dataclass(frozen=True, eq=False)
class FullFanOut(Stateless):
    """Every token under the root, then every token under some of these, until the budget is used up."""

    vocab: int
    seed: int = 0

    def propose(self, seqs: Seq[Sequence], budgets: Seq[Budget]) -> list[TokenTree]:
        trees = []
        for seq, budget in zip(seqs, budgets, strict=True):
            order = _random(seq, self.seed).sample(range(self.vocab), self.vocab)
            parents = [-1] * self.vocab + [node for node in range(3) for _ in order]
            tree = TokenTree.build(order * 4, parents, vocab=self.vocab, rows=budget.rows, depth=budget.depth)
            trees.append(tree if min(budget) > 0 else EMPTY)
        return trees
