"""One forward pass: layers by halves, states that start as vectors, and what changes them between layers."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from redraft import registry
from redraft.core.batch import Batch
from redraft.core.layers import Layers
from redraft.core.plan import Work
from redraft.core.taps import Taps
from redraft.core.testing import sequence, view
from redraft.core.tree import EMPTY
from redraft.models.runner import Runner
from redraft.ops.arrays import array
from redraft.ops.backend import Feature, Linear, NormWeights, Weights
from tests.arrays import BACKEND
from tests.contracts import plain
from tests.layer_skipping.deep import ALL, LAYERS, deep, logits

TEXTS = [[3, 1, 4, 1, 5, 9, 2, 6], [20, 19, 18, 17, 2, 3, 4, 5]]
HALVES, SOME, NONE = Layers(frozenset({0, 1, 3, 5}), frozenset({0, 2, 3, 4})), Layers.whole({0, 3, 4, 5}), Layers.whole(())
STATES = Taps(hidden=frozenset({LAYERS - 1}))


def runner(backend: str, dtype: str = "float64", blocks: int = 20) -> Runner:
    made, (spec, weights) = registry.backend(backend)(dtype), deep()

    def vector(weights: NormWeights | None) -> NormWeights | None:
        return None if weights is None else NormWeights(made.place(weights.weight.astype(dtype)))

    def matrix(weights: Linear | None, gated: bool = False) -> Any:
        return None if weights is None else made.pack(Linear(weights.weight.astype(dtype)), gated)

    layers = [
        replace(one, attn_norm=vector(one.attn_norm), mlp_norm=vector(one.mlp_norm), qkv=matrix(one.qkv), out=matrix(one.out),
                up=matrix(one.up, True), down=matrix(one.down))
        for one in weights.layers
    ]  # fmt: skip
    embed = made.place(weights.embed.astype(dtype))
    own = Weights(embed, matrix(weights.head), vector(weights.final_norm), tuple(layers))
    return Runner(spec, own, made, blocks)


def states(runner: Runner, taps: Taps = STATES, **changes: Any) -> plain.Numbers:
    """[texts, rows, hidden]: the last states of both texts in one pass. changes: fields of the batch."""
    works = []
    for i, tokens in enumerate(TEXTS):
        works.append(Work(replace(sequence(tokens), id=i), len(tokens)))
        runner.memory.open(works[-1].seq)
    trees = [EMPTY] * len(works)
    batch = replace(Batch.pack(works, trees, runner.memory.reserve(works, trees)), **changes)
    out = runner.forward(batch, taps)
    for work in works:
        runner.memory.free(work.seq)
    assert out.hidden is not None
    return array(out.hidden[LAYERS - 1]).astype(np.float64).reshape(len(TEXTS), -1, runner.spec.hidden)


def close(found: plain.Numbers, wanted: plain.Numbers) -> None:
    """found: last states; wanted: logits."""
    spec, weights = deep()
    made = plain.linear(plain.rms(found, weights.final_norm, spec.final_norm), weights.head)
    assert np.allclose(made, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", ["numpy", "torch", "reference"])
@pytest.mark.parametrize("sets", [(HALVES, HALVES), (SOME, SOME), (HALVES, None), (SOME, HALVES), (None, NONE)])
def test_rows_run_the_halves_of_their_layers(backend: str, sets: tuple[Layers | None, Layers | None]) -> None:
    found = states(runner(backend), layers=list(sets))
    for tokens, own, state in zip(TEXTS, sets, found, strict=True):
        chosen = own or Layers.whole(ALL)
        close(state, logits(tokens, [chosen.attention] * len(tokens), feeds=[chosen.mlp] * len(tokens)))


@pytest.mark.parametrize("sets", [(SOME, SOME), (SOME, None), (HALVES, SOME), (None, NONE)])
def test_whole_layers_that_follow_each_other_run_in_one_call(monkeypatch: pytest.MonkeyPatch, sets: tuple[Layers | None, ...]) -> None:
    """With the bits of the layers one by one."""
    fused = runner("native", "float32")
    if Feature.RUN not in fused.backend.features:
        pytest.skip("needs the native kernels")
    calls: list[tuple[int, int]] = []
    run = fused.backend.run

    def counted(first: int, last: int, h: Any, *rest: Any) -> Any:
        calls.append((first, last))
        return run(first, last, h, *rest)

    monkeypatch.setattr(fused.backend, "run", counted)
    found = states(fused, layers=list(sets))
    if sets == (SOME, SOME):
        assert calls == [(0, 1), (3, 6)]
    single = runner("native", "float32")
    monkeypatch.setattr(single.backend, "run", lambda *of: None)
    assert np.array_equal(found, states(single, layers=list(sets)))


@dataclass(frozen=True)
class Shift:
    cuts: frozenset[int]
    by: float

    def act(self, layer: int, h: Any, positions: Any) -> Any:
        return h + self.by * (layer + 1) * (positions[0] == 0)


@pytest.mark.parametrize("backend", ["numpy", "native"])
def test_states_change_before_the_layers_that_are_named_and_in_their_text_only(backend: str) -> None:
    made = runner(backend, "float32")
    first, second = states(made)
    changed, same = states(made, between=[Shift(frozenset({0, 3}), 0.0), None])
    assert np.array_equal(same, second) and np.array_equal(changed, first), "to cut a run of layers changes no bit"
    before, same = states(made, between=[Shift(frozenset({2}), 0.5), None])
    assert np.array_equal(same, second) and not np.allclose(before, first, atol=1e-2)
    start = array(made.weights.embed)[TEXTS[0]] + np.float32(0.5)
    by_hand, _ = states(made, vectors=(np.arange(8), start))
    assert np.array_equal(states(made, between=[Shift(frozenset({0}), 0.5), None])[0], by_hand)


@pytest.mark.parametrize("backend", [BACKEND, "numpy", "native"])
def test_rows_start_from_vectors(backend: str) -> None:
    made = runner(backend, "float32")
    table = deep()[1].embed.astype(np.float32)
    plainly = states(made)
    rows = np.array([1, 2, 11])  # two of the first text and one of the second
    flat = np.array([token for text in TEXTS for token in text])
    assert np.array_equal(states(made, vectors=(rows, table[flat[rows]])), plainly)
    others = states(made, vectors=(rows, table[flat[rows]] * 1.5))
    assert np.array_equal(others[0, 0], plainly[0, 0]) and np.array_equal(others[1, :3], plainly[1, :3])
    assert not np.allclose(others[0, 1:], plainly[0, 1:], atol=1e-3) and not np.allclose(others[1, 3:], plainly[1, 3:], atol=1e-3)


def test_a_whole_pass_in_one_call_has_the_states_of_single_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows start from embeddings or all from vectors; only the last layer's states are asked for."""
    whole = runner("native", "float32")
    if Feature.RUN not in whole.backend.features:
        pytest.skip("needs the native kernels")
    calls: list[str] = []
    call = whole.backend._call
    monkeypatch.setattr(whole.backend, "_call", lambda name, *given: (calls.append(name), call(name, *given))[1])
    single = runner("native", "float32")
    monkeypatch.setattr(single.backend, "forward", lambda *of: None)
    table = deep()[1].embed.astype(np.float32)
    start = (np.arange(16), 1.5 * table[[token for text in TEXTS for token in text]])
    for changes in ({}, {"vectors": start}):
        assert np.array_equal(states(whole, **changes), states(single, **changes))
        assert calls == ["rd_pass"]
        calls.clear()
    few = start[0][3:], start[1][3:]
    assert np.array_equal(states(whole, vectors=few), states(single, vectors=few)) and "rd_pass" not in calls


def test_a_prompt_may_be_given_as_vectors_but_for_rows_of_nan() -> None:
    made = sequence(TEXTS[0])
    given = np.full((8, 4), np.nan, np.float32)
    given[2], given[5] = 1, 2
    made.request.vectors = given
    beside = sequence(TEXTS[1])

    for seq in (made, beside):
        seq.stored = 2
    works = [Work(beside, 3), Work(made, 4)]
    batch = Batch.pack(works, [EMPTY] * 2, view(works))
    assert batch.vectors is not None
    assert batch.vectors[0].tolist() == [3, 6] and batch.vectors[1].tolist() == [[1] * 4, [2] * 4]
    assert Batch.pack(works[:1], [EMPTY], view(works[:1])).vectors is None
