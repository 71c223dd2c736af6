from __future__ import annotations

from collections.abc import Sequence as Seq
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from redraft import registry
from redraft.core.noise import Stream
from redraft.core.plan import Budget
from redraft.core.sequence import Request
from redraft.core.testing import sequence
from redraft.core.tree import EMPTY, Kind, TokenTree
from redraft.draft.drafter import OpenDrafter, Stateless
from redraft.draft.union import SURE, Merger, Union, confidence, merge
from redraft.engine.engine import Engine
from redraft.errors import InvalidInput, UnknownMethod, Unsupported
from tests.contracts.drafters import RandomTrees
from tests.contracts.identity import SAMPLING, Condition, check, drive, engine, expected, opened_by_name, prompts

V = 9
MIXED = (0, 3, 0, 5, 9, 11)
CROWD = (0, 1, 0, 1, 0, 0)
TARGET: Any = SimpleNamespace(drafts=Stream.TARGET)

Path = tuple[int, ...]


def tree(*paths: Path, scores: Seq[float] | None = None) -> TokenTree:
    """A node for each path, in this order; a parent's path comes before its children's."""
    place = {(): -1, **{path: i for i, path in enumerate(paths)}}
    tokens = np.array([path[-1] for path in paths], np.int32)
    parents = np.array([place[path[:-1]] for path in paths], np.int32)
    return TokenTree(tokens, parents, np.zeros(len(paths) + 1, np.uint8), scores=None if scores is None else np.array(scores, np.float32))


def paths(found: TokenTree) -> list[Path]:
    return [tuple(found.tokens[found.path_to(node)].tolist()) for node in range(len(found))]


def scored(found: TokenTree) -> dict[Path, float]:
    assert found.scores is not None
    return dict(zip(paths(found), found.scores.tolist(), strict=True))


def random_tree(dice: Random) -> TokenTree:
    nodes = dice.randrange(12)
    tokens = [dice.randrange(V) for _ in range(nodes)]
    parents = [dice.randrange(-1, i) for i in range(nodes)]
    found = TokenTree.build(tokens, parents, vocab=V, rows=99, depth=99)
    if dice.random() < 0.5:
        return found
    scores = np.ones(len(found), np.float32)
    for node, parent in enumerate(found.parents.tolist()):
        scores[node] = dice.choice([0.2, 0.9, 1.0]) * (scores[parent] if parent >= 0 else 1)
    return TokenTree(found.tokens, found.parents, found.kinds, scores=scores)


# ---- the merge


def test_equal_paths_are_one_node_of_the_first_who_proposed_it() -> None:
    merged = merge([tree((1,), (1, 2), (1, 2, 3)), tree((4,), (1,), (1, 5), (1, 2)), EMPTY, tree((2,))], 99)
    origins = dict(zip(paths(merged), merged.origins.tolist(), strict=True))  # type: ignore[union-attr]
    assert origins == {(1,): 0, (1, 2): 0, (1, 2, 3): 0, (4,): 1, (1, 5): 1, (2,): 3}
    assert merged.origins is not None
    assert merged.origins.dtype == np.uint16


def test_confidence_is_the_trees_own_or_shared_out_among_siblings() -> None:
    rest = 1 - SURE
    assert confidence(tree((1,), (2,), (1, 3), (3,), (1, 4), (2, 5))) == pytest.approx(
        [SURE, SURE * rest, SURE**2, SURE * rest**2, SURE**2 * rest, SURE**2 * rest]
    )
    assert confidence(tree((1,), (1, 2), (3,), scores=[0.5, 0.25, 0.75])) == [0.5, 0.25, 0.75]
    assert confidence(tree((1,), (1, 2), scores=[0.5, 0.75])) == [0.5, 0.5], "no node scores above its parent"


def test_what_two_propose_scores_higher() -> None:
    both = scored(merge([tree((1,), (2,), scores=[0.5, 0.6]), tree((1,), scores=[0.4])], 99))
    assert both == pytest.approx({(1,): 0.7, (2,): 0.6})


def test_the_best_nodes_stay_and_of_equal_ones_the_first() -> None:
    parts = [tree((1,), (1, 2), (1, 2, 3), scores=[0.9, 0.5, 0.1]), tree((4,), (4, 5), scores=[0.5, 0.3])]
    for rows, kept in enumerate([[], [(1,)], [(1,), (1, 2)], [(1,), (1, 2), (4,)], [(1,), (1, 2), (4,), (4, 5)]]):
        assert paths(merge(parts, rows)) == kept


@pytest.mark.parametrize("seed", range(8))
def test_merged_trees_are_whole_and_within_the_budget(seed: int) -> None:
    dice = Random(seed)
    for _ in range(40):
        parts = [random_tree(dice) for _ in range(dice.randrange(2, 4))]
        whole = merge(parts, 99)
        assert set(paths(whole)) == {path for part in parts for path in paths(part)}
        rows = dice.randrange(20)
        cut = merge(parts, rows)
        cut.check(vocab=V, rows=rows, depth=99)
        assert len(cut) == min(rows, len(whole))
        assert not cut.kinds.any()
        kept, every = scored(cut) if len(cut) else {}, scored(whole) if len(whole) else {}
        assert all(every[path] == score for path, score in kept.items())
        assert max((score for path, score in every.items() if path not in kept), default=0) <= min(kept.values(), default=1)


def test_every_part_is_asked_with_the_whole_budget() -> None:
    asked = []

    class Asked(Stateless):
        def propose(self, seqs: Any, budgets: Any) -> list[TokenTree]:
            asked.append(list(budgets))
            return [EMPTY] * len(seqs)

    budgets = [Budget(7, 3), Budget(0, 0)]
    found = Merger(["a", "b"], [Asked(), Asked()], TARGET).propose([sequence([1]), sequence([2])], budgets)
    assert asked == [budgets, budgets]
    assert [len(one) for one in found] == [0, 0]


# ---- what is refused


@pytest.mark.parametrize("parts", ["", "copyspec", "(copyspec:gamma=2)", "+copyspec+"])
def test_two_parts_are_needed(parts: str) -> None:
    with pytest.raises(InvalidInput, match=r"^union:parts=.*: must be two or more drafters joined by \+$"):
        Union(parts)


def test_wrong_parts_are_reported_at_once() -> None:
    with pytest.raises(UnknownMethod, match="no draft method 'copyspek'"):
        Union("copyspek+none")
    with pytest.raises(UnknownMethod, match="unknown option 'gama' of copyspec"):
        Union("(copyspec:gama=2)+none")
    with pytest.raises(InvalidInput, match=r"^copyspec:gamma=0"):
        Union("(copyspec:gamma=0)+none")
    with pytest.raises(InvalidInput, match="parentheses do not match"):
        Union("(copyspec+none")


def test_options_and_unions_nest() -> None:
    made = registry.create("draft", "union:parts=(union:parts=(copyspec:gamma=2,block=4)+(token-recycling:k=3))+(copyspec:gamma=5)")
    merger = made.open(SimpleNamespace(spec=SimpleNamespace(vocab=V)), TARGET)
    inner, last = merger.parts
    assert (inner.parts[0].gamma, inner.parts[0].block, inner.parts[1].taps.top_k, last.gamma) == (2, 4, 3, 5)
    assert merger.taps.top_k == 3


class SamplingDrafter(Stateless):
    kinds = frozenset({Kind.FIXED, Kind.IID})

    def propose(self, seqs: Any, budgets: Any) -> list[TokenTree]:
        return [EMPTY] * len(seqs)


def test_drawn_children_need_a_verifier_that_tosses_no_coins() -> None:
    fixed = RandomTrees(V)
    with pytest.raises(Unsupported, match=r"^union: spectr samples children \(IID\); .* only verifier coupled"):
        Merger(["random", "spectr"], [fixed, SamplingDrafter()], SimpleNamespace(drafts=Stream.DRAFT))  # type: ignore[arg-type]
    assert Merger(["random", "spectr"], [fixed, SamplingDrafter()], TARGET).kinds == {Kind.FIXED}
    assert Merger(["a", "b"], [fixed, fixed], SimpleNamespace(drafts=Stream.DRAFT)).kinds == {Kind.FIXED}  # type: ignore[arg-type]


# ---- the engine


@pytest.mark.parametrize("sampling", SAMPLING)
def test_the_text_is_the_definitions(sampling: str) -> None:
    for options in ({"arrivals": MIXED}, {"arrivals": CROWD, "chunk": 24, "pool": 5}):
        seen = check(Condition("union", sampling, **options))  # type: ignore[arg-type]
        assert seen.accepted
        assert seen.rejected
        assert bool(seen.preempted) == ("pool" in options)


def joined(made: Engine, *parts: OpenDrafter) -> tuple[Engine, Merger]:
    """An engine like `made` with the union of `parts` as its drafter."""
    merger = Merger([type(part).__name__ for part in parts], parts, made.sampler)
    return Engine(made.runner, made.scheduler, merger, made.verifier.own, made.sampler, max_model_len=128), merger


@pytest.mark.parametrize("pool", [40, 5])
@pytest.mark.parametrize("sampling", SAMPLING)
def test_with_a_second_model_and_trees_that_know_the_text(sampling: str, pool: int) -> None:
    truth = {str(i): list(expected(None, prompt, sampling, 100 + i)) for i, prompt in enumerate(prompts())}
    plain = engine(pool=pool, chunk=24)
    second = opened_by_name("rsd-s", plain.runner, plain.sampler)
    oracle = RandomTrees(24, seed=3, right=0.5, known={(name, 0): text for name, text in truth.items()})
    made, _ = joined(plain, second, oracle)
    requests = [Request(str(i), list(prompt), SAMPLING[sampling].but(seed=100 + i)) for i, prompt in enumerate(prompts())]
    seen = drive(made, requests, CROWD)
    assert seen.texts == truth
    assert seen.accepted > 26
    assert bool(seen.preempted) == (pool == 5)
    table = second.memory.paged.table  # type: ignore[attr-defined]
    table.check()
    assert table.used() == 0


def test_parts_learn_from_the_steps_of_the_union() -> None:
    made, merger = joined(engine(), *(opened_by_name(name, engine().runner, engine().sampler) for name in ("none", "token-recycling")))
    drive(made, [Request("0", list(prompts()[0]), SAMPLING["greedy"].but(seed=100))], [0])
    assert merger.snapshot()[0] is None
    assert (merger.snapshot()[1] >= 0).any()


def test_fixed_parts_stand_before_a_verifier_that_tosses_coins() -> None:
    prompt = prompts()[0]
    seen = drive(engine("union", verify="rejection"), [Request("0", list(prompt), SAMPLING["sampled"].but(seed=100))], [0])
    assert seen.texts["0"] == list(expected(None, prompt, "sampled", 100))
    assert seen.accepted


class Bang(Stateless):
    """Raises where the test says so, and counts the open states."""

    def __init__(self, where: str = "") -> None:
        self.where, self.open = where, 0

    def begin(self, seq: Any) -> None:
        if self.where == "begin":
            raise ValueError("bang")
        self.open += 1

    def end(self, state: Any) -> None:
        self.open -= 1

    def propose(self, seqs: Any, budgets: Any) -> list[TokenTree]:
        if self.where == "propose":
            raise ValueError("bang")
        return [TokenTree.chain([1, 99])] * len(seqs) if self.where == "absurd" else [EMPTY] * len(seqs)


@pytest.mark.parametrize("where", ["begin", "propose", "absurd"])
def test_a_part_at_fault_hurts_no_text(where: str) -> None:
    sound = Bang()
    made, _ = joined(engine(), sound, Bang(where))
    prompt = prompts()[0]
    made.add(Request("0", list(prompt), SAMPLING["greedy"].but(seed=100)))
    text, fault = [], ""
    while made.has_work:
        for event in made.step():
            text += event.tokens
            fault = event.stats.fault
    assert text == list(expected(None, prompt, "greedy", 100))
    assert fault.startswith("Merger: ValueError")
    assert sound.open == 0
