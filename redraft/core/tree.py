"""The draft: a tree of tokens below the last pending token of a sequence."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from enum import IntEnum
from functools import lru_cache
from itertools import islice
from operator import ge
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

I32 = NDArray[np.int32]
I64 = NDArray[np.int64]
U8 = NDArray[np.uint8]
U16 = NDArray[np.uint16]
U64 = NDArray[np.uint64]
F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I32_TYPE, U8_TYPE = np.dtype(np.int32), np.dtype(np.uint8)


class Kind(IntEnum):
    """How the children of a node were made. It decides which verification rules are valid for them. A node without children counts
    as FIXED."""

    FIXED = 0  # any method that does not depend on the target's sample: n-gram, copy, table, top-k
    IID = 1  # independent samples of the draft distribution
    WITHOUT_REPLACEMENT = 2  # samples without replacement, in draw order
    TOP_PLUS_ONE = 3  # the likeliest k - 1 tokens and one sample of the rest
    SINGLE = 4  # one sample of the draft distribution: the three kinds above with one child


class NoDistribution(Exception):
    """A distribution that was promised cannot be computed."""


class Probs(Protocol):
    """Distributions of the next token at rows."""

    def probs(self, rows: Seq[int]) -> F64:
        """f64[R, V]; each row sums to 1. Raises NoDistribution if a drafter does not know the distribution that it drew from."""
        ...


@dataclass(frozen=True, eq=False, slots=True)
class TokenTree:
    """The drafted nodes: parents before children, siblings in draw order. Parent -1 is the root, the last pending row.

    tokens, parents: i32[N]; kinds: u8[N + 1], kinds[i + 1] is the kind of the children of node i, kinds[0] that of the root's
    children; distributions: for sampled kinds, the distributions that children were drawn from, row i + 1 for the children of
    node i and row 0 for those of the root; draws: i32[D], the nodes in draw order, a node drawn twice twice, None for each node once
    in order; origins: u16[N], the member of a union that proposed each node; scores: f32[N], the confidence of the drafter.

    vectors: f32[n, hidden]: the last n nodes start from these vectors instead of a token's embedding. They are no drafts: no token follows
    them, verifiers do not meet them, and nothing of them is kept. A drafter reads what the target makes of them.
    """

    tokens: I32
    parents: I32
    kinds: U8
    distributions: Probs | None = None
    draws: I32 | None = None
    origins: U16 | None = None
    scores: F32 | None = None
    vectors: F32 | None = None
    _children: dict[tuple[int, int], int] = field(default_factory=dict, repr=False)
    _drawn: dict[int, list[int]] = field(default_factory=dict, repr=False)

    @classmethod
    def chain(cls, tokens: Seq[int]) -> TokenTree:
        """A tree without branches: each token is the child of the one before."""
        n = len(tokens)
        return cls(np.asarray(tokens, np.int32), np.arange(-1, n - 1, dtype=np.int32), np.zeros(n + 1, np.uint8))

    @classmethod
    def build(cls, tokens: Seq[int], parents: Seq[int], *, vocab: int, rows: int, depth: int) -> TokenTree:
        """The checked constructor: cuts to `rows` nodes and `depth` levels, and merges equal siblings into the first one.

        A node is dropped if its parent was dropped. Raises ValueError for a token outside 0..vocab-1 or a parent that does not come
        before its child: both are bugs of a drafter.
        """
        out_tokens: list[int] = []
        out_parents: list[int] = []
        depths: list[int] = []
        seen: dict[tuple[int, int], int] = {}
        place: list[int] = []  # old node -> new node, or -2 when dropped
        for i, (token, parent) in enumerate(zip(tokens, parents, strict=True)):
            if not 0 <= token < vocab:
                raise ValueError(f"node {i} has token {token}, not in 0..{vocab - 1}")
            if not -1 <= parent < i:
                raise ValueError(f"node {i} has parent {parent}: parents come before children")
            at = -1 if parent < 0 else place[parent]
            level = 1 if at == -1 else depths[at] + 1 if at >= 0 else 0
            if at == -2 or level > depth:
                place.append(-2)
            elif (at, token) in seen:
                place.append(seen[at, token])
            elif len(out_tokens) == rows:
                place.append(-2)
            else:
                seen[at, token] = len(out_tokens)
                place.append(len(out_tokens))
                out_tokens.append(int(token))
                out_parents.append(at)
                depths.append(level)
        n = len(out_tokens)
        return cls(np.asarray(out_tokens, np.int32), np.asarray(out_parents, np.int32), np.zeros(n + 1, np.uint8))

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def drafts(self) -> int:
        """The number of nodes that stand for tokens: the first ones."""
        return len(self.tokens) - (0 if self.vectors is None else len(self.vectors))

    def without_vectors(self) -> TokenTree:
        """The nodes that stand for tokens. Their numbers are the same."""
        if self.vectors is None:
            return self
        n = self.drafts
        origins = None if self.origins is None else self.origins[:n]
        scores = None if self.scores is None else self.scores[:n]
        return replace(
            self, tokens=self.tokens[:n], parents=self.parents[:n], kinds=self.kinds[: n + 1], origins=origins, scores=scores, vectors=None,
            _children={}, _drawn={},
        )  # fmt: skip

    def check(self, *, vocab: int, rows: int, depth: int) -> None:
        """Raises ValueError unless this is a tree of at most `rows` nodes and `depth` levels over `vocab` tokens."""
        n = len(self.tokens)
        if n > rows:
            raise ValueError(f"{n} nodes for a budget of {rows}")
        for name, array, shape, wanted in (
            ("tokens", self.tokens, (n,), I32_TYPE), ("parents", self.parents, (n,), I32_TYPE), ("kinds", self.kinds, (n + 1,), U8_TYPE)
        ):  # fmt: skip
            if array.shape != shape or array.dtype != wanted:
                raise ValueError(f"{name} is {array.dtype}{list(array.shape)} instead of {wanted}{list(shape)}")
        if not n:
            return
        tokens, parents, drafts = self.tokens.tolist(), self.parents.tolist(), n  # lists are faster than arrays of few nodes
        if self.vectors is not None:
            if self.vectors.ndim != 2 or not 0 < len(self.vectors) <= n or not np.isfinite(self.vectors).all():
                raise ValueError(f"vectors {list(self.vectors.shape)} of {n} nodes: finite numbers [1 to {n}, hidden] are needed")
            drafts = self.drafts
            if any(self.kinds[drafts + 1 :].tolist()):
                raise ValueError("a node that starts from a vector has children that were sampled")
        if min(tokens) < 0 or max(tokens) >= vocab:
            raise ValueError(f"a token outside 0..{vocab - 1}: {tokens}")
        if min(parents) < -1 or any(map(ge, parents, range(n))):
            raise ValueError(f"a node does not come after its parent: {parents}")
        if len(set(zip(parents[:drafts], tokens[:drafts], strict=True))) < drafts:
            raise ValueError("two siblings with the same token")
        if self.scores is not None and not (self.scores.shape == (n,) and self.scores.min() >= 0 and self.scores.max() <= 1.001):
            raise ValueError(f"scores must be {n} probabilities: {self.scores.tolist()}")
        if self.draws is not None and set(self.draws.tolist()) != set(range(drafts)):
            raise ValueError(f"draws must contain each of the {drafts} nodes at least once and nothing else: {self.draws.tolist()}")
        if self.distributions is None and any(self.kinds.tolist()):
            raise ValueError("sampled children without the distribution that they were drawn from")
        if (deepest := max(self.depths().tolist())) > depth:
            raise ValueError(f"{deepest} levels for a budget of {depth}")

    def depths(self) -> I32:
        """i32[N]: 1 for a child of the root. The position of a node is that of the root plus its depth."""
        return _shape(self.parents.tobytes())[0]

    def ancestors(self) -> U64:
        """u64[N, W]: bit j of row i is set if node j is on the path to node i, node i included."""
        return _shape(self.parents.tobytes())[1]

    def child(self, node: int, token: int) -> int:
        """The child of `node` (-1: the root) with token `token`, or -1."""
        if not self._children and len(self.tokens):
            pairs = zip(self.parents.tolist(), self.tokens.tolist(), strict=True)
            for i, pair in enumerate(islice(pairs, self.drafts)):
                self._children.setdefault(pair, i)
        return self._children.get((node, token), -1)

    def drawn(self, node: int) -> list[int]:
        """The children of `node` (-1: the root) in draw order, each as often as it was drawn."""
        if not self._drawn and len(self.tokens):
            for i in range(self.drafts) if self.draws is None else self.draws.tolist():
                self._drawn.setdefault(int(self.parents[i]), []).append(i)
        return self._drawn.get(node, [])

    def path_to(self, node: int) -> list[int]:
        """The nodes from the root's child down to `node`; empty for the root (-1)."""
        path = []
        while node >= 0:
            path.append(node)
            node = int(self.parents[node])
        return path[::-1]


EMPTY = TokenTree.chain(())


@lru_cache(maxsize=4096)
def _shape(parents: bytes) -> tuple[I32, U64]:
    """Depths and ancestor bits of a tree shape. They are cached, because drafters repeat few shapes."""
    above = np.frombuffer(parents, np.int32).tolist()
    depths: list[int] = []
    paths: list[int] = []
    for i, parent in enumerate(above):
        depths.append(1 + (depths[parent] if parent >= 0 else 0))
        paths.append((paths[parent] if parent >= 0 else 0) | 1 << i)
    levels, words = np.array(depths, np.int32), -(-len(above) // 64)
    levels.setflags(write=False)
    bits = np.frombuffer(b"".join(path.to_bytes(8 * words, "little") for path in paths), "<u8")
    return levels, bits.reshape(len(above), words)
