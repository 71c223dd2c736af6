"""CacheBlend: which rows run again, and that all of them give the bits of a computed prompt."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np
import pytest

from redraft import LLM, registry
from redraft.core.sequence import Request
from redraft.engine.output import checked
from redraft.errors import InvalidInput, Unsupported
from redraft.kv.reuse.cacheblend import CacheBlend
from redraft.kv.reuse.reuse import Pass, Spliced
from redraft.ops import library
from tests.arrays import BACKEND
from tests.contracts import identity
from tests.kv.reuse.joined import CHUNKS, GREEDY, HEAD, LONGEST, QUESTION, joined, reported, text_of

SOME = "cacheblend:ratio=0.3"


def plainly(backend: str = BACKEND, **options: Any) -> list[float]:
    return reported(identity.engine(backend=backend, max_model_len=LONGEST, sharing=False, **options), joined("plain"))


def passes(method: CacheBlend, changes: np.ndarray) -> list[Pass]:
    """What runs again if values of layer `check` change by `changes` f32[rows] when they are computed."""
    rows, asked = np.arange(10, 10 + len(changes), dtype=np.int32), 0

    def read(layer: int) -> tuple[Any, Any]:
        nonlocal asked
        assert layer == method.check
        asked += 1
        values = np.zeros((2, len(rows), 4), np.float32) if asked == 1 else np.tile(changes[:, None], (2, 1, 4)).astype(np.float32)
        return values, values

    made: Generator[Pass, None, None] = method.repair(Spliced(rows, 6, read, joined("new")))
    return list(made)


def test_the_rows_that_differ_most_run_again() -> None:
    first, second = passes(CacheBlend(ratio=0.4, check=2), np.array([0, 3, -5, 1, 2]))
    assert first.layers == 3 and first.rows.tolist() == [10, 11, 12, 13, 14]
    assert second.layers is None and second.rows.tolist() == [11, 12]
    assert [one.rows.tolist() for one in passes(CacheBlend(ratio=1), np.ones(3))] == [[10, 11, 12]]
    assert passes(CacheBlend(ratio=0), np.ones(3)) == []
    assert [one.rows.tolist() for one in passes(CacheBlend(ratio=0.5), np.ones(4))][1] == [10, 11], "equal differences: the first rows"
    assert [one.rows.tolist() for one in passes(CacheBlend(ratio=0.5, nearness=0.5), np.ones(4))][1] == [12, 13]


@pytest.mark.parametrize("backend", ["torch", "reference", "numpy", "native"])
def test_all_rows_are_the_computed_prompt(backend: str) -> None:
    if backend == "native":
        return  # in float32 and bfloat16, below
    engine = identity.engine(backend=backend, max_model_len=LONGEST)
    request = joined("new", reuse="cacheblend:ratio=1")
    assert reported(engine, request) == pytest.approx(plainly(backend), abs=1e-10)
    assert request.reused_tokens + (request.cached_tokens or 0) == len(HEAD) + sum(map(len, CHUNKS))
    assert request.repaired_tokens == sum(map(len, CHUNKS)) - len(CHUNKS[2]), "the first chunk stands where it was computed"


def test_one_layer_is_exact() -> None:
    """Keys and values of the first layer depend on token and position only."""
    engine = identity.engine(layers=1, max_model_len=LONGEST)
    assert reported(engine, joined("new", reuse="cacheblend:ratio=0,check=0")) == pytest.approx(plainly(layers=1), abs=1e-10)


def test_a_wrong_rotation_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A control of the test above."""
    from redraft.kv.store import Store

    move = Store.move
    monkeypatch.setattr(Store, "move", lambda store, moves: move(store, [one._replace(delta=0) for one in moves]))
    with pytest.raises(AssertionError):
        test_one_layer_is_exact()


def values(request: Request) -> np.ndarray:
    """Those of all layers of the prompt, once it is in the cache."""
    engine = identity.engine(layers=6, max_model_len=LONGEST)
    engine.add(request)
    while not (seq := next((one for one in engine.running if one.request is request and one.generated), None)):
        checked(engine.step())
    rows = np.arange(len(request.prompt), dtype=np.int32)
    return np.stack([engine.memory.paged.layer(seq, rows, layer)[1] for layer in range(6)])


def test_more_rows_are_nearer_to_the_computed_prompt() -> None:
    truth = values(joined("plain"))
    away = [np.abs(values(joined("new", reuse=f"cacheblend:ratio={ratio}")) - truth).mean() for ratio in (0, 0.3, 0.6, 1)]
    assert away[0] > away[1] > away[2] > away[3] and away[3] < 1e-6, away


def test_one_chunk_in_front_is_the_prefix_cache() -> None:
    engine = identity.engine(max_model_len=LONGEST)
    request = joined("new", (2,), reuse=SOME)
    assert reported(engine, request) == pytest.approx(
        reported(identity.engine(max_model_len=LONGEST, sharing=False), joined("plain", (2,))), abs=1e-12
    )
    assert (request.cached_tokens or 0) + request.reused_tokens == len(HEAD) + len(CHUNKS[2]) and not request.repaired_tokens


def test_steps_drafts_batches_and_preemption_change_nothing() -> None:
    alone = text_of(identity.engine(max_model_len=LONGEST), joined("new", reuse=SOME, params=GREEDY.but(max_tokens=12)))
    for drafter, chunk, pool in (("none", 8, 40), ("random", 24, 40), ("token-recycling", 512, 40), ("none", 33, 17)):
        engine = identity.engine(identity.drafter(drafter, {}), chunk=chunk, pool=pool, max_model_len=LONGEST)
        others = [joined(f"o{i}", order, reuse, GREEDY) for i, (order, reuse) in enumerate([((1, 3), ""), ((3, 1, 0), SOME), ((0,), "")])]
        seen = identity.drive(engine, [joined("new", reuse=SOME, params=GREEDY.but(max_tokens=12)), *others], [0, 0, 1, 3])
        assert pool < 40 or seen.texts["new"] == alone, (drafter, chunk)


def test_preempted_while_rows_run_again() -> None:
    """The text starts again, finds its chunks and repairs them anew."""
    truth = text_of(identity.engine(max_model_len=LONGEST), joined("new", reuse=SOME))
    engine = identity.engine(chunk=8, max_model_len=LONGEST)
    engine.add(joined("new", reuse=SOME))
    stopped, tokens = 0, []
    while engine.has_work:
        seq = next((one for one in engine.running if one.request.id == "new"), None)
        if seq is not None and seq.rerun is not None and stopped < 3:
            stopped += 1
            engine._preempt(seq)
            engine.memory.check()
        tokens += [token for event in checked(engine.step()) for token in event.tokens]
    assert stopped == 3 and tokens == truth
    assert engine.memory.used() == 0


def test_an_abort_while_rows_run_again_leaks_nothing() -> None:
    engine = identity.engine(chunk=8, max_model_len=LONGEST)
    engine.add(joined("new", reuse=SOME))
    while not any(seq.rerun is not None for seq in engine.running):
        checked(engine.step())
        engine.memory.check()
    assert engine.abort("new")
    engine.memory.check()
    while engine.has_work:
        engine.step()
    assert engine.memory.used() == 0


def test_two_texts_of_one_request() -> None:
    engine = identity.engine(max_model_len=LONGEST)
    seen = identity.drive(engine, [joined("new", reuse=SOME, params=GREEDY.but(n=2))], [0])
    assert seen.texts["new/0"] == seen.texts["new/1"] == text_of(identity.engine(max_model_len=LONGEST), joined("new", reuse=SOME))


def test_blended_blocks_are_nobody_elses() -> None:
    engine = identity.engine(max_model_len=LONGEST)
    text_of(engine, joined("new", reuse=SOME))
    again = joined("plain")
    assert reported(engine, again) == pytest.approx(plainly(), abs=1e-12)
    assert again.cached_tokens == 32, "the head and the first chunk"
    engine.memory.check()


def test_a_tenant_never_takes_another_ones_chunks() -> None:
    engine = identity.engine(max_model_len=LONGEST)
    text_of(engine, joined("new", reuse=SOME, salt="one"))
    nodes = len(engine.table.prefix.nodes)
    other = joined("other", reuse=SOME, salt="two")
    text_of(engine, other)
    assert len(engine.table.prefix.nodes) > nodes, "it computed the chunks for itself"
    assert {node.key[0] for node in engine.table.prefix.nodes.values()} == {"one", "two"}


def test_a_chunk_that_is_gone_is_computed_in_its_place() -> None:
    """The pool holds little more than the prompt, so that chunks leave the cache before the prompt runs."""
    engine = identity.engine(pool=7, max_model_len=LONGEST)
    request = joined("new", reuse=SOME)
    assert len(text_of(engine, request)) == GREEDY.max_tokens
    assert request.reused_tokens < sum(map(len, CHUNKS))
    assert engine.memory.used() == 0


@pytest.mark.skipif(library.load() is None, reason="no compiled kernels here")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_natively_all_rows_have_the_bits_of_the_computed_prompt(dtype: str) -> None:
    llm = LLM("embedded", backend="native", dtype=dtype, draft="none", max_model_len=512, cache_memory=64 << 20, threads=1)
    segments = [
        "def head():\n",
        "    return 1\n\n\n" * 6,
        "class Shape:\n    area = 3\n" * 5,
        "import os\nimport sys\n" * 7,
        "def size(self):\n",
    ]
    truth = llm.generate({"segments": segments}, temperature=0, max_tokens=8, logprobs=5)[0]
    llm.engine.table.forget()
    found = llm.generate({"segments": segments}, temperature=0, max_tokens=8, logprobs=5, reuse="cacheblend:ratio=1")[0]
    assert found.outputs[0].token_ids == truth.outputs[0].token_ids
    assert found.outputs[0].logprobs == truth.outputs[0].logprobs, "to the last bit"
    assert found.repaired_tokens and found.reused_tokens > 90


def test_refusals() -> None:
    for text, message in (("ratio=1.5", "must be at most 1|0 to 1"), ("check=-1", "0 or more")):
        with pytest.raises(InvalidInput, match=message):
            identity.engine(max_model_len=LONGEST).add(joined("r", reuse=f"cacheblend:{text}"))
    with pytest.raises(Unsupported, match=r"cacheblend:check=2: the model has layers 0 to 1"):
        identity.engine(max_model_len=LONGEST).add(joined("r", reuse="cacheblend:check=2"))
    for spans in ([(0, 4)], [(1, 5), (4, 9)], [(5, 5)], [(5, 1000)], [(5, 5 + sum(map(len, CHUNKS)) + len(QUESTION))]):
        request = joined("r", reuse=SOME)
        request.chunks = spans
        with pytest.raises(InvalidInput, match=r"chunks: \("):
            identity.engine(max_model_len=LONGEST).add(request)
    assert isinstance(joined("r"), Request)


@pytest.mark.parametrize("drafter", [name for name in sorted(registry.METHODS["draft"]) if identity.complete("draft", name)])
def test_every_drafter_keeps_the_text(drafter: str) -> None:
    layers = identity.DEEPER.get(drafter, 2)
    params = GREEDY.but(max_tokens=10)
    truth = text_of(identity.engine(layers=layers, max_model_len=LONGEST), joined("new", (2, 0), SOME, params))
    engine = identity.engine(identity.drafter(drafter, {}), layers=layers, chunk=24, max_model_len=LONGEST)
    seen = identity.drive(engine, [joined("new", (2, 0), SOME, params), joined("other", (1,))], [0, 2])
    assert seen.texts["new"] == truth
