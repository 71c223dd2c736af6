from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise, product
from pathlib import Path
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.numpy

from redraft.core.noise import Stream, key, uniform
from redraft.core.plan import Budget
from redraft.core.sequence import Sequence
from redraft.core.testing import sequence
from redraft.core.tree import Kind, TokenTree
from redraft.draft.aded import ADED, Row, TriGrams
from redraft.errors import InvalidInput
from tests.contracts import plain
from tests.contracts.identity import SAMPLING, Condition, check, expected, prompts

V = 50
WIDE = Budget(64, 99)
TEXT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2, 6, 4]


def opened(vocab: int = V, **options: object) -> TriGrams:
    return ADED(**options).open(SimpleNamespace(spec=SimpleNamespace(vocab=vocab)), None)  # type: ignore[arg-type]


def random_table(drafter: TriGrams, seed: int, letters: int, widest: int, known: float = 1.0, step: float = 0.0) -> None:
    """A table of weights for pairs of the first `letters` tokens: random numbers up to 3, or multiples of `step`."""
    dice = Random(seed)
    for pair in product(range(letters), repeat=2):
        if dice.random() < known:
            row = dice.sample(range(letters), dice.randint(1, min(widest, letters)))
            drafter.table[pair] = {c: step * dice.randint(1, 75) if step else dice.uniform(0.01, 3) for c in row}


def draft(drafter: TriGrams, tokens: list[int], budget: Budget = WIDE, **params: object) -> TokenTree:
    (tree,) = drafter.propose([sequence(tokens, **params)], [budget])
    tree.check(vocab=drafter.vocab, rows=max(0, budget.rows), depth=max(0, budget.depth))
    return tree


def paths(tree: TokenTree) -> list[tuple[int, ...]]:
    return [tuple(tree.tokens[tree.path_to(i)].tolist()) for i in range(len(tree))]


# the search again, written as in the paper: slow and without shared lists


class Node:
    def __init__(self, u: int, v: int, weight: float, parent: Node | None = None) -> None:
        self.u, self.v, self.weight, self.parent = u, v, weight, parent
        self.score, self.visits = 0.0, 0
        self.children: list[Node] = []

    def bound(self, parent: Node, c1: float, c2: float) -> float:
        if not self.visits:
            return math.inf
        pull = (c1 + math.log((parent.visits + c2 + 1) / c2)) * self.weight * math.sqrt(parent.visits) / (1 + self.visits)
        return self.score / self.visits + pull


def reference(drafter: TriGrams, tokens: list[int], noise: Iterator[float]) -> tuple[list[Node], list[tuple[int, ...]]]:
    """All search nodes in order of creation, and the sequences, the most visited first."""
    method, table = drafter.method, drafter.table
    root = Node(tokens[-2], tokens[-1], 0)
    made, way = [root], {root: ()}
    for _ in range(method.iterations):
        path = [root]
        while path[-1].children and len(path) < method.length:
            path.append(max(path[-1].children, key=lambda child: child.bound(path[-1], method.c1, method.c2)))
        last = path[-1]
        if len(path) < method.length and not last.children and (last.u, last.v) in table:
            last.children = [Node(last.v, w, weight, last) for w, weight in table[last.u, last.v].items()]
            for child in last.children:
                way[child] = (*way[last], child.v)
            made += last.children
            path.append(last.children[-1])
        pairs = [(node.u, node.v) for node in path]
        while len(pairs) < method.length and pairs[-1] in table:
            row = table[pairs[-1]]
            left = next(noise) * sum(row.values())
            at = 0
            while left >= (weight := list(row.values())[at]):
                left, at = left - weight, at + 1
            pairs.append((pairs[-1][1], list(row)[at]))
        score = 1 + sum(table.get(before, {}).get(after[1], 0.0) for before, after in pairwise(pairs))
        for node in path:
            node.score, node.visits = node.score + score, node.visits + 1
    most = sorted(made, key=lambda node: -node.visits)[: method.sequences]
    found = []
    for node in most:
        row = table.get((node.u, node.v), {})
        found.append((*way[node], *([max(row, key=lambda w: row[w])] if row else [])))
    return made, found


def noise_of(seq: Sequence) -> Iterator[float]:
    return iter(uniform(key(seq.seed, Stream.DRAFT, len(seq.tokens)), np.arange(1000)).tolist())


def merged(found: list[tuple[int, ...]], budget: Budget) -> set[tuple[int, ...]]:
    """The sequences and their prefixes, in order, until the budget is used up."""
    nodes: dict[tuple[int, ...], None] = {}
    for path in found:
        for end in range(1, len(path) + 1):
            if len(nodes) < budget.rows and end <= budget.depth and (end == 1 or path[: end - 1] in nodes):
                nodes.setdefault(path[:end])
    return set(nodes)


@pytest.mark.parametrize("options", [{}, {"c1": 1.0, "c2": 2.0}, {"length": 2}, {"length": 6, "sequences": 9}, {"iterations": 7}], ids=str)
@pytest.mark.parametrize("table", [(12, 12, 1.0, 0.0), (9, 3, 0.6, 0.0), (20, 2, 0.9, 0.04), (4, 4, 1.0, 0.04)], ids=str)
def test_the_search_is_the_papers(table: tuple[int, int, float, float], options: dict[str, object]) -> None:
    letters, widest, known, step = table
    met = 0
    for seed in range(4):
        drafter = opened(increment=0, **options)
        random_table(drafter, seed, letters, widest, known, step)
        seq = sequence([Random(seed).randrange(letters) for _ in range(5)], seed=seed)
        made, found = reference(drafter, seq.tokens, noise_of(seq))
        if (seq.tokens[-2], seq.tokens[-1]) not in drafter.table:
            continue
        tokens, parents, visits = drafter.search((seq.tokens[-2], seq.tokens[-1]), noise_of(seq))
        assert (tokens, visits) == ([node.v for node in made], [node.visits for node in made])
        assert [made[parent] for parent in parents[1:]] == [node.parent for node in made[1:]]
        for budget in (WIDE, Budget(16, 99), Budget(5, 3), Budget(16, 1)):
            assert set(paths(draft(drafter, seq.tokens, budget, seed=seed))) == merged(found, budget)
        met += len(made) > 1
    assert met, "no table had anything to search"


def test_visits_follow_weights_and_the_most_visited_stay() -> None:
    drafter = opened(increment=0)
    drafter.table[0, 1] = {2: 0.1, 3: 2.0, 4: 0.5}
    drafter.table[1, 3] = {5: 1.0, 6: 0.3}
    tree = paths(draft(drafter, [0, 1]))
    assert tree[:2] == [(3,), (3, 5)] and set(tree) == {(2,), (3,), (4,), (3, 5), (3, 6)}
    assert set(paths(draft(drafter, [0, 1], Budget(3, 9)))) < set(tree)
    assert set(paths(draft(drafter, [0, 1], Budget(64, 1)))) == {(2,), (3,), (4,)}


def test_the_last_token_is_the_heaviest_successor_and_no_deeper_than_length() -> None:
    drafter = opened(increment=0)
    for a in range(9):
        drafter.table[a, a + 1] = {a + 2: 1.0}
    assert paths(draft(drafter, [0, 1])) == [(2,), (2, 3), (2, 3, 4), (2, 3, 4, 5)]
    drafter.table[3, 4] = {7: 0.2, 8: 0.4, 9: 0.3}
    assert paths(draft(drafter, [0, 1]))[-1] == (2, 3, 4, 8)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("budget", [Budget(1, 1), Budget(4, 2), Budget(16, 3), Budget(16, 99), Budget(64, 99)], ids=str)
def test_depth_and_nodes_are_bounded(budget: Budget, length: int) -> None:
    drafter = opened(increment=0, length=length)
    random_table(drafter, 1, 12, 12)
    tree = draft(drafter, [3, 4], budget)
    assert 1 <= tree.depths().max() <= min(length, budget.depth)
    assert len(tree) <= 2 * 24 - 1
    assert (tree.kinds == Kind.FIXED).all()
    if budget.depth > 3 and length > 2:
        assert tree.depths().max() >= 3 and (len(tree) == 16 if budget.rows == 16 else len(tree) > 24)


@pytest.mark.parametrize("budget", [Budget(0, 9), Budget(9, 0), Budget(9, -1)])
def test_no_budget_no_tree_and_nothing_learned(budget: Budget) -> None:
    drafter = opened()
    assert len(draft(drafter, TEXT, budget)) == 0 and not drafter.table


def test_nothing_known_nothing_drafted() -> None:
    idle = opened(iterations=0)
    for _ in range(5):
        assert len(draft(idle, [1, 2, 1, 2, 1, 2])) == 0
    assert len(draft(opened(increment=0), TEXT)) == 0
    for text in ([], [1], [1, 2], TEXT[:9]):
        assert len(draft(opened(), text)) == 0, "no pair of these texts was seen before"
    assert paths(draft(opened(), [1, 2, 3, 1, 2]))[-1] == (3, 1, 2, 3), "this one was"


# learning


def test_weights_are_initial_plus_increments_up_to_the_cap() -> None:
    drafter = opened()
    drafter.table[3, 1] = {4: 0.5}
    for n in range(1, 80):
        draft(drafter, [3, 1, 4, 8])
        assert drafter.table[3, 1][4] == pytest.approx(min(3.0, 0.5 + 0.04 * n))
        assert drafter.table[1, 4] == {8: pytest.approx(min(3.0, 0.04 * n))}
    assert drafter.table[3, 1][4] == drafter.table[1, 4][8] == 3.0


def test_learns_from_the_last_16_tokens_of_each_text_as_often_as_a_tri_gram_occurs() -> None:
    drafter = opened()
    draft(drafter, TEXT)
    recent = TEXT[-16:]
    assert set(drafter.table) == set(pairwise(recent[:-1]))
    draft(drafter, [11, 12, 13, 11, 12, 13])
    assert drafter.table[11, 12][13] == pytest.approx(0.08)
    assert drafter.table[13, 11] == {12: pytest.approx(0.04)}


def test_other_options_of_learning() -> None:
    drafter = opened(increment=0.5, cap=0.75, window=3)
    draft(drafter, [1, 2, 3, 4])
    assert drafter.table == {(2, 3): {4: 0.5}}
    draft(drafter, [1, 2, 3, 4])
    assert drafter.table == {(2, 3): {4: 0.75}}
    draft(still := opened(increment=0), TEXT)
    assert not still.table


def test_a_full_pair_gives_up_its_lightest_successor() -> None:
    drafter = opened(successors=3)
    drafter.table[1, 2] = {5: 0.3, 6: 0.1, 7: 0.2}
    draft(drafter, [1, 2, 8])
    assert drafter.table[1, 2] == {5: 0.3, 7: 0.2, 8: pytest.approx(0.04)}
    draft(drafter, [1, 2, 9])
    assert list(drafter.table[1, 2]) == [5, 7, 9], "it never outweighs the new one for good"


def test_a_full_table_gives_up_what_it_learned_of_longest_ago() -> None:
    drafter = opened(keys=2)
    for text in ([1, 2, 3], [4, 5, 6], [1, 2, 7], [8, 9, 10]):
        draft(drafter, text)
        assert len(drafter.table) <= 2
    assert list(drafter.table) == [(1, 2), (8, 9)]


# same state, same seed, same tree


def test_trees_are_a_function_of_table_seed_and_position() -> None:
    def tree(seed: int, tokens: list[int]) -> list[tuple[int, ...]]:
        drafter = opened(increment=0, c1=0.01, iterations=40)
        random_table(drafter, 3, 12, 12)
        return paths(draft(drafter, tokens, seed=seed))

    assert tree(7, [1, 2]) == tree(7, [1, 2])
    assert len({tuple(tree(seed, [1, 2])) for seed in range(8)}) > 1, "rollouts are drawn"
    assert len({tuple(tree(7, [0] * n + [1, 2])) for n in range(8)}) > 1, "anew at each position"


def test_children_stand_in_order_of_insertion() -> None:
    """Integers hash to themselves, so a set or a sorted row would reverse this order."""
    drafter = opened(increment=0)
    drafter.table[0, 1] = dict.fromkeys((40, 8, 16, 0, 33), 1.0)
    tokens, _, _ = drafter.search((0, 1), iter([0.5] * 1000))
    assert tokens[1:6] == [40, 8, 16, 0, 33]
    again = opened(increment=0)
    again.restore(drafter.snapshot())
    assert paths(draft(again, [0, 1])) == paths(draft(drafter, [0, 1]))


def test_one_table_for_all_and_nothing_per_text() -> None:
    drafter = opened()
    first, second = sequence([1, 2, 3, 9]), sequence([1, 2])
    assert drafter.begin(first) is None and drafter.fork(None, second) is None
    drafter.end(None)
    trees = drafter.propose([first, second], [WIDE, WIDE])
    assert [paths(tree) for tree in trees] == [[], [(3,), (3, 9)]], "the second text drafts what the first one taught"


def test_snapshots_do_not_change_with_the_table() -> None:
    drafter = opened()
    cold = drafter.snapshot()
    draft(drafter, [1, 2, 3])
    hot = drafter.snapshot()
    draft(drafter, [1, 2, 3])
    drafter.restore(hot)
    assert drafter.table == {(1, 2): {3: 0.04}}
    draft(drafter, [1, 2, 3])
    drafter.restore(hot)
    assert drafter.table == {(1, 2): {3: 0.04}}
    drafter.restore(cold)
    assert not drafter.table and len(draft(drafter, [1, 2])) == 0


# tables made beforehand


def test_a_corpus_is_counted_and_normalised() -> None:
    drafter = opened(successors=2)
    drafter.prefill([[1, 2, 3, 1, 2, 3, 1, 2, 4, 1, 2, 5], [1, 2, 4, 7]])
    assert drafter.table[1, 2] == {3: 2 / 5, 4: 2 / 5}
    assert drafter.table[2, 4] == {1: 1 / 2, 7: 1 / 2}
    assert list(drafter.table)[-1] == (1, 2), "what occurs most is given up last"
    small = opened(keys=2)
    small.prefill([[1, 2, 3, 1, 2, 3, 1, 2, 4], [9, 8, 7]])
    assert set(small.table) == {(1, 2), (2, 3)}


def rows(drafter: TriGrams) -> list[tuple[tuple[int, int], list[tuple[int, float]]]]:
    return [(pair, list(row.items())) for pair, row in drafter.table.items()]


def test_saved_and_loaded(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    opened().save(path)
    assert not opened(path=path).table
    drafter = opened()
    random_table(drafter, 2, 8, 12, known=0.5)
    drafter.learn(TEXT)
    drafter.save(path)
    assert rows(opened(path=path)) == rows(drafter), "order and every bit"
    narrow = opened(path=path, successors=2)
    kept: dict[tuple[int, int], Row] = dict(narrow.table)
    for pair, row in drafter.table.items():
        assert sorted(kept[pair].values()) == sorted(row.values())[-2:] and kept[pair].items() <= row.items()


def test_unusable_files(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    with pytest.raises(InvalidInput, match=r"cannot be read \(No such file"):
        opened(path=path)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(InvalidInput, match="not a safetensors file"):
        opened(path=path)
    drafter = opened()
    drafter.learn(TEXT)
    drafter.save(path)
    with pytest.raises(InvalidInput, match=r"made for a vocabulary of 50, here it is 60$"):
        opened(60, path=path)
    with pytest.raises(InvalidInput, match=rf"contains {len(drafter.table)} pairs, but keys = 3"):
        opened(keys=3, path=path)
    with pytest.raises(InvalidInput, match="cannot be written"):
        drafter.save(tmp_path / "none" / "t.safetensors")

    good = {"trigrams": np.array([[1, 2, 3], [1, 2, 4]], np.int32), "weights": np.array([0.5, 0.5]), "vocab": np.array([V])}

    def refused(match: str, **changed: np.ndarray) -> None:
        path.write_bytes(safetensors.numpy.save({**good, **changed}))
        with pytest.raises(InvalidInput, match=match):
            opened(path=path)

    for token in (-1, V):
        refused("has an id outside 0..49", trigrams=np.array([[1, 2, 3], [1, token, 4]], np.int32))
    refused("occurs twice", trigrams=np.array([[1, 2, 3], [1, 2, 3]], np.int32))
    for weight in (0.0, -1.0, math.nan, math.inf):
        refused("a weight is not a positive number", weights=np.array([0.5, weight]))
    no = "no tri-grams with weights"
    refused(no, trigrams=good["trigrams"].astype(np.int64))
    refused(no, trigrams=good["trigrams"][:1].copy())
    refused(no, trigrams=np.array(1, np.int32))
    refused(no, weights=np.array(0.5))
    refused(no, weights=good["weights"].astype(np.float32))
    refused(no, vocab=np.array([V, V]))
    path.write_bytes(safetensors.numpy.save({"other": good["weights"]}))
    with pytest.raises(InvalidInput, match=no):
        opened(path=path)
    header = b'{"w":{"dtype":"BF16","shape":[1],"data_offsets":[0,2]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    with pytest.raises(InvalidInput, match="not a safetensors file of tri-grams"):
        opened(path=path)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("increment", -0.1, "0 or more"), ("increment", math.nan, "0 or more"), ("cap", 0.0, "above 0"), ("window", 2, "3 or more"),
        ("iterations", -1, "0 or more"), ("length", 0, "1 or more"), ("sequences", 0, "1 or more"), ("successors", 0, "1 or more"),
        ("c1", math.inf, "0 or more"), ("c2", 0.0, "above 0"), ("keys", 0, "1 or more"),
    ],
)  # fmt: skip
def test_options_are_checked(name: str, value: float, allowed: str) -> None:
    with pytest.raises(InvalidInput, match=f"^aded:{name}={value}: must be {allowed}"):
        ADED(**{name: value})  # type: ignore[arg-type]


# in the engine


@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize(("chunk", "arrivals", "pool"), [(512, (0,), 40), (24, (0, 3, 0, 5), 40), (24, (0, 1, 0, 1, 0, 0), 5)])
def test_the_text_is_the_definitions_from_a_table_that_knows_it(
    sampling: str, chunk: int, arrivals: tuple[int, ...], pool: int, tmp_path: Path
) -> None:
    """A random model rarely repeats itself, so the table is filled with its texts and as many wrong tri-grams."""
    drafter, dice = opened(plain.VOCAB), Random(3)
    right = [[*prompt, *expected(None, prompt, sampling, 100 + i)] for i, prompt in enumerate(prompts())]
    wrong = [[token if dice.random() < 0.6 else dice.randrange(plain.VOCAB) for token in text] for text in right]
    drafter.prefill([*right, *wrong])
    drafter.save(tmp_path / "t.safetensors")
    seen = check(Condition(f"aded:path={tmp_path / 't.safetensors'}", sampling, chunk=chunk, arrivals=arrivals, pool=pool))
    assert seen.accepted and seen.rejected


@pytest.mark.parametrize("options", ["", ":iterations=0", ":increment=3,c1=0"])
def test_the_text_is_the_definitions_from_an_empty_table(options: str) -> None:
    seen = check(Condition(f"aded{options}", "sampled", arrivals=(0, 0, 2), chunk=24))
    assert (seen.accepted + seen.rejected > 0) == (options != ":iterations=0")
