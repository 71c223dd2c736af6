"""After the prompt only the kept layers run: tests of the formula, and of the text against a dense definition."""

from __future__ import annotations

import math
from functools import cache

import pytest

from redraft import registry
from redraft.card import Guarantee
from redraft.errors import InvalidInput
from redraft.guarantee import weakest
from redraft.layer_skipping.layer_skip import UnifiedLayerSkipping
from redraft.ops.backend import Feature
from tests.arrays import BACKEND
from tests.contracts import plain
from tests.contracts.drafters import RandomTrees
from tests.contracts.identity import SAMPLING, drive, prompts
from tests.layer_skipping.deep import ALL, LAYERS, deep, engine, logits, requests

HALF = "layer-skip:speedup=2"


def kept(count: int, speedup: float) -> list[int]:
    return sorted(UnifiedLayerSkipping(speedup).layers(count))


# ---- the formula


def test_it_keeps_what_the_authors_examples_keep() -> None:
    assert kept(30, 5) == [0, 6, 12, 18, 24, 29]
    assert kept(30, 2) == [*range(0, 27, 2), 29]


@pytest.mark.parametrize("count", range(2, 41))
def test_the_first_and_the_last_always_run_and_as_many_as_the_speedup_leaves(count: int) -> None:
    for wanted in range(2, count + 1):
        found = kept(count, count / wanted)
        assert found[0] == 0 and found[-1] == count - 1 and len(found) == wanted
        assert wanted == count or kept(count, count / (wanted + 0.5)) == found, "half a layer is none"


def test_a_speedup_that_divides_evenly_loses_no_layer_to_rounding() -> None:
    assert 33 / 1.1 < 30 and len(kept(33, 1.1)) == 30


@pytest.mark.parametrize("count", [1, 2, 8])
def test_a_speedup_of_one_keeps_all(count: int) -> None:
    assert kept(count, 1) == list(range(count))


@pytest.mark.parametrize(("count", "speedup", "allowed"), [(30, 16, "1 to 15"), (3, 2, "1 to 1.5"), (1, 2, "1 to 1 "), (2, 1.5, "1 to 1 ")])
def test_fewer_than_two_layers_are_refused(count: int, speedup: float, allowed: str) -> None:
    with pytest.raises(InvalidInput, match=f"layer-skip:speedup={speedup}: leaves .* {allowed}"):
        UnifiedLayerSkipping(speedup).layers(count)


@pytest.mark.parametrize("speedup", [0.5, 0, -1, math.nan, math.inf])
def test_a_speedup_below_one_is_refused(speedup: float) -> None:
    with pytest.raises(InvalidInput, match=f"layer-skip:speedup={speedup}: must be 1 or more"):
        UnifiedLayerSkipping(speedup)


# ---- the text


@cache
def expected(number: int, sampling: str, speedup: float, context: int | None = None) -> list[int]:
    prompt, params = list(prompts()[number]), SAMPLING[sampling]
    tokens, layers = list(prompt), UnifiedLayerSkipping(speedup).layers(LAYERS)
    given = context or len(prompt)
    assert params.max_tokens is not None
    for _ in range(params.max_tokens):
        row = logits(tokens, [ALL] * given + [layers] * (len(tokens) - given))[-1]
        tokens.append(plain.draw(row, params, 100 + number, tokens)[0])
    return tokens[len(prompt) :]


def test_the_definition_with_all_layers_is_that_of_the_contracts() -> None:
    text = plain.generate(*deep(), prompts()[0], SAMPLING["sampled"], seed=100)
    assert expected(0, "sampled", 1) == text != expected(0, "sampled", 2)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("sampling", ["greedy", "filtered"])
def test_the_text_is_that_of_the_definition(backend: str, sampling: str) -> None:
    seen = drive(engine(backend=backend), requests(SAMPLING[sampling].but(depth=HALF), 2), (0, 0))
    assert seen.texts == {str(i): expected(i, sampling, 2) for i in range(2)}


@pytest.mark.parametrize("drafts", [False, True])
@pytest.mark.parametrize(("arrivals", "chunk", "pool"), [((0,) * 4, 512, 40), ((0, 1, 3, 3), 24, 40), ((0, 0, 2, 5), 24, 6)])
def test_drafts_chunks_batches_and_preemption_change_nothing(drafts: bool, arrivals: tuple[int, ...], chunk: int, pool: int) -> None:
    known = {(str(i), 0): expected(i, "sampled", 2 if i % 2 else 1) for i in range(4)}
    trees = RandomTrees(plain.VOCAB, seed=2, right=0.8, known=known)
    made = engine((lambda runner, sampler: trees) if drafts else None, chunk=chunk, pool=pool)
    asked = requests(SAMPLING["sampled"])
    for request in asked[1::2]:  # every other request skips layers, so batches are mixed
        request.params = request.params.but(depth=HALF)
    seen = drive(made, asked, arrivals)
    assert seen.texts == {str(i): known[str(i), 0] for i in range(4)}
    assert bool(seen.accepted and seen.rejected) == drafts and bool(seen.preempted) == (pool == 6)


def test_a_speedup_of_one_is_the_plain_text() -> None:
    made = engine()
    asked = requests(SAMPLING["sampled"].but(depth="layer-skip:speedup=1"), 2)
    seen = drive(made, asked, (0, 0))
    assert seen.texts == {str(i): expected(i, "sampled", 1) for i in range(2)}
    assert all(seq.cache.depth is None for request in asked for seq in request.sequences), "it costs nothing"


def test_rows_behind_a_given_context_skip_although_they_are_prompt() -> None:
    (request,) = requests(SAMPLING["greedy"].but(depth=HALF), 1)
    request.context = 17
    seen = drive(engine(chunk=24), [request], (0,))
    assert seen.texts["0"] == expected(0, "greedy", 2, 17) != expected(0, "greedy", 2)


def test_pages_of_skipping_rows_are_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same prompt again, now with all layers: it must not match the blocks that the first text wrote after its prompt. Only a
    backend that promises bits publishes the blocks before."""
    own = registry.backend(BACKEND)
    monkeypatch.setattr(own, "features", own.features | {Feature.BIT_EXACT})
    made = engine()
    (first,) = requests(SAMPLING["greedy"].but(depth=HALF), 1)
    text = drive(made, [first], (0,)).texts["0"]
    longer = [*first.prompt, *text]
    (again,) = requests(SAMPLING["greedy"], 1)
    again.prompt = longer
    seen = drive(made, [again], (0,))
    assert seen.cached == len(first.prompt) // 32 * 32 < len(longer) // 32 * 32
    assert seen.texts["0"] == plain.generate(*deep(), longer, SAMPLING["greedy"])


def test_a_model_too_shallow_is_refused_when_the_request_comes() -> None:
    with pytest.raises(InvalidInput, match=r"layer-skip:speedup=4\.0: leaves 1 of 6 layers"):
        engine().add(requests(SAMPLING["greedy"].but(depth="layer-skip:speedup=4"), 1)[0])


def test_it_says_that_it_is_lossy() -> None:
    assert weakest(depth=HALF) is Guarantee.LOSSY
