"""If a drafter raises or returns an invalid tree, its request continues without drafts, and the statistics say so."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from redraft.core.plan import Budget, StepResult
from redraft.core.sequence import Request, Sequence
from redraft.core.tree import EMPTY, Kind, TokenTree
from redraft.draft.drafter import Stateless
from redraft.engine.engine import Engine
from redraft.engine.output import checked
from tests.contracts import plain
from tests.contracts.drafters import RandomTrees
from tests.contracts.identity import engine
from tests.engine.spelling import PROMPT, truth
from tests.engine.test_plugins import SAMPLED

TEXTS = {str(i): truth(SAMPLED, PROMPT[i:], new=30) for i in range(4)}
KNOWN = {(name, 0): text for name, text in TEXTS.items()}
CULPRIT = "2"


def wrong(tokens: Seq[int], parents: Seq[int], kind: Kind = Kind.FIXED, scores: Seq[float] | None = None) -> TokenTree:
    kinds, chances = np.full(len(tokens) + 1, kind, np.uint8), None if scores is None else np.array(scores, np.float32)
    return TokenTree(np.array(tokens, np.int32), np.array(parents, np.int32), kinds, scores=chances)


ABSURD: dict[str, Any] = {
    "100,000 nodes": wrong([3] * 100_000, range(-1, 99_999)),
    "a cycle": wrong([1, 2, 3], [2, 0, 1]),
    "its own parent": wrong([1], [0]),
    "a parent before the root": wrong([1], [-2]),
    "an unknown token": wrong([1, plain.VOCAB], [-1, 0]),
    "a negative token": wrong([-1], [-1]),
    "equal siblings": wrong([4, 4], [-1, -1]),
    "too deep": wrong([1] * 60, range(-1, 59)),
    "sampled children undeclared": wrong([1], [-1], Kind.IID),
    "log-probabilities": wrong([1, 2], [-1, 0], scores=[-0.1, -2.0]),
    "a score that is no number": wrong([1], [-1], scores=[float("nan")]),
    "a score too many": wrong([1], [-1], scores=[0.5, 0.5]),
    "a vector of another width": replace(wrong([0], [-1]), vectors=np.zeros((1, 5), np.float32)),
    "more vectors than nodes": replace(wrong([0], [-1]), vectors=np.zeros((2, 32), np.float32)),
    "no tree": None,
    "arrays of other lengths": TokenTree(np.array([1, 2], np.int32), np.array([-1], np.int32), np.zeros(3, np.uint8)),
    "no integers": TokenTree(np.array([1.5]), np.array([-1], np.int32), np.zeros(2, np.uint8)),  # type: ignore[arg-type]
}


class Saboteur(Stateless):
    """Right for all requests but one. For that one it does `deed` from its `call`-th proposal on."""

    def __init__(self, deed: Any, call: int) -> None:
        self.inner, self.deed, self.call = RandomTrees(plain.VOCAB, seed=4, right=0.8, known=KNOWN), deed, call
        self.calls = 0
        self.began: list[str] = []
        self.ended: list[str] = []

    def propose(self, seqs: Seq[Sequence], budgets: Seq[Budget]) -> list[TokenTree]:
        trees = self.inner.propose(seqs, budgets)
        for i, (seq, budget) in enumerate(zip(seqs, budgets, strict=True)):
            if seq.request.id == CULPRIT and min(budget) > 0:
                self.calls += 1
                if self.calls >= self.call:
                    if isinstance(self.deed, Exception):
                        raise self.deed
                    trees[i] = self.deed
        return trees

    def begin(self, seq: Sequence) -> str:
        self.began.append(seq.request.id)
        return seq.request.id

    def end(self, state: str) -> None:
        self.ended.append(state)


def run(made: Engine, count: int = 4) -> tuple[dict[str, list[int]], dict[str, Any]]:
    reported: dict[str, list[int]] = {}
    stats: dict[str, Any] = {}
    for i in range(count):
        made.add(Request(str(i), PROMPT[i:], SAMPLED))
    while made.has_work:
        for event in checked(made.step()):
            reported.setdefault(event.request.id, []).extend(event.tokens)
            stats[event.request.id] = event.stats
        made.memory.check()
    assert made.memory.used() == 0
    return reported, stats


@pytest.mark.parametrize("call", [1, 3])
@pytest.mark.parametrize("deed", [RuntimeError("out of ideas"), *ABSURD.values()], ids=["raises", *ABSURD])
def test_its_request_goes_on_plainly_and_the_statistics_name_it(deed: Any, call: int) -> None:
    drafter = Saboteur(deed, call)
    reported, stats = run(engine(drafter))
    assert reported == TEXTS
    assert stats[CULPRIT].fault.startswith("Saboteur: ")
    assert "\n" not in stats[CULPRIT].fault and len(stats[CULPRIT].fault) <= 300
    again = isinstance(deed, Exception)  # after a failed batch each is called once more, alone
    assert call <= drafter.calls <= call + again, "it was called again"
    for name in set(TEXTS) - {CULPRIT}:
        assert not stats[name].fault and stats[name].accepted > 0
    assert (stats[CULPRIT].drafted > 0) == (call > 1), "what it drafted before stays counted"
    assert sorted(drafter.began) == sorted(drafter.ended) == sorted(TEXTS)


class InvalidDistribution(Stateless):
    """Draws one child. For one request it gives an invalid distribution."""

    kinds = frozenset({Kind.SINGLE})

    def __init__(self, distributions: Any) -> None:
        self.distributions = distributions

    def propose(self, seqs: Seq[Sequence], budgets: Seq[Budget]) -> list[TokenTree]:
        made = []
        for seq, budget in zip(seqs, budgets, strict=True):
            if min(budget) < 1:
                made.append(EMPTY)
                continue
            right = Distributions(lambda rows: np.full((len(rows), plain.VOCAB), 1 / plain.VOCAB))
            distributions = self.distributions if seq.request.id == CULPRIT else right
            made.append(replace(TokenTree.chain([5]), kinds=np.array([Kind.SINGLE, Kind.FIXED], np.uint8), distributions=distributions))
        return made


class Distributions:
    def __init__(self, reported: Any) -> None:
        self.reported = reported

    def probs(self, rows: Seq[int]) -> Any:
        return self.reported(rows)


@pytest.mark.parametrize(
    "distributions",
    [
        None,
        Distributions(lambda rows: 1 / 0),
        Distributions(lambda rows: np.full((len(rows), 7), 1 / 7)),
        Distributions(lambda rows: np.full((len(rows), plain.VOCAB), np.nan)),
        Distributions(lambda rows: np.zeros((len(rows), plain.VOCAB))),
        Distributions(lambda rows: None),
    ],
    ids=["none", "raises", "narrow", "nan", "zero", "nothing"],
)
def test_a_distribution_that_is_none_ends_nobodys_text(distributions: Any) -> None:
    reported, stats = run(engine(InvalidDistribution(distributions), verify="rejection"))
    assert all(len(text) == 30 for text in reported.values())
    assert stats[CULPRIT].fault.startswith("InvalidDistribution: ") and stats[CULPRIT].drafted <= 1
    assert all(not stats[name].fault and stats[name].drafted > 5 for name in set(TEXTS) - {CULPRIT})


@pytest.mark.parametrize("draws", [[7], [], [-1]])
def test_draws_of_other_nodes_are_a_fault(draws: list[int]) -> None:
    tree = TokenTree.chain([5])
    tree = replace(tree, draws=np.array(draws, np.int32))
    with pytest.raises(ValueError, match="draws"):
        tree.check(vocab=9, rows=1, depth=1)


def test_a_fault_outlives_preemption() -> None:
    drafter = Saboteur(RuntimeError("out of ideas"), 1)
    made = engine(drafter, pool=5)
    reported, stats = run(made)
    assert made.preemptions and reported == TEXTS and drafter.calls <= 2 and stats[CULPRIT].fault


class Silent(Stateless):
    def propose(self, seqs: Seq[Sequence], budgets: Seq[Budget]) -> list[TokenTree]:
        return [EMPTY] * len(seqs)


class Short(Stateless):
    def propose(self, seqs: Seq[Sequence], budgets: Seq[Budget]) -> list[TokenTree]:
        return []


def test_a_silent_drafter_is_no_fault() -> None:
    reported, stats = run(engine(Silent()))
    assert reported == TEXTS
    assert all(one.drafted == 0 and not one.fault for one in stats.values())


def test_too_few_trees_are_everybodys_fault() -> None:
    reported, stats = run(engine(Short()))
    assert reported == TEXTS
    assert all("0 trees for 1 sequences" in one.fault for one in stats.values())


class Deaf(RandomTrees):
    def observe(self, result: StepResult) -> None:
        raise ValueError("cannot hear")


class Stillborn(RandomTrees):
    def begin(self, seq: Sequence) -> Any:
        raise ValueError("cannot begin")


class Undying(RandomTrees):
    def end(self, state: Any) -> None:
        raise ValueError("cannot end")


@pytest.mark.parametrize("drafter", [Deaf(plain.VOCAB), Stillborn(plain.VOCAB)], ids=lambda one: type(one).__name__)
def test_a_drafter_that_cannot_hear_or_begin(drafter: Any) -> None:
    reported, stats = run(engine(drafter))
    assert reported == TEXTS
    assert all("cannot" in one.fault for one in stats.values())


def test_a_drafter_that_cannot_end() -> None:
    assert run(engine(Undying(plain.VOCAB)))[0] == TEXTS
