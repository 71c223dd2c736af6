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
from redraft.draft.payoff import PAUSE
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


def stepped(planner: Planner, seq: Sequence, tree: TokenTree | None, path: tuple[int, ...], tokens: tuple[int, ...]) -> None:
    """tree: None if it rested; then the planner does not see the step."""
    seq.tokens += tokens
    seq.stored = len(seq.tokens) - 1
    if tree is None:
        return
    batch: Any = SimpleNamespace(tokens=[0] * (1 + len(tree)))
    planner.observe(StepResult([Work(seq, 1)], [tree], batch, [Accepted(path, tokens)], None, None))  # type: ignore[arg-type]


def looked_at(planner: Planner, seq: Sequence, budget: Budget) -> TokenTree | None:
    """As the engine does: while its only text rests, the planner is not asked."""
    if seq.rest:
        seq.rest -= 1
        return None
    return planner.propose([seq], [budget])[0]


def test_drafts_that_do_not_pay_stop_and_the_statistics_say_so() -> None:
    time = 0.0
    found = planner((0.9,), 0.1, clock=lambda: time)  # believes in 0.9, but nothing comes true
    seq = sequence([1, 2, 3], stored=2)
    seq.state[found] = found.begin(seq)
    drafts = stopped = 0
    for _ in range(100):
        tree = looked_at(found, seq, Budget(8, 8))
        time += 0.01 * (1 + 0.1 * len(tree or ()))
        drafts += bool(tree)
        stepped(found, seq, tree, (), (99,))
        stopped += list(found.stopped(seq)) == ["offers"]
    assert 0 < drafts < 12 and stopped > 80
    assert found.cost.seconds(1, 0, 0) == pytest.approx(0.01, rel=0.1)


@pytest.mark.parametrize("timed", [True, False])
@pytest.mark.parametrize(("drafting", "looks", "longest"), [(0.0, QUIET, 0), (0.035, QUIET, 3), (0.12, 4, 12), (1.0, 1, LONGEST_REST)])
def test_a_text_that_keeps_nothing_is_looked_at_the_more_rarely_the_dearer_a_look_is(
    timed: bool, drafting: float, looks: int, longest: int
) -> None:
    ticks = count()

    def clock() -> float:
        steps, part = divmod(next(ticks), 4)
        return steps * (1 + drafting) + (0.0, drafting, 1 + drafting, 1 + drafting)[part]

    found = planner((0.9,), 0.0, timed=timed, clock=clock)
    seq, other = sequence([1, 2, 3], stored=2), sequence([1, 2, 3], stored=2)
    for one in (seq, other):
        one.state[found] = found.begin(one)
        one.state[found].payoff.balance[0] = 1e9  # so the guard stops no drafter

    def rests(steps: int) -> list[int]:
        """How long it rests after each look."""
        seen = []
        for _ in range(steps):
            resting = seq.rest
            tree = looked_at(found, seq, Budget(2, 2))
            assert bool(tree) == (resting == 0)
            if not resting:
                seen.append(seq.rest)
            stepped(found, seq, tree, (), (99,))
            seq.state[found].payoff.balance[0] = 1e9
        return seen

    found._share = drafting
    found.propose([seq], [Budget(0, 0)])  # a step without a budget says nothing
    stepped(found, seq, EMPTY, (), (99,))
    assert rests(looks) == [0] * looks
    assert max(rests(400)) == (longest if timed else 0)
    seq.rest = 0
    (tree,) = found.propose([seq], [Budget(2, 2)])
    stepped(found, seq, tree, (0,), (10, 99))
    assert rests(looks) == [0] * looks, "something was kept"
    assert other.rest == 0


def test_a_text_rests_while_all_its_drafters_are_stopped() -> None:
    found = planner((0.9,), 0.3, clock=lambda: 0.0)
    seq = sequence([1, 2, 3], stored=2)
    state = seq.state[found] = found.begin(seq)
    found.cost.unit, found._stepped, found._share = 0.01, True, 0.0
    state.payoff.balance[0] = -1e9
    stepped(found, seq, looked_at(found, seq, Budget(8, 8)), (), (99,))
    assert list(found.stopped(seq)) == ["offers"] and seq.rest == PAUSE
    for _ in range(PAUSE):
        assert looked_at(found, seq, Budget(8, 8)) is None
        stepped(found, seq, None, (), (99,))
    tree = looked_at(found, seq, Budget(8, 8))
    stepped(found, seq, tree, (), (99,))
    assert list(found.stopped(seq)) == [] and looked_at(found, seq, Budget(8, 8)), "its pause is over"


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
