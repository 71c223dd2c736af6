"""Keeps the model's top k next tokens for each token it has seen and reads the next draft tree out of that table.

Xianzhen Luo, Yixuan Wang, Qingfu Zhu, Zhiming Zhang, Xuanyu Zhang, Qing Yang, Dongliang Xu: Turning Trash into Treasure:
Accelerating Inference of Large Language Models with Token Recycling, 2024, arXiv 2408.08696.

1. State: matrix [V, k], row x the k likeliest successors of token x, best first, as last seen; shared by all requests.
2. Template: a fixed tree of 80 nodes, each a path of ranks; it is given by the number of children of each node. Cut it
   to the budget: the nodes with most descendants in it stay, ties breadth first.
3. Draft: the root carries the newest token; the child of rank r of a node with token x carries matrix[x, r].
4. Update from the root and all nodes that were verified, rejected ones too: matrix[token] = top k of the logits there.
   Where a token occurs more than once the shallowest node wins, and the accepted path before all others.

Differs: unknown successors are -1 and make no node (the release starts with zeros, which makes equal siblings); colliding
writes are ordered (undefined in the release); the template is cut to the node budget; the prompt teaches nothing, as there.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import safetensors
import safetensors.numpy

from redraft.card import Card, Guarantee
from redraft.core.plan import Budget, StepResult
from redraft.core.sequence import Sequence
from redraft.core.taps import Taps
from redraft.core.tree import EMPTY, I32, U8, TokenTree
from redraft.draft.drafter import Stateless
from redraft.errors import InvalidInput
from redraft.options import Options, number

# "path:children" of each node that is no leaf, a path of ranks written as digits: levels of 8, 21, 25, 15, 8 and 3 nodes.
TEMPLATE = """
:8
0:8 1:4 2:3 3:2 4:1 5:1 6:1 7:1
00:8 01:3 02:2 03:1 04:1 05:1 06:1 07:1 10:2 11:1 20:1 30:1 40:1 50:1
000:5 001:2 002:1 003:1 004:1 010:1 020:1 100:1 200:1 300:1
0000:3 0001:1 0002:1 0010:1 0100:1 1000:1
00000:2 00010:1
"""
MAX_NODES, MAX_DEPTH, MAX_CHILDREN = 80, 6, 8  # nodes, levels, children of a node


def template() -> list[str]:
    """The 80 nodes as paths of ranks, breadth first."""
    children = dict(item.split(":") for item in TEMPLATE.split())
    level, nodes = [""], []
    while level := [path + str(rank) for path in level for rank in range(int(children.get(path, 0)))]:
        nodes += level
    return nodes


@dataclass(frozen=True)
class Cut:
    """The part of the template that fits a budget, breadth first. families: (node, its number of children) of every
    inner node, -1 the root; parents: i32[N], kinds: u8[N + 1], those of the tree when no successor is unknown."""

    families: tuple[tuple[int, int], ...]
    parents: I32
    kinds: U8


@lru_cache(maxsize=1024)
def cut(rows: int, depth: int, width: int) -> Cut:
    """At most `rows` nodes, `depth` levels and `width` children a node."""
    whole = template()
    size = {path: sum(other.startswith(path) for other in whole) for path in whole}
    fits = [path for path in whole if len(path) <= depth and all(int(rank) < width for rank in path)]
    # A parent has more descendants than its child, so what stays is a tree; the sort is stable, so ties are breadth first.
    kept = set(sorted(fits, key=lambda path: -size[path])[:rows])
    nodes = [path for path in whole if path in kept]
    place = {"": -1, **{path: i for i, path in enumerate(nodes)}}
    parents = np.array([place[path[:-1]] for path in nodes], np.int32)
    counts: dict[int, int] = {}
    for parent in parents.tolist():
        counts[parent] = counts.get(parent, 0) + 1
    kinds = np.zeros(len(nodes) + 1, np.uint8)
    parents.setflags(write=False)  # shared by many trees
    kinds.setflags(write=False)
    return Cut(tuple(counts.items()), parents, kinds)


@dataclass(frozen=True)
class TokenRecycling(Options):
    """k: successors kept for each token; path: a file that an earlier run saved, to start from."""

    k: int = number(8, ge=1, le=MAX_CHILDREN)
    path: Path | None = None

    card: ClassVar[Card] = Card(
        "Token Recycling",
        "Luo, Wang, Zhu, Zhang, Zhang, Yang, Xu, Turning Trash into Treasure: Accelerating Inference of Large Language Models "
        "with Token Recycling, 2024, arXiv 2408.08696",
        Guarantee.SAME_TEXT,
        deviates="unknown successors make no node; colliding writes are ordered; the tree is cut to the node budget",
        summary="A tree of tokens that were likely; GPUs and AMX",
    )

    def max_bytes(self, runner: Any) -> int:
        vocab: int = runner.spec.vocab
        return 4 * vocab * min(self.k, vocab)

    def open(self, runner: Any, sampler: Any) -> Recycler:
        recycler = Recycler(runner.spec.vocab, self.k)
        if self.path is not None:
            recycler.load(self.path)
        return recycler


class Recycler(Stateless):
    """What lives as long as the engine: `matrix`, i32[V, min(k, V)], -1 unknown; 4 k V bytes, whatever the traffic."""

    def __init__(self, vocab: int, k: int) -> None:
        width = min(k, vocab)
        self.matrix: I32 = np.full((vocab, width), -1, np.int32)  # 1.
        self.taps = Taps(top_k=width)

    @property
    def bytes(self) -> int:
        return self.matrix.nbytes

    def propose(self, seqs: Seq[Sequence], budgets: Seq[Budget]) -> list[TokenTree]:
        """For each sequence the template filled from the table, cut to the budget."""
        return [self._read(seq.tokens[-1], budget) if min(budget) > 0 else EMPTY for seq, budget in zip(seqs, budgets, strict=True)]

    def _read(self, root: int, budget: Budget) -> TokenTree:
        shape = cut(min(budget.rows, MAX_NODES), min(budget.depth, MAX_DEPTH), self.matrix.shape[1])  # 2.
        filled = [root]  # filled[i + 1]: the token of node i of the cut, -1 unknown, as are all nodes below an unknown one
        for node, children in shape.families:  # 3.
            token = filled[node + 1]
            filled += self.matrix[token, :children].tolist() if token >= 0 else [-1] * children
        if min(filled) >= 0:
            return TokenTree(np.array(filled[1:], np.int32), shape.parents, shape.kinds)
        place = {-1: -1}  # node of the cut -> node of the tree
        above = shape.parents.tolist()
        tokens: list[int] = []
        parents: list[int] = []
        for node, token in enumerate(filled[1:]):
            if token >= 0:
                place[node] = len(tokens)
                tokens.append(token)
                parents.append(place[above[node]])
        # Not TokenTree.build: a row of the matrix holds no id twice, so siblings differ.
        return TokenTree(np.array(tokens, np.int32), np.array(parents, np.int32), np.zeros(len(tokens) + 1, np.uint8))

    def observe(self, result: StepResult) -> None:
        """Learns from the top k at the root and at all nodes of every sequence that drew a token."""
        batch = result.batch
        tokens = batch.tokens[batch.logit_rows].tolist()
        source: dict[int, int] = {}  # token -> logit row
        for root, tree, accepted in zip(batch.roots.tolist(), result.trees, result.accepted, strict=True):
            if root < 0:
                continue
            nodes = np.argsort(tree.depths(), kind="stable")[::-1].tolist()
            for node in (*nodes, -1, *reversed(accepted.path), -1):
                row = root + 1 + node
                source[tokens[row]] = row
        if source:
            self.matrix[list(source)] = result.out.top_k[list(source.values()), : self.matrix.shape[1]]  # 4.

    def snapshot(self) -> I32:
        return self.matrix.copy()

    def restore(self, snapshot: I32) -> None:
        self.matrix[:] = snapshot

    def save(self, path: Path) -> None:
        """Writes the matrix as safetensors (tensor `successors`); InvalidInput when the file cannot be written."""
        try:
            path.write_bytes(safetensors.numpy.save({"successors": self.matrix}))
        except OSError as error:
            raise InvalidInput(f"token-recycling:path={path}: cannot be written ({error.strerror})") from None

    def load(self, path: Path) -> None:
        """Takes over a saved matrix; InvalidInput where the file is missing or not one of this vocabulary and k."""
        at = f"token-recycling:path={path}"
        try:
            found = safetensors.numpy.load(path.read_bytes()).get("successors")
        except OSError as error:
            raise InvalidInput(f"{at}: cannot be read ({error.strerror})") from None
        except (safetensors.SafetensorError, KeyError) as error:  # KeyError: of a dtype that numpy lacks
            raise InvalidInput(f"{at}: not a safetensors file ({error})") from None
        vocab, k = self.matrix.shape
        if found is None or found.ndim != 2 or found.dtype != np.int32:
            raise InvalidInput(f"{at}: holds no integer matrix named 'successors'; save one with Recycler.save")
        if found.shape != (vocab, k):
            raise InvalidInput(f"{at}: made for a vocabulary of {found.shape[0]} and k={found.shape[1]}, here they are {vocab} and {k}")
        ranked = np.sort(found, axis=1)
        if found.min() < -1 or found.max() >= vocab or ((ranked[:, 1:] == ranked[:, :-1]) & (ranked[:, 1:] >= 0)).any():
            raise InvalidInput(f"{at}: damaged, a row has an id twice or one outside 0..{vocab - 1}")
        self.matrix[:] = found
