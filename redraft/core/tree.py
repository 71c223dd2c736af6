"""The draft: a tree of tokens that hangs under the last pending token of a sequence."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from enum import IntEnum
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

I32 = NDArray[np.int32]
U8 = NDArray[np.uint8]
U64 = NDArray[np.uint64]


class Kind(IntEnum):
    """How the children of a node were made; it selects the verification rules that are right for them."""

    FIXED = 0  # any way that does not look at the target's sample: n-gram, copy, table, top-k
    IID = 1  # independent samples of the draft law
    WITHOUT_REPLACEMENT = 2  # samples without replacement, in draw order
    TOP_PLUS_ONE = 3  # the likeliest k - 1 and one random from the rest


@dataclass(frozen=True, eq=False, slots=True)
class TokenTree:
    """Drafted nodes only, parents before children, siblings in draw order; parent -1 is the last pending row.

    tokens, parents: i32[N]; kinds: u8[N + 1], kinds[i + 1] says how node i's children were made, kinds[0] the root's.
    """

    tokens: I32
    parents: I32
    kinds: U8
    _children: dict[tuple[int, int], int] = field(default_factory=dict, repr=False)

    @classmethod
    def chain(cls, tokens: Seq[int]) -> TokenTree:
        """A tree without branches: each token follows the one before."""
        n = len(tokens)
        return cls(np.asarray(tokens, np.int32), np.arange(-1, n - 1, dtype=np.int32), np.zeros(n + 1, np.uint8))

    @classmethod
    def build(cls, tokens: Seq[int], parents: Seq[int], *, vocab: int, rows: int, depth: int) -> TokenTree:
        """The checked constructor: cuts to `rows` nodes and `depth` levels, merges equal siblings (the first stays).

        A node whose parent was dropped is dropped too. Tokens outside 0..vocab-1, or a parent that does not come
        before its child, are a drafter's bug and raise ValueError.
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

    def depths(self) -> I32:
        """i32[N]: 1 for a child of the root; a node's position is the root's plus its depth."""
        return _shape(self.parents.tobytes())[0]

    def ancestors(self) -> U64:
        """u64[N, W]: bit j of row i is set when node j lies on node i's path, itself included."""
        return _shape(self.parents.tobytes())[1]

    def child(self, node: int, token: int) -> int:
        """The child of `node` (-1: the root) that carries `token`, or -1."""
        if not self._children and len(self.tokens):
            pairs = zip(self.parents.tolist(), self.tokens.tolist(), strict=True)
            for i, pair in enumerate(pairs):
                self._children.setdefault(pair, i)
        return self._children.get((node, token), -1)

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
    """Depths and ancestor bits of a tree shape: drafters repeat few shapes, so this is computed once for each."""
    above = np.frombuffer(parents, np.int32).tolist()
    depths = np.zeros(len(above), np.int32)
    bits = np.zeros((len(above), -(-len(above) // 64)), np.uint64)
    for i, parent in enumerate(above):
        if parent >= 0:
            depths[i] = depths[parent]
            bits[i] = bits[parent]
        depths[i] += 1
        bits[i, i // 64] |= np.uint64(1 << (i % 64))
    depths.setflags(write=False)
    bits.setflags(write=False)
    return depths, bits
