"""Drafts without some halves of layers: the search, its trials, the trees, and that neither changes a text."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from redraft import registry
from redraft.core.layers import Layers
from redraft.core.plan import Budget
from redraft.core.sequence import Sequence
from redraft.core.tree import Kind
from redraft.draft.swift import APART, BAYES_EVERY, SCRATCH, SWIFT, Search, Searching
from redraft.engine.engine import Engine
from redraft.errors import InvalidInput
from redraft.verify.verifier import Rejecting
from tests.contracts.algebra import LEAST_P, random_distributions
from tests.contracts.drawn import forest
from tests.contracts.identity import SAMPLING, Run, drive
from tests.contracts.test_drawn import p_value
from tests.draft.test_self_skip import check_texts
from tests.layer_skipping.deep import ALL, engine, logits, requests

QUICK = "swift:ratio=0.5,window=4,stop=0.1,length=4"


def made(text: str = QUICK, **options: Any) -> Engine:
    return engine(registry.create("draft", text).open, **options)


def searching(engine: Engine) -> Searching:
    drafter = engine.drafter.own.drafter
    assert isinstance(drafter, Searching)
    return drafter


# ---- the search


def score(chosen: tuple[int, ...]) -> float:
    """A made-up model: each half costs as much as its number says, and two pairs cost more together."""
    return float(np.exp(-sum(half % 7 for half in chosen) / 20 - 0.5 * ({2, 9} <= set(chosen)) - 0.5 * ({0, 7} <= set(chosen))))


def searched(method: SWIFT, halves: int = 16) -> Search:
    search = Search(method, halves)
    while search.active:
        chosen = search.next()
        search.learn(chosen, score(chosen))
    return search


def test_single_halves_come_first_and_then_those_that_did_least_harm() -> None:
    search = searched(SWIFT(ratio=0.25, trials=17))
    assert [chosen for chosen, _ in search.tried[:16]] == [(half,) for half in range(16)]
    assert search.tried[16][0] == (0, 1, 7, 14), "halves 0, 7 and 14 cost nothing, 1 and 8 little"


def test_the_best_set_is_the_best_that_was_seen_and_gets_better() -> None:
    search = searched(SWIFT(ratio=0.4, trials=600))
    sets = [(chosen, found) for chosen, found in search.tried if len(chosen) == 6]
    assert search.best == max(sets, key=lambda one: one[1]) and search.best[1] > sets[0][1]
    assert all(len(set(chosen)) == 6 and list(chosen) == sorted(chosen) and set(chosen) <= set(range(16)) for chosen, _ in sets)


def again(search: Search, chosen: tuple[int, ...], score: float) -> None:
    """Lets the search try bad sets until it tries `chosen` again."""
    for _ in range(APART):
        if search.next() == chosen:
            break
        search.learn(search.next(), 0.0)
    assert search.next() == chosen
    search.learn(chosen, score)


def test_one_lucky_window_does_not_decide() -> None:
    search = Search(SWIFT(ratio=0.25, enough=1.0), 16)
    for half in range(16):
        search.learn((half,), 0.5)
    first = search.next()
    search.learn(first, 0.8)
    assert search.best == (first, 0.8) and search.next() != first
    again(search, first, 0.4)
    again(search, first, 0.6)
    assert search.best == (first, pytest.approx(0.6))
    lucky, misses = search.next(), search.misses
    search.learn(lucky, 0.9)
    assert search.best[0] == first and search.misses == misses
    again(search, lucky, 0.2)
    assert search.best[0] == first and search.misses > misses
    better = search.next()
    search.learn(better, 0.9)
    again(search, better, 0.5)
    again(search, better, 0.7)
    assert search.best == (better, pytest.approx(0.7)) and search.misses == 0


def test_the_same_seed_searches_the_same_sets() -> None:
    first, again, other = (searched(SWIFT(ratio=0.4, trials=80, seed=seed)).tried for seed in (3, 3, 4))
    assert first == again != other


@pytest.mark.parametrize(
    ("method", "count"),
    [
        (SWIFT(ratio=0.4, trials=40), 40),
        (SWIFT(ratio=0.4, patience=5, trials=999), None),
        (SWIFT(ratio=0.25, enough=0.0), 0),
        (SWIFT(ratio=0.05), 0),
    ],
)
def test_it_ends(method: SWIFT, count: int | None) -> None:
    search = searched(method)
    assert not search.active and (search.misses == 5 if count is None else len(search.tried) == count)


def test_a_share_of_less_than_one_half_skips_nothing() -> None:
    assert Search(SWIFT(ratio=0.05), 16).best == ((), 1.0)


def test_a_bound_is_high_where_scores_were_good_or_unknown() -> None:
    search = Search(SWIFT(ratio=0.25), 16)
    for _ in range(3):
        search.learn((0, 1, 2, 3), 0.9)
        search.learn((12, 13, 14, 15), 0.1)
    good, bad, new = search._bounds([(0, 1, 2, 3), (12, 13, 14, 15), (4, 5, 6, 7)])
    assert new > good > bad and good == pytest.approx(0.9, abs=0.1) and bad == pytest.approx(0.1, abs=0.1)


def test_every_25th_set_has_the_largest_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    bounds = Search._bounds
    monkeypatch.setattr(Search, "_bounds", lambda search, sets: (asked.append(len(search.tried) + 1), bounds(search, sets))[1])
    searched(SWIFT(ratio=0.4, trials=110, enough=1.0))
    assert asked == [25, 50, 75, 100] and BAYES_EVERY == 25


# ---- trials


def started(made: Engine, tokens: int, number: int = 0, sampling: str = "greedy") -> Sequence:
    """A text that has so many new tokens."""
    (request,) = requests(SAMPLING[sampling], 1, first=number)
    made.add(request)
    while not request.sequences or request.sequences[0].generated < tokens:
        made.step()
    return request.sequences[0]


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("halves", [(), (2, 3), (0, 1, 4, 5), (0, 1, 2, 3, 4, 5, 6, 7)])
def test_a_score_is_the_share_of_own_tokens_that_the_other_layers_repeat(backend: str, halves: tuple[int, ...]) -> None:
    size = 16
    running = made(f"swift:window={size},trials=0", backend=backend)
    seq, drafter = started(running, 20), searching(running)
    layers = drafter.without(halves)
    before = len(seq.tokens) - size
    known = before // 32 * 32 if before % 32 else before - 32
    dense = logits(seq.tokens, [ALL] * known + [layers.attention] * (len(seq.tokens) - known))
    wanted = float((dense[before - 1 : -1].argmax(-1) == seq.tokens[before:]).mean())
    assert drafter._score(seq, layers) == wanted and (wanted == 1.0) == (not halves)
    running.memory.check()
    assert SCRATCH not in running.memory.paged.table._held


def test_halves_are_named_by_layer() -> None:
    drafter = searching(made())
    assert drafter.without((0, 3)) == Layers(frozenset({0, 2, 3, 4, 5}), frozenset({0, 1, 3, 4, 5}))


def test_a_step_tries_one_set_and_without_its_keys_or_pages_none(monkeypatch: pytest.MonkeyPatch) -> None:
    running = made()
    drafter = searching(running)
    seq = started(running, 8)
    for _ in range(3):
        count = len(drafter.search.tried)
        running.step()
        assert len(drafter.search.tried) == count + 1
    monkeypatch.setattr(running.memory.paged.table, "available", lambda: 0)
    assert drafter._score(seq, drafter.layers) is None
    monkeypatch.undo()
    monkeypatch.setattr(running.memory.paged.table, "match", lambda tokens, salt: 0)
    seq.tokens += [1] * 64
    assert drafter._score(seq, drafter.layers) is None, "all of a long text would run"


def test_what_raises_in_a_trial_leaves_nothing_and_the_text_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    running = made()
    drafter = searching(running)
    score, calls = drafter._score, 0

    def failing(seq: Sequence, layers: Layers) -> float | None:
        nonlocal calls
        calls += 1
        with monkeypatch.context() as patch:
            if calls == 3:
                patch.setattr(running.runner, "forward", lambda batch, taps=None: 1 / 0)
            return score(seq, layers)

    monkeypatch.setattr(drafter, "_score", failing)
    (request,) = requests(SAMPLING["greedy"], 1)
    running.add(request)
    text: list[int] = []
    while running.has_work:
        for event in running.step():
            text += event.tokens
        running.memory.check()
    assert calls == 3 and running.memory.used() == 0
    check_texts(Run({"0": text}), "greedy")
    assert "ZeroDivisionError" in request.sequences[0].fault


# ---- texts


@pytest.mark.parametrize(("backend", "sampling"), [*(("torch", one) for one in SAMPLING), ("reference", "filtered"), ("numpy", "sampled")])
def test_searching_and_drafting_change_no_text(backend: str, sampling: str) -> None:
    running = made(QUICK, backend=backend)
    seen = drive(running, requests(SAMPLING[sampling]), (0, 1, 3, 3))
    check_texts(seen, sampling)
    search = searching(running).search
    assert len(search.tried) > 10 and search.best is not None and seen.accepted and seen.rejected


@pytest.mark.parametrize(("arrivals", "chunk", "pool"), [((0, 1, 3, 3), 24, 40), ((0, 0, 2, 5), 24, 6), ((0,) * 4, 512, 7)])
def test_chunks_batches_and_preemption_change_nothing(arrivals: tuple[int, ...], chunk: int, pool: int) -> None:
    running = made(chunk=chunk, pool=pool)
    seen = drive(running, requests(SAMPLING["filtered"]), arrivals)
    check_texts(seen, "filtered")
    assert searching(running).search.tried and bool(seen.preempted) == (pool < 40)


def test_nothing_is_drafted_before_a_whole_set_was_tried() -> None:
    running = made("swift:ratio=0.5,window=20")
    seen = drive(running, requests(SAMPLING["greedy"], 1), (0,))
    assert 0 < len(searching(running).search.tried) < 8 and not seen.accepted and not seen.rejected


def test_what_was_learned_can_be_kept_and_put_back() -> None:
    running = made()
    drafter = searching(running)
    drive(running, requests(SAMPLING["greedy"]), (0,) * 4)
    kept, layers, best = drafter.snapshot(), drafter.layers, drafter.search.best
    assert best is not None and layers == drafter.without(best[0])
    drafter.restore([])
    assert drafter.search.best is None and not drafter.search.tried
    drafter.restore(kept)
    assert (drafter.search.best, drafter.layers, drafter.snapshot()) == (best, layers, kept)


def test_layers_that_change_nothing_are_not_missed() -> None:
    running = made("swift:ratio=0.5,window=4,stop=0,length=4", power=0.0)
    seen = drive(running, requests(SAMPLING["greedy"], 2), (0, 0))
    search = searching(running).search
    assert not search.active and search.best is not None and search.best[1] == 1.0 and seen.accepted


# ---- trees


def test_the_chain_comes_first_and_rivals_by_its_probability() -> None:
    """At temperature 0, with probabilities 0.7, then 0.97: 4 of 5 tokens at the root, where 7 rivals are allowed, and 2 below it."""
    logs = [np.array([0.7, 0.2, 0.05, 0.04, 0.01]), np.tile([0.97, 0.01, 0.01, 0.005, 0.005], (5, 1))]
    greedy = SAMPLING["greedy"]
    method = SWIFT(stop=0.5, length=2)
    (tree,) = forest(method, logs, 1, Budget(20, 3), greedy)  # type: ignore[arg-type]
    assert tree.parents.tolist() == [-1, 0, -1, -1, -1, -1, 0, 0]
    assert tree.tokens.tolist() == [0, 0, 1, 2, 3, 4, 1, 2]
    (short,) = forest(method, logs, 1, Budget(3, 3), greedy)  # type: ignore[arg-type]
    assert short.tokens.tolist() == [0, 0, 1]
    (unsure,) = forest(SWIFT(length=2), logs, 1, Budget(3, 3), greedy)  # type: ignore[arg-type]
    assert unsure.parents.tolist() == [-1, -1, -1], "0.7 is below 0.8, so the chain ends"


RULES = {name: registry.create("verify", name) for name in registry.METHODS["verify"]}


@pytest.mark.parametrize(
    "rule", [name for name, rule in RULES.items() if isinstance(rule, Rejecting) and Kind.WITHOUT_REPLACEMENT in rule.supports]
)
def test_the_distribution_is_the_targets(rule: str) -> None:
    rng = np.random.default_rng(3)
    distributions, draft = random_distributions(rng), random_distributions(rng)
    trees = forest(SWIFT(stop=0.3), draft, 3000, Budget(3, 2))  # type: ignore[arg-type]
    assert p_value(RULES[rule], trees, distributions) >= LEAST_P


# ---- options


@pytest.mark.parametrize(("option", "allowed"), [("ratio=1", "0 or more and below 1"), ("window=0", "1 or more"), ("stop=2", "0 to 1")])
def test_bad_options_are_refused(option: str, allowed: str) -> None:
    with pytest.raises(InvalidInput, match=rf"swift:{option.split('=')[0]}=.*: must be {allowed}"):
        registry.create("draft", f"swift:{option}")


def test_a_target_of_two_layers_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"swift: the target has 2 layers.* 3 layers or more are needed"):
        SWIFT().layers(2)
