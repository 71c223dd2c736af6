"""Drafts with the lowest layers: how DEL chooses a depth, what it measures, when S2D goes deeper, and that neither changes a text."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from itertools import product
from typing import Any

import numpy as np
import pytest

from redraft import registry
from redraft.core.plan import Budget
from redraft.core.sequence import Sequence
from redraft.core.tree import TokenTree
from redraft.draft.exits import DEL, S2D, Measured, Rows, Sorted, best, head_layers
from redraft.engine.engine import Engine
from redraft.errors import InvalidInput
from tests.contracts import plain
from tests.contracts.identity import SAMPLING, drive
from tests.draft.test_self_skip import check_texts
from tests.layer_skipping.deep import ALL, LAYERS, deep, engine, logits, requests

WILLING = "del:every=1,head=off"


def made(text: str = WILLING, **options: Any) -> Engine:
    return engine(registry.create("draft", text).open, **options)


def measured(engine: Engine) -> Measured:
    drafter = engine.drafter.own.drafter
    assert isinstance(drafter, Measured)
    return drafter


# ---- DEL: the choice


def tokens_a_layer(a: float, exit: int, d: int, count: int, head: float) -> float:
    """The expected tokens of a step, one by one, over the layers that it runs."""
    return sum(a**i for i in range(d + 1)) / (d * (exit + head) + count + head)


def test_the_choice_is_that_of_a_search_over_all_pairs() -> None:
    dice = np.random.default_rng(1)
    exits = [2, 5, 9, 14]
    lengths = set()
    for head in (0.0, 8.0):
        for scale in (0.3, 0.8, 1.0):
            for _ in range(100):
                right = np.sort(dice.random(4) * 0.99 * scale)
                place, length = best(right, exits, 20, 6, head)
                every = {(p, d): tokens_a_layer(right[p], exits[p], d, 20, head) for p, d in product(range(4), range(7))}
                assert every[place, length] == pytest.approx(max(every.values()), rel=1e-12)
                lengths.add(length)
    assert lengths >= {0, 1, 3, 6}


def test_exits_that_are_seldom_right_are_not_used() -> None:
    assert best(np.array([0.04, 0.12, 0.3]), [2, 8, 20], 30, 8)[1] == 0
    assert best(np.zeros(3), [2, 8, 20], 30, 8) == (0, 0)
    assert best(np.array([0.0, 0.8, 0.0]), [2, 8, 20], 30, 8)[0] == 1


def test_the_head_counts_in_layers() -> None:
    spec, _ = deep()
    sizes = {name: np.prod(shape) for name, shape in spec.shapes().items()}
    layer = sum(size for name, size in sizes.items() if name.startswith("layers.3."))
    assert head_layers(spec) == pytest.approx(spec.vocab * spec.hidden / layer)
    assert measured(made("del")).cost == head_layers(spec) and measured(made()).cost == 0


def test_exits_are_spaced_evenly_between_the_first_and_the_last_layer() -> None:
    assert measured(made("del:exits=2")).exits == [2, 4]
    assert measured(made("del:exits=99")).exits == [1, 2, 3, 4, 5]


# ---- DEL: the measurement


class Noted(Measured):
    """Keeps the state of its text at the end."""

    last: Rows | None = None

    def end(self, state: Rows) -> None:
        self.last = state


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_it_measures_what_each_exit_would_have_said(backend: str) -> None:
    """Without decay, over all rows of a greedy text behind the prompt, and the prompt's last four."""
    running = engine(lambda *above: Noted(DEL(every=1, memory=1.0, exits=99, head=False), *above), backend=backend)
    (request,) = requests(SAMPLING["greedy"], 1)
    seen = drive(running, [request], (0,))
    check_texts(seen, "greedy")
    drafter = running.drafter.own.drafter
    assert isinstance(drafter, Noted) and drafter.last is not None
    tokens = [*request.prompt, *seen.texts["0"]]
    said = [logits(tokens, [frozenset(range(depth))] * len(tokens)).argmax(-1) for depth in range(1, LAYERS)]
    whole = logits(tokens, [ALL] * len(tokens)).argmax(-1)
    rows = np.arange(len(request.prompt) - 4, len(tokens) - 1)
    assert drafter.last.rows == len(rows)
    assert drafter.last.right.tolist() == [int((one[rows] == whole[rows]).sum()) for one in said]
    assert ((drafter.last.sure <= drafter.last.right) & (drafter.last.unsure <= len(rows) - drafter.last.right)).all()


def test_older_rows_count_less() -> None:
    running = engine(lambda *above: Noted(DEL(every=1, memory=0.5), *above))
    drive(running, requests(SAMPLING["greedy"], 1), (0,))
    drafter = running.drafter.own.drafter
    assert isinstance(drafter, Noted) and drafter.last is not None
    assert 1 < drafter.last.rows < 8, "at most two steps' worth"


def test_only_some_steps_are_measured() -> None:
    running = made("del:every=8")
    drafter, taps = measured(running), []
    forward = running.runner.forward

    def noted(batch: Any, asked: Any) -> Any:
        taps.append(asked.hidden)
        return forward(batch, asked)

    running.runner.forward = noted  # type: ignore[method-assign]
    drive(running, requests(SAMPLING["greedy"], 1), (0,))
    measurements = [i for i, asked in enumerate(taps) if asked]
    assert measurements[0] == 0 and 2 <= len(measurements) < len(taps) / 4
    assert taps[0] == {exit - 1 for exit in [*drafter.exits, LAYERS]}


def test_a_model_whose_layers_change_nothing_exits_at_once() -> None:
    """Layers 1 to 4 leave the state alone, but the last one does not: no exit is right, and nothing is drafted."""
    running = made(power=0.0)
    seen = drive(running, requests(SAMPLING["greedy"], 1), (0,))
    check_texts(seen, "greedy", 0.0)
    assert seen.accepted + seen.rejected < 20


# ---- DEL: drafts


class Eager(Measured):
    """Drafts from the exit `place` whatever was measured, and compares each chain with a dense computation."""

    place, compared = 3, 0

    def propose(self, seqs: Seq[Sequence], budgets: Seq[Budget]) -> list[TokenTree]:
        for seq in seqs:
            seq.state[self].right[self.place] = seq.state[self].rows
        trees = super().propose(seqs, budgets)
        for seq, tree in zip(seqs, trees, strict=True):
            tokens = list(seq.tokens)
            for token in tree.tokens.tolist():
                exit = frozenset(range(self.exits[seq.state[self].place]))
                row = logits(tokens, [ALL] * seq.stored + [exit] * (len(tokens) - seq.stored))[-1]
                assert token == plain.draw(row, seq.params, seq.seed, tokens)[0]
                tokens.append(token)
                self.compared += 1
        return trees


@pytest.mark.parametrize("sampling", ["greedy", "filtered"])
@pytest.mark.parametrize(("arrivals", "pool"), [((0, 1, 3, 3), 40), ((0, 0, 2, 5), 6)])
def test_drafts_are_what_the_exit_says_and_texts_stay(sampling: str, arrivals: tuple[int, ...], pool: int) -> None:
    running = engine(lambda *above: Eager(DEL(every=3, exits=99, length=3, head=False), *above), pool=pool, chunk=24)
    seen = drive(running, requests(SAMPLING[sampling]), arrivals)
    check_texts(seen, sampling)
    drafter = running.drafter.own.drafter
    assert isinstance(drafter, Eager) and drafter.compared > 20 and seen.accepted and bool(seen.preempted) == (pool == 6)


def test_a_draft_stops_below_the_middle_of_right_and_wrong_probabilities() -> None:
    running = made()
    (request,) = requests(SAMPLING["greedy"], 1)
    running.add(request)
    while not request.sequences or request.sequences[0].generated < 3:
        running.step()
    (seq,), drafter = request.sequences, measured(running)
    for stop, count in ((0.0, 4), (1.0, 1)):
        state = Rows(100.0, *(np.full(len(drafter.exits), x) for x in (99.0, 99 * stop, stop)))
        seq.state[drafter] = state
        assert len(drafter.propose([seq], [Budget(4, 4)])[0]) == count and state.stop == pytest.approx(stop)


# ---- S2D


@pytest.mark.parametrize(("sure", "depths"), [(0.0, {2}), (1.0, {4}), (0.6, {2, 4})])
def test_it_goes_deeper_where_it_is_unsure(sure: float, depths: set[int]) -> None:
    """Every drafted token is that of the depth that was reached, over the keys of the rows before."""
    reached: set[int] = set()

    class Compared(Sorted):
        def propose(self, seqs: Seq[Sequence], budgets: Seq[Budget]) -> list[TokenTree]:
            trees = super().propose(seqs, budgets)
            for seq, tree in zip(seqs, trees, strict=True):
                tokens, runs = list(seq.tokens), [ALL] * seq.stored
                for token in tree.tokens.tolist():
                    row = logits(tokens, [*runs, *[frozenset(range(2))] * (len(tokens) - len(runs))])[-1]
                    depth = 2
                    if np.exp(row - row.max()).sum() ** -1 < sure:
                        runs = [ALL] * seq.stored + [frozenset(range(4))] * (len(tokens) - seq.stored)
                        row, depth = logits(tokens, runs)[-1], 4
                    reached.add(depth)
                    assert token == plain.draw(row, seq.params, seq.seed, tokens)[0]
                    tokens.append(token)
            return trees

    running = engine(lambda *above: Compared(S2D(shallow=2, deep=4, sure=sure, stop=0), *above))
    seen = drive(running, requests(SAMPLING["greedy"], 2), (0, 2))
    check_texts(seen, "greedy")
    assert reached == depths and seen.accepted


@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize(("arrivals", "chunk", "pool"), [((0, 1, 3, 3), 24, 40), ((0, 0, 2, 5), 24, 6)])
@pytest.mark.parametrize("draft", [WILLING, "s2d:stop=0,sure=0.6"])
def test_chunks_batches_and_preemption_change_nothing(draft: str, sampling: str, arrivals: tuple[int, ...], chunk: int, pool: int) -> None:
    seen = drive(made(draft, chunk=chunk, pool=pool), requests(SAMPLING[sampling]), arrivals)
    check_texts(seen, sampling)
    assert bool(seen.preempted) == (pool < 40) and (seen.rejected or draft == WILLING)


def test_n_texts_and_aborts_leak_nothing() -> None:
    for draft in (WILLING, "s2d:stop=0"):
        running = made(draft, pool=12)
        for request in requests(SAMPLING["sampled"].but(n=2), 3):
            running.add(request)
        for _ in range(5):
            running.step()
        assert running.abort("1")
        while running.has_work:
            for event in running.step():
                assert not event.stats.fault
            running.memory.check()
        assert running.memory.used() == 0


# ---- options


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("del:length=0", "del:length=0: must be 1 or more"),
        ("del:memory=2", r"del:memory=2\.0: must be 0 to 1"),
        ("s2d:shallow=0", "s2d:shallow=0: must be 1 or more"),
        ("s2d:sure=-1", r"s2d:sure=-1\.0: must be 0 to 1"),
    ],
)
def test_bad_options_are_refused(text: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        registry.create("draft", text)


def test_depths_that_the_target_does_not_have_are_refused() -> None:
    with pytest.raises(InvalidInput, match=r"s2d:shallow=4,deep=3: the target has 6 layers; 1 <= shallow <= deep <= 5 is needed"):
        made("s2d:shallow=4,deep=3")
    assert S2D().depths(6) == (1, 3) and S2D().depths(30) == (7, 15) and S2D(shallow=5).depths(6) == (5, 5)
    with pytest.raises(InvalidInput, match=r"del: the target has 1 layer; 2 or more are needed"):
        DEL().layers(1)
