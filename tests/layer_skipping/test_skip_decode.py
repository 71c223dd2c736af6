"""The number of layers falls along a text: tests of the schedule, and of the text against a dense definition."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest

from redraft import registry
from redraft.core.layers import Layers
from redraft.core.sequence import UNLIMITED
from redraft.errors import InvalidInput
from redraft.layer_skipping.skip_decode import Schedule, SkipDecode
from redraft.ops.backend import Feature
from tests.arrays import BACKEND
from tests.contracts import plain
from tests.contracts.drafters import RandomTrees
from tests.contracts.identity import SAMPLING, drive, prompts
from tests.layer_skipping.deep import ALL, LAYERS, engine, logits, requests

FALLING = "skip-decode:most=5,least=2,over=9"
METHOD = SkipDecode(most=5, least=2, over=9)


def at(t: int, context: int = 7) -> Any:
    return SimpleNamespace(stored=context + t, context=context)


# ---- the schedule


@pytest.mark.parametrize("count", [2, 3, 6, 30])
@pytest.mark.parametrize("over", [1, 2, 9, 64])
def test_borders_are_where_the_rounded_line_falls(count: int, over: int) -> None:
    for most in range(2, count + 1):
        for least in range(2, most + 1):
            plan = Schedule(SkipDecode(most=most, least=least, over=over), count)
            numbers = [plan.number(t) for t in range(over + 5)]
            assert numbers[0] == most and numbers[over:] == [least] * 5
            for t, number in enumerate(numbers):
                exact = most - (most - least) * min(1, t / over)
                assert abs(number - exact) <= 0.5 + 1e-9
                later = [u for u in range(t + 1, over + 5) if numbers[u] < number]
                assert plan.border(at(t)) == (7 + later[0] if later else UNLIMITED)


def test_sets_are_nested_and_as_large_as_the_schedule_says() -> None:
    plan = Schedule(SkipDecode(most=20, least=6, warm=2, over=50), 30)
    sets = [plan.plan(at(t)).attention for t in range(60)]
    assert all(after <= before for before, after in pairwise(sets))
    assert [len(layers) for layers in sets] == [plan.number(t) for t in range(60)]
    assert sets[0] == {0, 1, *range(12, 30)} and sets[-1] == {0, 1, *range(26, 30)}


def test_it_falls_from_all_to_half_unless_options_say_more() -> None:
    plan = Schedule(SkipDecode(), 30)
    assert (plan.most, plan.least) == (30, 15) and Schedule(SkipDecode(), 3).least == 2
    assert not Schedule(SkipDecode(), 2).skips and not Schedule(SkipDecode(), 1).skips


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("most=7", "skip-decode:most=7: the target has 6 layers.* 2 to 6 is allowed"),
        ("least=5,most=4", "skip-decode:least=5: .* 2 to 4 is allowed"),
        ("warm=3,least=3", "skip-decode:least=3: .*the lowest 3 and the last.* 4 to 6 is allowed"),
    ],
)
def test_what_does_not_fit_the_target_is_refused(options: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        engine().add(requests(SAMPLING["greedy"].but(depth=f"skip-decode:{options}"), 1)[0])


# ---- the text


@cache
def expected(number: int, sampling: str, skips: bool = True, context: int | None = None) -> list[int]:
    prompt, params, plan = list(prompts()[number]), SAMPLING[sampling], Schedule(METHOD, LAYERS)
    tokens = list(prompt)
    given = context or len(prompt)
    assert params.max_tokens is not None
    for _ in range(params.max_tokens):
        runs = [plan.plan(at(t)).attention if skips else ALL for t in range(len(tokens) - given)]
        row = logits(tokens, [ALL] * given + runs)[-1]
        tokens.append(plain.draw(row, params, 100 + number, tokens)[0])
    return tokens[len(prompt) :]


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("sampling", ["greedy", "filtered"])
def test_the_text_is_that_of_the_definition(backend: str, sampling: str) -> None:
    seen = drive(engine(backend=backend), requests(SAMPLING[sampling].but(depth=FALLING), 2), (0, 0))
    assert seen.texts == {str(i): expected(i, sampling) for i in range(2)}
    assert expected(0, sampling) != expected(0, sampling, skips=False)


@pytest.mark.parametrize("drafts", [False, True])
@pytest.mark.parametrize(("arrivals", "chunk", "pool"), [((0,) * 4, 512, 40), ((0, 1, 3, 3), 24, 40), ((0, 0, 2, 5), 24, 6)])
def test_drafts_chunks_batches_and_preemption_change_nothing(drafts: bool, arrivals: tuple[int, ...], chunk: int, pool: int) -> None:
    """After a preemption the generated rows come back as a chunk, which must be split where the number falls."""
    known = {(str(i), 0): expected(i, "sampled", bool(i % 2)) for i in range(4)}
    trees = RandomTrees(plain.VOCAB, seed=2, right=0.8, known=known)
    made = engine((lambda runner, sampler: trees) if drafts else None, chunk=chunk, pool=pool)
    asked = requests(SAMPLING["sampled"])
    for request in asked[1::2]:
        request.params = request.params.but(depth=FALLING)
    seen = drive(made, asked, arrivals)
    assert seen.texts == {str(i): known[str(i), 0] for i in range(4)}
    assert bool(seen.accepted and seen.rejected) == drafts and bool(seen.preempted) == (pool == 6)


@pytest.mark.parametrize("layers", [None, Layers.whole(range(3))])
def test_rows_run_what_the_schedule_says(layers: Layers | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault is noticed: here the layers do not fall."""
    if layers is not None:
        monkeypatch.setattr(Schedule, "plan", lambda plan, seq: layers)
    made, ran = engine(), []
    forward = made.runner.forward

    def noted(batch: Any, taps: Any) -> Any:
        ran.extend((int(p), len(batch.layers[0].attention if batch.layers[0] else ALL)) for p in batch.positions)
        return forward(batch, taps)

    made.runner.forward = noted  # type: ignore[method-assign]
    (request,) = requests(SAMPLING["greedy"].but(depth=FALLING), 1)
    drive(made, [request], (0,))
    plan, count = Schedule(METHOD, LAYERS), len(request.prompt)
    wanted = [(p, LAYERS if p < count else plan.number(p - count)) for p in range(count + 25)]
    assert (ran == wanted) == (layers is None)


def test_a_set_that_grows_is_our_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    number = Schedule.number
    monkeypatch.setattr(Schedule, "number", lambda plan, t: LAYERS - number(plan, t) + 2)
    (event,) = [event for event in _events(engine(), requests(SAMPLING["greedy"].but(depth=FALLING), 1)[0]) if event.error is not None]
    assert "rows run a layer that rows before them skipped" in str(event.error)


def _events(made: Any, request: Any) -> list[Any]:
    made.add(request)
    found = []
    while made.has_work:
        found += made.step()
    return found


def test_rows_behind_a_given_context_skip_although_they_are_prompt() -> None:
    (request,) = requests(SAMPLING["greedy"].but(depth=FALLING), 1)
    request.context = 17
    seen = drive(engine(chunk=24), [request], (0,))
    assert seen.texts["0"] == expected(0, "greedy", True, 17) != expected(0, "greedy")


def test_layers_are_skipped_from_the_first_step_on_where_cached_pages_end_at_the_border(monkeypatch: pytest.MonkeyPatch) -> None:
    own = registry.backend(BACKEND)
    monkeypatch.setattr(own, "features", own.features | {Feature.BIT_EXACT})
    made = engine()
    drive(made, requests(SAMPLING["greedy"], 1), (0,))
    (request,) = requests(SAMPLING["greedy"].but(depth=FALLING), 1)
    request.context = 32
    seen = drive(made, [request], (0,))
    assert seen.cached == 32 and seen.texts["0"] == expected(0, "greedy", True, 32)


def test_it_says_that_it_is_lossy() -> None:
    assert registry.method("depth", "skip-decode").card.guarantee.label == "lossy"  # type: ignore[attr-defined]
