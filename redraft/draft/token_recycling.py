"""Remembers the model's top k next tokens for each token and drafts a tree from that table.

Xianzhen Luo, Yixuan Wang, Qingfu Zhu, Zhiming Zhang, Xuanyu Zhang, Qing Yang, Dongliang Xu: Turning Trash into Treasure:
Accelerating Inference of Large Language Models with Token Recycling, 2024, arXiv 2408.08696.

1. State: a matrix [V, k]. Row x has the k likeliest successors of token x, best first, as last seen. All requests share it.
2. Template: a fixed tree of 80 nodes. A node is a path of ranks, and the tree is written as the number of children of each
   node. Cut it to the budget: the nodes with the most descendants stay, ties in breadth-first order.
3. Draft: the root has the newest token. The child of rank r of a node with token x has the token matrix[x, r].
4. Update from the root and all verified nodes, including rejected ones: matrix[token] = top k of the logits there. If a
   token occurs several times, the accepted path takes precedence, then the shallowest node.

Differs: unknown successors are -1 and make no node (the published code starts with zeros, which makes equal siblings).
Conflicting writes have an order (undefined in the published code). The template is cut to the node budget. As in the published
code, nothing is learned from the prompt.
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
from redraft.draft.source import Compiled, Offer
from redraft.errors import InvalidInput
from redraft.options import Options, number

# "path:children" of each inner node; a path is its ranks as digits. The levels have 8, 21, 25, 15, 8 and 3 nodes.
TEMPLATE = """
:8
0:8 1:4 2:3 3:2 4:1 5:1 6:1 7:1
00:8 01:3 02:2 03:1 04:1 05:1 06:1 07:1 10:2 11:1 20:1 30:1 40:1 50:1
000:5 001:2 002:1 003:1 004:1 010:1 020:1 100:1 200:1 300:1
0000:3 0001:1 0002:1 0010:1 0100:1 1000:1
00000:2 00010:1
"""
OFFERS = 3  # successors that are offered as single tokens
MAX_NODES, MAX_DEPTH, MAX_CHILDREN = 80, 6, 8  # nodes, levels, children of a node


def template() -> list[str]:
    """The 80 nodes as paths of ranks, breadth first."""
    children = dict(item.split(":") for item in TEMPLATE.split())
    level, nodes = [""], []
    while level := [path + str(rank) for path in level for rank in range(int(children.get(path, 0)))]:
        nodes += level
    return nodes


@lru_cache(maxsize=4096)
def deepest_first(parents: bytes) -> tuple[int, ...]:
    """The nodes of a tree by falling depth, of one depth the last first."""
    depths: list[int] = []
    for parent in np.frombuffer(parents, np.int32).tolist():
        depths.append(depths[parent] + 1 if parent >= 0 else 0)
    return tuple(sorted(range(len(depths)), key=lambda node: (-depths[node], -node)))


@dataclass(frozen=True)
class Cut:
    """The part of the template that fits a budget, breadth first. families: (node, number of children) of every inner node,
    -1 is the root; parents: i32[N] and kinds: u8[N + 1] of the tree if all successors are known."""

    families: tuple[tuple[int, int], ...]
    parents: I32
    kinds: U8


@lru_cache(maxsize=1024)
def cut(rows: int, depth: int, width: int) -> Cut:
    """At most `rows` nodes, `depth` levels and `width` children a node."""
    whole = template()
    size = {path: sum(other.startswith(path) for other in whole) for path in whole}
    fits = [path for path in whole if len(path) <= depth and all(int(rank) < width for rank in path)]
    # A parent has more descendants than its child, so the kept nodes form a tree. The sort is stable, so ties stay breadth first.
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
    """k: successors kept for each token; path: a saved matrix to start from."""

    k: int = number(8, ge=1, le=MAX_CHILDREN)
    path: Path | None = None

    card: ClassVar[Card] = Card(
        "Token Recycling",
        "Luo, Wang, Zhu, Zhang, Zhang, Yang, Xu, Turning Trash into Treasure: Accelerating Inference of Large Language Models "
        "with Token Recycling, 2024, arXiv 2408.08696",
        Guarantee.SAME_TEXT,
        deviates="unknown successors make no node; conflicting writes are ordered; the tree is cut to the node budget",
        summary="A tree of earlier likely tokens; GPUs and AMX",
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
    """The opened drafter. matrix: i32[V, min(k, V)], -1: unknown; 4 k V bytes, independent of traffic."""

    def __init__(self, vocab: int, k: int) -> None:
        width = min(k, vocab)
        self.matrix: I32 = np.full((vocab, width), -1, np.int32)  # 1.
        self.taps = Taps(top_k=width)

    @property
    def bytes(self) -> int:
        return self.matrix.nbytes

    def propose(self, seqs: Seq[Sequence], budgets: Seq[Budget]) -> list[TokenTree]:
        """For each sequence the template, cut to the budget and filled from the matrix."""
        return [self._read(seq.tokens[-1], budget) if min(budget) > 0 else EMPTY for seq, budget in zip(seqs, budgets, strict=True)]

    def _read(self, root: int, budget: Budget) -> TokenTree:
        shape = cut(min(budget.rows, MAX_NODES), min(budget.depth, MAX_DEPTH), self.matrix.shape[1])  # 2.
        filled = [root]  # filled[i + 1]: the token of node i of the cut, -1: unknown; nodes below an unknown node are unknown
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
        # TokenTree.build is not needed: the ids of a matrix row differ, so siblings differ.
        return TokenTree(np.array(tokens, np.int32), np.array(parents, np.int32), np.zeros(len(tokens) + 1, np.uint8))

    # ---- offers of single tokens; a place is the token before it, a bucket the rank

    buckets = OFFERS

    def start(self, seq: Sequence) -> int:
        return seq.tokens[-1]

    def follow(self, place: int, token: int) -> int:
        return token

    def offers(self, place: int) -> list[Offer]:
        return [(token, rank) for rank, token in enumerate(self.matrix[place, :OFFERS].tolist()) if token >= 0]

    def compiled(self, library: Any) -> Compiled:
        return Compiled.new(library, "rd_successors", self.matrix.ctypes.data, *self.matrix.shape, OFFERS, whole=False)

    def observe(self, result: StepResult) -> None:
        """Learns the top k at the root and at all nodes of every sequence that drew a token."""
        batch = result.batch
        rows: list[int] = []  # logit rows; of rows with one token, the last one counts
        for root, tree, accepted in zip(batch.roots.tolist(), result.trees, result.accepted, strict=True):
            if root >= 0:
                first = root + 1
                if len(tree):
                    rows += [first + node for node in deepest_first(tree.parents.tobytes())]
                    rows.append(root)
                    rows += [first + node for node in reversed(accepted.path)]
                rows.append(root)
        chosen = rows[0] if len(rows) == 1 else rows  # numpy is slow with a list
        if rows:
            self.matrix[batch.tokens[batch.logit_rows[chosen]]] = result.out.top_k[chosen, : self.matrix.shape[1]]  # 4.

    def snapshot(self) -> I32:
        return self.matrix.copy()

    def restore(self, snapshot: I32) -> None:
        self.matrix[:] = snapshot

    def save(self, path: Path) -> None:
        """Writes the matrix as safetensors (tensor `successors`). Raises InvalidInput if the file cannot be written."""
        try:
            path.write_bytes(safetensors.numpy.save({"successors": self.matrix}))
        except OSError as error:
            raise InvalidInput(f"token-recycling:path={path}: cannot be written ({error.strerror})") from None

    def load(self, path: Path) -> None:
        """Loads a saved matrix. Raises InvalidInput if the file is missing or damaged or has another vocabulary or k."""
        at = f"token-recycling:path={path}"
        try:
            found = safetensors.numpy.load(path.read_bytes()).get("successors")
        except OSError as error:
            raise InvalidInput(f"{at}: cannot be read ({error.strerror})") from None
        except (safetensors.SafetensorError, KeyError) as error:  # KeyError: a dtype that numpy does not have
            raise InvalidInput(f"{at}: not a safetensors file ({error})") from None
        vocab, k = self.matrix.shape
        if found is None or found.ndim != 2 or found.dtype != np.int32:
            raise InvalidInput(f"{at}: contains no integer matrix named 'successors'; save one with Recycler.save")
        if found.shape != (vocab, k):
            raise InvalidInput(f"{at}: made for a vocabulary of {found.shape[0]} and k={found.shape[1]}, here they are {vocab} and {k}")
        ranked = np.sort(found, axis=1)
        if found.min() < -1 or found.max() >= vocab or ((ranked[:, 1:] == ranked[:, :-1]) & (ranked[:, 1:] >= 0)).any():
            raise InvalidInput(f"{at}: damaged, a row has an id twice or an id outside 0..{vocab - 1}")
        self.matrix[:] = found
