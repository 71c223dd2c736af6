"""Batch.pack against a row-by-row definition."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from redraft.core.batch import Batch
from redraft.core.plan import Work
from redraft.core.testing import view, work
from redraft.core.tree import EMPTY, TokenTree

ASKED = [None, (), (1,), range(5, 20), (2, 3, 7, 11)]  # tokens of a prompt


@st.composite
def steps(draw):
    """Work of one to four sequences, some with prompt_logprobs, with a tree where the sequence draws."""
    works, trees = [], []
    for _ in range(draw(st.integers(1, 4))):
        length = draw(st.integers(1, 12))
        stored = draw(st.integers(0, length - 1))
        rows = draw(st.integers(1, length - stored))
        prompt_len = draw(st.integers(1, length))
        w = work(range(50, 50 + length), stored=stored, rows=rows, prompt_logprobs=draw(st.sampled_from([None, 0, 2])))
        w.seq.prompt_len = prompt_len
        w.seq.request.wants = w.seq.request.wants._replace(logprobs_of=draw(st.sampled_from(ASKED)))
        n = draw(st.sampled_from([0, 1, 3, 9, 70])) if w.done else 0
        parents = [draw(st.integers(max(-1, i - 4), i - 1)) for i in range(n)]
        works.append(w)
        trees.append(TokenTree.build(list(range(n)), parents, vocab=100, rows=99, depth=99))
    return works, trees


@settings(max_examples=60, deadline=None)
@given(steps())
def test_rows_by_definition(step):
    works, trees = step
    batch = Batch.pack(works, trees, view(works))
    rows = []  # (token, position, bits, its logits are wanted, sequence whose root it is)
    for s, (w, tree) in enumerate(zip(works, trees, strict=True)):
        of = w.seq.request.wants.logprobs_of
        asks = w.seq.params.prompt_logprobs is not None
        for r in range(w.rows):
            last = r == w.rows - 1
            token = w.seq.stored + r + 1
            wanted = (asks and token < w.seq.prompt_len and (of is None or token in of)) or (last and w.done)
            rows.append((w.seq.tokens[w.seq.stored + r], w.seq.stored + r, [], wanted, s if last and w.done else None))
        for node in range(len(tree)):
            path = tree.path_to(node)
            rows.append((int(tree.tokens[node]), w.seq.stored + w.rows - 1 + len(path), path, True, None))
    assert batch.tokens.tolist() == [row[0] for row in rows]
    assert batch.positions.tolist() == [row[1] for row in rows]
    chains = [r for s, w in enumerate(works) for r in range(batch.starts[s], batch.tree_starts[s])]
    found = iter(batch.visible.tolist())
    for r, (_, _, path, _, _) in enumerate(rows):
        if r in chains:
            assert path == []
        else:
            words = next(found)
            assert [j for j in range(64 * len(words)) if words[j // 64] >> (j % 64) & 1] == path
    assert next(found, None) is None
    assert batch.logit_rows.tolist() == [r for r, row in enumerate(rows) if row[3]]
    for s, w in enumerate(works):
        at = int(batch.roots[s])
        if w.done:
            assert rows[batch.logit_rows[at]][4] == s
            nodes = batch.logit_rows[at + 1 : at + 1 + len(trees[s])].tolist()
            assert nodes == list(range(batch.tree_starts[s], batch.starts[s + 1]))
        else:
            assert at == -1


def test_prompt_logprobs_reach_to_the_end_of_the_prompt():
    whole = work(range(6), rows=6, prompt_logprobs=0)
    chunk = work(range(6), rows=3, prompt_logprobs=0)
    decode = work(range(6), stored=5, prompt_logprobs=0)
    works = [whole, chunk, decode]
    batch = Batch.pack(works, [EMPTY] * 3, view(works))
    assert batch.logit_rows.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert batch.roots.tolist() == [5, -1, 9]


def test_a_growing_tail_packs_its_new_nodes_only():
    w = work(range(20, 25), stored=3)
    other = work(range(30, 33), stored=2)
    tree = TokenTree.build([40, 41, 42, 43], [-1, -1, 0, 2], vocab=99, rows=9, depth=9)
    works = [Work(w.seq, w.rows, first=2), Work(other.seq, other.rows, first=1)]
    chain = TokenTree.chain([60, 61, 62])
    pages = replace(view(works), tail=[4, 2])
    batch = Batch.pack(works, [tree, chain], pages)
    assert batch.tokens.tolist() == [42, 43, 61, 62]
    assert batch.positions.tolist() == [6, 7, 4, 5]
    assert batch.visible.ravel().tolist() == [0b101, 0b1101, 0b11, 0b111]
    assert (batch.starts.tolist(), batch.tree_starts.tolist()) == ([0, 2, 4], [0, 2])
    assert batch.logit_rows.tolist() == [0, 1, 2, 3]
    assert batch.pages is pages


def test_nodes_that_start_from_vectors_are_named():
    w, other = work(range(20, 25), stored=3), work(range(30, 33), stored=2)
    tree = TokenTree.build([40, 41], [-1, 0], vocab=99, rows=9, depth=9)
    vectors = np.arange(6, dtype=np.float32).reshape(3, 2)
    whole = TokenTree(
        np.append(tree.tokens, [0, 0, 0]).astype(np.int32), np.append(tree.parents, [-1, 2, 1]).astype(np.int32), np.zeros(6, np.uint8),
        vectors=vectors,
    )  # fmt: skip
    found = Batch.pack([other, w], [EMPTY, whole], view([other, w])).vectors
    assert found is not None and found[0].tolist() == [5, 6, 7] and np.array_equal(found[1], vectors)
    grown = [Work(w.seq, w.rows, first=3)]
    found = Batch.pack(grown, [whole], replace(view(grown), tail=[5])).vectors
    assert found is not None and found[0].tolist() == [0, 1] and np.array_equal(found[1], vectors[1:])


def test_each_sequence_needs_a_tree():
    w = work([1, 2])
    with pytest.raises(ValueError, match="zip"):
        Batch.pack([w, w], [EMPTY], view([w]))


def test_dtypes():
    w = work([1, 2])
    batch = Batch.pack([w], [EMPTY], view([w]))
    arrays = [batch.tokens, batch.positions, batch.starts, batch.tree_starts, batch.logit_rows, batch.roots]
    assert {array.dtype for array in arrays} == {np.dtype(np.int32)}
    assert batch.visible.dtype == np.uint64 and batch.visible.shape[0] == 0
