"""TokenTree.build against the set of its paths."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from redraft.core.tree import EMPTY, TokenTree

NODES = st.lists(st.tuples(st.integers(0, 3), st.integers(-1, 80)), max_size=80).map(
    lambda nodes: ([token for token, _ in nodes], [min(parent, i - 1) for i, (_, parent) in enumerate(nodes)])
)


def texts(tokens, parents):
    """The text from the root to each node."""
    out = []
    for token, parent in zip(tokens, parents, strict=True):
        out.append((*(out[parent] if parent >= 0 else ()), token))
    return out


@given(NODES, st.integers(0, 90), st.integers(0, 8))
def test_build_keeps_the_first_different_texts(nodes, rows, depth):
    tree = TokenTree.build(*nodes, vocab=4, rows=rows, depth=depth)
    wanted = list(dict.fromkeys(text for text in texts(*nodes) if len(text) <= depth))[:rows]
    assert texts(tree.tokens.tolist(), tree.parents.tolist()) == wanted
    assert len(tree.kinds) == len(tree) + 1
    assert (tree.tokens.dtype, tree.parents.dtype, tree.kinds.dtype) == (np.int32, np.int32, np.uint8)


@given(NODES)
def test_shape_and_children(nodes):
    tree = TokenTree.build(*nodes, vocab=4, rows=99, depth=99)
    for node in range(len(tree)):
        path = tree.path_to(node)
        assert tree.depths()[node] == len(path)
        bits = [j for j in range(len(tree)) if int(tree.ancestors()[node, j // 64]) >> (j % 64) & 1]
        assert bits == path
        assert tree.child(int(tree.parents[node]), int(tree.tokens[node])) == node
    for node in range(-1, len(tree)):
        carried = {int(tree.tokens[c]) for c in range(len(tree)) if tree.parents[c] == node}
        assert all(tree.child(node, token) == -1 for token in set(range(5)) - carried)


def test_a_chain():
    tree = TokenTree.chain([7, 7, 7])
    assert tree.parents.tolist() == [-1, 0, 1]
    assert tree.depths().tolist() == [1, 2, 3]
    assert [tree.child(i, 7) for i in (-1, 0, 1, 2)] == [0, 1, 2, -1]
    assert len(EMPTY) == 0 and EMPTY.child(-1, 0) == -1 and EMPTY.path_to(-1) == []


@pytest.mark.parametrize(
    ("tokens", "parents", "said"),
    [
        ([1, 4], [-1, 0], "node 1 has token 4, not in 0..3"),
        ([-1], [-1], "token -1"),
        ([1, 1], [-1, 1], "node 1 has parent 1"),
        ([1], [-2], "parent -2"),
    ],
)
def test_a_drafters_bug_raises(tokens, parents, said):
    with pytest.raises(ValueError, match=said):
        TokenTree.build(tokens, parents, vocab=4, rows=9, depth=9)


def test_different_lengths_raise():
    with pytest.raises(ValueError, match="zip"):
        TokenTree.build([1, 2], [-1], vocab=4, rows=9, depth=9)


def test_nodes_that_start_from_vectors_are_no_drafts():
    tree = TokenTree(
        np.array([0, 5, 0, 0], np.int32), np.array([-1, 0, -1, 2], np.int32), np.zeros(5, np.uint8),
        vectors=np.ones((2, 4), np.float32),
    )  # fmt: skip
    tree.check(vocab=6, rows=4, depth=2)
    assert tree.drafts == 2 and tree.child(-1, 0) == 0 and tree.child(2, 0) == -1
    assert tree.drawn(-1) == [0] and tree.drawn(2) == []
    plain = tree.without_vectors()
    assert plain.tokens.tolist() == [0, 5] and plain.parents.tolist() == [-1, 0] and plain.vectors is None and len(plain.kinds) == 3
    for vectors in (np.ones((5, 4)), np.ones(4), np.full((2, 4), np.nan), np.ones((0, 4))):
        with pytest.raises(ValueError, match="vectors"):
            TokenTree(tree.tokens, tree.parents, tree.kinds, vectors=vectors.astype(np.float32)).check(vocab=6, rows=4, depth=2)
