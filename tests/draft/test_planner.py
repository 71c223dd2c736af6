"""The planner drafts the number of nodes with the most expected tokens per second, and time decides only where it may."""

from __future__ import annotations

from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest

from redraft.core.cost import KNOTS, CostModel
from redraft.core.plan import Accepted, Budget, StepResult, Work
from redraft.core.sequence import Sequence
from redraft.core.testing import sequence
from redraft.core.tree import EMPTY, TokenTree
from redraft.draft.acceptance import Acceptance, Candidate
from redraft.draft.drafter import Stateless
from redraft.draft.planner import FIXED_NODES, LONGEST_REST, MARGIN, MEASURED, QUIET, ROUNDS, Planner


class Offers(Stateless):
    """Offers `width` tokens everywhere: bucket i is the i-th of them."""

    def __init__(self, width: int = 2, first: int = 10) -> None:
        self.buckets, self.first = width, first

    def start(self, seq: Sequence) -> Any:
        return ()

    def follow(self, place: Any, token: int) -> Any:
        return (*place, token)

    def offers(self, place: Any) -> list[tuple[int, int]]:
        return [(self.first + i, i) for i in range(self.buckets)]


class Known(Acceptance):
    """Bucket i of the first drafter comes true with the i-th of these chances."""

    chances: tuple[float, ...] = ()

    def candidates(self, depth: int, asked: int, merged: dict[int, list[int]], mood: float = 0.0) -> list[Candidate]:
        return [(token, self.chances[found[1] - self.first[0]], found[1:], found[0]) for token, found in merged.items()]

    def learn(self, depth: int, candidates: Any, token: int) -> float:
        return 0.0


def planner(chances: tuple[float, ...], slope: float, **given: Any) -> Planner:
    """slope: what each further row costs, in the time of one row."""
    parts = [Offers(len(chances))]
    known = Known(["offers"], parts, {})  # type: ignore[arg-type]
    known.chances = chances
    found = Planner(["offers"], parts, CostModel([1 + slope * (knot - 1) for knot in KNOTS]), acceptance=known, **given)
    found.cost.text = 0.0
    return found


def drafted(planner: Planner, *budgets: Budget) -> list[TokenTree]:
    seqs = [sequence([1, 2, 3], stored=2) for _ in budgets]
    for seq in seqs:
        seq.state[planner] = planner.begin(seq)
    trees = planner.propose(seqs, budgets)
    for tree, budget in zip(trees, budgets, strict=True):
        tree.check(vocab=100, rows=budget.rows, depth=budget.depth)
    return trees


def rates(chances: tuple[float, ...], slope: float, rows: int, texts: int) -> list[float]:
    """The definition: expected tokens by time, for each number of the likeliest nodes."""
    paths = sorted((p for _ in range(texts) for p in probabilities(chances, rows)), reverse=True)
    return [(texts + sum(paths[:k])) / (1 + slope * (texts + k - 1)) for k in range(min(len(paths), rows * texts) + 1)]


def probabilities(chances: tuple[float, ...], depth: int) -> list[float]:
    found, level = [], [1.0]
    for _ in range(min(depth, 6)):
        level = sorted((p * chance for p in level for chance in chances), reverse=True)[:64]
        found += level
    return found


@pytest.mark.parametrize("slope", [0.0, 0.02, 0.1, 0.3, 0.6, 1.2])
@pytest.mark.parametrize("chances", [(0.7, 0.2), (0.4, 0.3), (0.95,), (0.05, 0.01)])
@pytest.mark.parametrize("texts", [1, 3])
def test_the_number_of_nodes_is_the_best_one(chances: tuple[float, ...], slope: float, texts: int) -> None:
    trees = drafted(planner(chances, slope), *[Budget(6, 6)] * texts)
    found = rates(chances, slope, 6, texts)
    assert found[sum(map(len, trees))] > 0.98 * max(found), "the search ends where further nodes can hardly pay"
    assert max(found) > (1 + MARGIN) * found[0] or not any(map(len, trees))


def test_a_step_in_the_costs_is_looked_over() -> None:
    found = planner((0.9,), 0.0)
    shape = [1.0 if knot == 1 else 1.6 for knot in KNOTS]  # the second row is dear, further ones are free
    found.cost = CostModel(shape)
    assert len(drafted(found, Budget(8, 8))[0]) == 8, "one node does not pay, eight do"


def test_scores_are_path_probabilities_and_parents_come_first() -> None:
    (tree,) = drafted(planner((0.5, 0.4), 0.0), Budget(6, 3))
    assert tree.scores is not None and tree.scores.tolist() == pytest.approx([0.5, 0.4, 0.25, 0.2, 0.2, 0.16])
    assert tree.parents.tolist()[:3] == [-1, -1, 0]


def test_budgets_of_texts_are_kept_apart() -> None:
    trees = drafted(planner((0.9, 0.05), 0.0), Budget(1, 9), Budget(0, 0), Budget(5, 2))
    assert [len(tree) for tree in trees] == [1, 0, 5]


def test_many_texts_with_large_budgets() -> None:
    trees = drafted(planner((0.9, 0.05), 0.001), *[Budget(64, 64)] * 40)
    assert sum(map(len, trees)) > 40 * 5


def test_without_an_exact_verifier_the_size_is_fixed_and_no_time_is_read() -> None:
    def never() -> float:
        raise AssertionError("the clock was read")

    for slope in (0.0, 5.0):
        found = planner((0.3,), slope, timed=False, clock=count().__next__)
        assert len(drafted(found, Budget(16, 16))[0]) == FIXED_NODES, "whatever a row costs"
        assert not found.idle(lambda rows, cached: 1 / 0)


def stepped(planner: Planner, seq: Sequence, tree: TokenTree, path: tuple[int, ...], tokens: tuple[int, ...]) -> None:
    seq.tokens += tokens
    seq.stored = len(seq.tokens) - 1
    batch: Any = SimpleNamespace(tokens=[0] * (1 + len(tree)))
    planner.observe(StepResult([Work(seq, 1)], [tree], batch, [Accepted(path, tokens)], None, None))  # type: ignore[arg-type]


def test_drafts_that_do_not_pay_stop_and_the_statistics_say_so() -> None:
    time = 0.0
    found = planner((0.9,), 0.1, clock=lambda: time)  # believes in 0.9, but nothing comes true
    seq = sequence([1, 2, 3], stored=2)
    seq.state[found] = found.begin(seq)
    drafts = 0
    for _ in range(100):
        (tree,) = found.propose([seq], [Budget(8, 8)])
        time += 0.01 * (1 + 0.1 * len(tree))
        drafts += len(tree) > 0
        stepped(found, seq, tree, (), (99,))
    assert drafts < 12 and list(found.stopped(seq)) == ["offers"]
    assert found.cost.seconds(1, 0, 0) == pytest.approx(0.01, rel=0.1)


@pytest.mark.parametrize("timed", [True, False])
def test_a_text_that_keeps_nothing_is_looked_at_rarely(timed: bool) -> None:
    found = planner((0.9,), 0.0, timed=timed, clock=lambda: 0.0)  # nothing takes time, so the guard stops no drafter
    seq, other = sequence([1, 2, 3], stored=2), sequence([1, 2, 3], stored=2)
    for one in (seq, other):
        one.state[found] = found.begin(one)

    def looks(steps: int) -> list[bool]:
        seen = []
        for _ in range(steps):
            (tree,) = found.propose([seq], [Budget(2, 2)])
            seen.append(len(tree) > 0)
            stepped(found, seq, tree, (), (99,))
        return seen

    found.propose([seq], [Budget(0, 0)])  # a step without a budget says nothing
    assert looks(QUIET) == [True] * QUIET
    wanted = [False, True] * 4 + [False, False, True] * 3
    assert looks(len(wanted)) == (wanted if timed else [True] * len(wanted))
    assert [len(tree) > 0 for tree in found.propose([seq, other], [Budget(2, 2)] * 2)] == [not timed, True], "each by itself"
    assert looks(400)[-2 * LONGEST_REST :].count(True) == (2 if timed else 2 * LONGEST_REST)
    while not len(tree := found.propose([seq], [Budget(2, 2)])[0]):
        stepped(found, seq, tree, (), (99,))
    stepped(found, seq, tree, (0,), (10, 99))
    assert looks(QUIET) == [True] * QUIET, "something was kept"


def test_candidates_that_were_not_drafted_are_learned_from_too() -> None:
    parts = [Offers(2)]
    found = Planner(["offers"], parts, CostModel([1 + 9 * (knot - 1) for knot in KNOTS]), clock=lambda: 0.0)
    seq = sequence([1, 2, 3], stored=2)
    seq.state[found] = found.begin(seq)
    for _ in range(2000):
        (tree,) = found.propose([seq], [Budget(8, 8)])
        assert tree is EMPTY, "a row costs nine times as much as it can bring"
        stepped(found, seq, tree, (), (10,))
    first = found.acceptance.first[0]
    often, rarely = found.acceptance.candidates(1, 1, {10: [1, first], 11: [1, first + 1]})
    assert often[1] > 0.9 and rarely[1] < 0.1


def test_calibration_waits_for_a_first_reply_and_ends() -> None:
    time = 0.0
    found = planner((0.5,), 0.1, clock=lambda: time)
    asked: list[tuple[int, int]] = []

    def seconds(rows: int, cached: int) -> float:
        asked.append((rows, cached))
        return 0.01 * rows

    assert not found.idle(seconds) and not asked, "nothing is measured before the first step"
    seq = sequence([1, 2, 3], stored=2)
    seq.state[found] = found.begin(seq)
    (tree,) = found.propose([seq], [Budget(1, 1)])
    time += 0.02
    stepped(found, seq, tree, (), (50,))
    while found.idle(seconds):
        assert len(asked) <= ROUNDS * len(MEASURED)
    assert sorted(asked) == sorted(ROUNDS * MEASURED) and found.cost.relative(8) == pytest.approx(8)


def test_a_later_process_measures_on_but_not_before_a_step() -> None:
    found = planner((0.5,), 0.1)
    found.cost.add_round({(1, 0): 0.01, (8, 0): 0.02})
    assert not found.idle(lambda rows, cached: 1 / 0), "the file knew a time, but this process has made no step"
