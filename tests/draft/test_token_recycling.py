from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from redraft.core.batch import Batch
from redraft.core.plan import Accepted, Budget, StepResult, Work
from redraft.core.testing import sequence, view, work
from redraft.core.tree import EMPTY, TokenTree
from redraft.draft.token_recycling import Recycler, TokenRecycling, cut, template
from redraft.errors import InvalidInput

V = 50
WIDE = Budget(80, 99)


def opened(vocab: int = V, **options: object) -> Recycler:
    return TokenRecycling(**options).open(SimpleNamespace(spec=SimpleNamespace(vocab=vocab)), None)  # type: ignore[arg-type]


def filled(vocab: int = V, k: int = 8) -> Recycler:
    """Row x holds x + 1, x + 2, ... modulo the vocabulary."""
    recycler = opened(vocab, k=k)
    width = recycler.matrix.shape[1]
    recycler.matrix[:] = (np.arange(vocab)[:, None] + np.arange(1, width + 1)) % vocab
    return recycler


def read(recycler: Recycler, token: int, budget: Budget = WIDE) -> TokenTree:
    (tree,) = recycler.propose([sequence([token])], [budget])
    return tree


def paths(tree: TokenTree) -> list[tuple[int, ...]]:
    return [tuple(tree.tokens[tree.path_to(i)].tolist()) for i in range(len(tree))]


def step(works: list[Work], trees: list[TokenTree], accepted: list[Accepted], top_k: np.ndarray | None = None) -> StepResult:
    """A step whose logit row r has top k 100 r, 100 r + 1, ..."""
    batch = Batch.pack(works, trees, view(works))
    rows = len(batch.logit_rows)
    if top_k is None:
        top_k = (100 * np.arange(rows)[:, None] + np.arange(8)).astype(np.int32)
    out: Any = SimpleNamespace(top_k=top_k)
    return StepResult(work=works, trees=trees, batch=batch, accepted=accepted, out=out, distribution=None)


# the template and its cuts


def test_levels_of_the_template() -> None:
    nodes = template()
    assert [sum(len(p) == d for p in nodes) for d in range(1, 8)] == [8, 21, 25, 15, 8, 3, 0]
    assert nodes == sorted(nodes, key=lambda p: (len(p), p)), "breadth first"


@pytest.mark.parametrize("width", [1, 3, 8])
@pytest.mark.parametrize("depth", [1, 2, 4, 6])
@pytest.mark.parametrize("rows", [1, 2, 7, 16, 40, 80])
def test_cuts_are_trees_with_ranks_from_zero(rows: int, depth: int, width: int) -> None:
    fits = [p for p in template() if len(p) <= depth and all(int(r) < width for r in p)]
    tree = read(filled(V, width), 0, Budget(rows, depth))
    assert len(tree) == min(rows, len(fits))
    assert tree.depths().max() <= depth
    ranks = {p: tuple(np.diff([0, *p]) - 1) for p in paths(tree)}  # in `filled`, the step from parent to child is rank + 1
    for path, rank in ranks.items():
        assert len(path) == 1 or path[:-1] in ranks
        assert rank[-1] == 0 or (*rank[:-1], rank[-1] - 1) in ranks.values(), "a kept node's left sibling is kept"


def test_a_cut_keeps_the_nodes_with_most_descendants() -> None:
    nodes = template()
    size = {p: sum(q.startswith(p) for q in nodes) for p in nodes}
    for rows in (4, 16, 33):
        expected = sorted(sorted(nodes, key=lambda p: (-size[p], len(p), p))[:rows], key=lambda p: (len(p), p))
        got = ["".join(str(b - a - 1) for a, b in zip((0, *p), p, strict=False)) for p in paths(read(filled(V), 0, Budget(rows, 99)))]
        assert got == expected
    assert read(filled(), 0, Budget(16, 99)).depths().max() == 4, "not the two levels of a cut by levels"
    assert cut(16, 6, 8) is cut(16, 6, 8), "made once"


# drafting


def test_reads_ranks_from_the_root_down() -> None:
    recycler = opened()
    recycler.matrix[5, :2] = [6, 7]
    recycler.matrix[6, :1] = [8]
    recycler.matrix[8, :1] = [5]
    tree = read(recycler, 5, Budget(16, 3))
    assert paths(tree) == [(6,), (7,), (6, 8), (6, 8, 5)]
    assert [tree.child(-1, 7), tree.child(0, 8), tree.child(1, 8)] == [1, 2, -1]
    assert len(tree.kinds) == 5


@pytest.mark.parametrize("budget", [Budget(0, 9), Budget(9, 0), Budget(9, -1)])
def test_no_budget_no_tree(budget: Budget) -> None:
    assert len(read(filled(), 0, budget)) == 0


def test_cold_proposes_nothing() -> None:
    assert len(read(opened(), 0)) == 0


@pytest.mark.parametrize("vocab", [1, 2, 5, 9])
def test_a_vocabulary_smaller_than_k(vocab: int) -> None:
    recycler = filled(vocab)
    assert recycler.taps.top_k == recycler.matrix.shape[1] == min(8, vocab)
    tree = read(recycler, 0)
    checked = TokenTree.build(tree.tokens.tolist(), tree.parents.tolist(), vocab=vocab, rows=80, depth=6)
    assert paths(checked) == paths(tree) and len(tree) >= 1


@pytest.mark.parametrize("known", [0.1, 0.5, 1.0])
def test_trees_are_what_the_checked_constructor_would_make(known: float) -> None:
    rng = np.random.default_rng(0)
    recycler = opened()
    recycler.matrix[:] = np.argsort(rng.random((V, V)), axis=1)[:, :8]
    recycler.matrix[rng.random(V) >= known] = -1
    recycler.matrix[::3, 4:] = -1
    seqs, budgets = [sequence([t]) for t in range(V)], [Budget(int(rng.integers(1, 81)), int(rng.integers(1, 8))) for _ in range(V)]
    for tree, budget in zip(recycler.propose(seqs, budgets), budgets, strict=True):
        checked = TokenTree.build(tree.tokens.tolist(), tree.parents.tolist(), vocab=V, rows=budget.rows, depth=budget.depth)
        assert checked.tokens.tolist() == tree.tokens.tolist() and checked.parents.tolist() == tree.parents.tolist()
        assert len(tree.kinds) == len(tree) + 1


# learning


def test_learns_from_root_and_all_nodes_and_from_nothing_else() -> None:
    recycler = opened()
    tree = TokenTree.build([10, 11, 12], [-1, -1, 0], vocab=V, rows=9, depth=9)
    recycler.observe(step([work([1, 2, 3], stored=2)], [tree], [Accepted((1,), (11, 20))]))
    assert {t: int(recycler.matrix[t, 0]) for t in (3, 10, 11, 12)} == {3: 0, 10: 100, 11: 200, 12: 300}
    untouched = np.ones(V, bool)
    untouched[[3, 10, 11, 12]] = False
    assert (recycler.matrix[untouched] == -1).all()


def test_after_the_commit_the_root_is_not_the_newest_token() -> None:
    recycler = opened()
    w = work([1, 2, 3], stored=2)
    result = step([w], [TokenTree.chain([10])], [Accepted((0,), (10, 20))])
    w.seq.advance(1, (10, 20), 1)
    recycler.observe(result)
    assert recycler.matrix[3, 0] == 0 and recycler.matrix[10, 0] == 100 and (recycler.matrix[20] == -1).all()


def test_colliding_writes_are_ordered() -> None:
    recycler = opened()
    # rows 1.. :                 7   8   7   9   7   9     7 at depths 1, 2, 3; 9 at depth 2 (rejected) and 3 (accepted)
    tree = TokenTree.build([7, 8, 7, 9, 7, 9], [-1, -1, 1, 0, 3, 2], vocab=V, rows=9, depth=9)
    recycler.observe(step([work([3])], [tree], [Accepted()]))
    assert recycler.matrix[7, 0] == 100 and recycler.matrix[9, 0] == 400, "nothing accepted: the shallowest wins"
    recycler.observe(step([work([3])], [tree], [Accepted((1, 2, 5), (8, 7, 9, 30))]))
    assert recycler.matrix[7, 0] == 300 and recycler.matrix[9, 0] == 600, "the accepted path wins"


def test_the_root_wins_over_its_own_token_on_the_path() -> None:
    recycler = opened()
    recycler.observe(step([work([3])], [TokenTree.chain([4, 3, 4])], [Accepted((0, 1, 2), (4, 3, 4, 9))]))
    assert recycler.matrix[3, 0] == 0 and recycler.matrix[4, 0] == 100


def test_a_tree_in_depth_first_order() -> None:
    """Another drafter's tree may not be breadth first; depth decides here too."""
    recycler = opened()
    tree = TokenTree.build([8, 7, 7], [-1, 0, -1], vocab=V, rows=9, depth=9)
    recycler.observe(step([work([3])], [tree], [Accepted()]))
    assert recycler.matrix[7, 0] == 300


def test_a_batch_of_chunk_decode_and_tree() -> None:
    recycler = opened()
    works = [work([11, 12, 13, 14], rows=3), work([21, 22], stored=1), work([31, 32], stored=1)]
    recycler.observe(step(works, [EMPTY, EMPTY, TokenTree.chain([40])], [Accepted(), Accepted((), (5,)), Accepted((), (6,))]))
    assert {t for t in range(V) if recycler.matrix[t, 0] >= 0} == {22, 32, 40}
    assert recycler.matrix[[22, 32, 40], 0].tolist() == [0, 100, 200]


def test_a_step_that_draws_nothing() -> None:
    recycler = opened()
    recycler.observe(step([work([11, 12, 13], rows=2)], [EMPTY], [Accepted()], top_k=np.zeros((0, 8), np.int32)))
    assert (recycler.matrix == -1).all()


def test_prompt_logprob_rows_teach_nothing() -> None:
    recycler = opened()
    recycler.observe(step([work([11, 12, 13], prompt_logprobs=0)], [EMPTY], [Accepted((), (5,))]))
    assert {t for t in range(V) if recycler.matrix[t, 0] >= 0} == {13}
    assert recycler.matrix[13, 0] == 200


def test_takes_its_own_k_where_another_part_asked_for_more() -> None:
    recycler = opened(k=2)
    recycler.observe(step([work([3])], [EMPTY], [Accepted((), (5,))]))
    assert recycler.matrix[3].tolist() == [0, 1]


def test_two_runs_in_the_same_order_learn_the_same() -> None:
    def run() -> np.ndarray:
        rng, recycler = np.random.default_rng(1), opened()
        for _ in range(30):
            seq = sequence([int(rng.integers(V))])
            trees = recycler.propose([seq], [Budget(16, 6)])
            path = tuple(trees[0].path_to(len(trees[0]) - 1))
            top_k = np.argsort(rng.random((len(trees[0]) + 1, V)), axis=1)[:, :8].astype(np.int32)
            recycler.observe(step([Work(seq, 1)], trees, [Accepted(path, (*trees[0].tokens[list(path)].tolist(), 0))], top_k))
        return recycler.matrix

    first = run()
    assert (first == run()).all() and (first >= 0).any()


# lifetime


def test_shared_by_all_sequences_and_restored() -> None:
    recycler = opened()
    cold = recycler.snapshot()
    recycler.observe(step([work([3])], [EMPTY], [Accepted((), (5,))]))
    recycler.begin(sequence([3]))
    recycler.end(None)
    assert len(read(recycler, 3, Budget(16, 1))) == 8
    hot = recycler.snapshot()
    recycler.restore(cold)
    assert len(read(recycler, 3)) == 0
    recycler.observe(step([work([4])], [EMPTY], [Accepted((), (5,))]))
    recycler.restore(hot)
    assert recycler.matrix[3, 0] == 0 and (recycler.matrix[4] == -1).all(), "a snapshot does not change with the matrix"


def test_saved_and_loaded(tmp_path: Path) -> None:
    recycler = filled()
    recycler.matrix[4] = -1
    recycler.save(tmp_path / "m.safetensors")
    assert (opened(path=tmp_path / "m.safetensors").matrix == recycler.matrix).all()


def test_unusable_files(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    with pytest.raises(InvalidInput, match=r"cannot be read \(No such file"):
        opened(path=path)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(InvalidInput, match="not a safetensors file"):
        opened(path=path)
    filled().save(path)
    with pytest.raises(InvalidInput, match=r"made for a vocabulary of 50 and k=8, here they are 60 and 8$"):
        opened(60, path=path)
    with pytest.raises(InvalidInput, match=r"here they are 50 and 4$"):
        opened(k=4, path=path)
    for damaged in ([V] + [-1] * 7, [-2] + [-1] * 7, [3, 4, 3] + [-1] * 5):
        matrix = np.full((V, 8), -1, np.int32)
        matrix[7] = damaged
        path.write_bytes(safetensors.numpy.save({"successors": matrix}))
        with pytest.raises(InvalidInput, match="damaged"):
            opened(path=path)
    for tensors in ({"other": matrix}, {"successors": matrix.astype(np.float32)}, {"successors": matrix[0].copy()}):
        path.write_bytes(safetensors.numpy.save(tensors))
        with pytest.raises(InvalidInput, match="no integer matrix"):
            opened(path=path)
    with pytest.raises(InvalidInput, match="cannot be written"):
        filled().save(tmp_path / "none" / "m.safetensors")


@pytest.mark.parametrize("k", [0, 9])
def test_k_is_checked(k: int) -> None:
    with pytest.raises(InvalidInput, match=f"^token-recycling:k={k}: must be 1 to 8"):
        TokenRecycling(k=k)
