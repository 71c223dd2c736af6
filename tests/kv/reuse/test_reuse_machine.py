"""Reuse methods beside each other, with edits, segments, preemption and aborts: the page table stays whole, and plain texts are what they
are without all this."""

from __future__ import annotations

from functools import cache

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from redraft import registry
from redraft.config import SamplingParams
from redraft.core.sequence import Request
from redraft.engine.engine import Engine
from tests.contracts import identity
from tests.kv.reuse.joined import CHUNKS, HEAD, LONGEST, joined

NEW = SamplingParams(temperature=0.9, max_tokens=7, seed=3)
OPTIONS = {
    "ape": "temperature=0.6,scale=0.7",
    "cache-craft": "alpha=0.6",
    "cacheblend": "ratio=0.3",
    "kvshare": "ratio=0.5,spread=0,window=3,later=4,every=2",
    "pie": "shortest=4",
}  # with which a method has an effect on these texts
ORDERS = ((2, 0, 3, 1), (3, 1), (1, 0, 2), (2, 0, 1), (0,), (3, 2, 1))
METHODS = [f"{name}:{OPTIONS[name]}" for name in registry.METHODS["reuse"] if name in OPTIONS]


def asked(name: str, order: tuple[int, ...], reuse: str, salt: str, params: SamplingParams = NEW) -> Request:
    """A prompt of chunks. Methods that edit get them as the text after an edit; every second kvshare finds them by itself."""
    made = joined(name, order, reuse, params, salt)
    if reuse.startswith("pie"):
        made.chunks, made.before = [], [*HEAD, *(token for i in ORDERS[0] for token in CHUNKS[i])]
    elif reuse.startswith("kvshare") and len(order) % 2:
        made.chunks = []
    return made


@cache
def plainly(order: tuple[int, ...]) -> tuple[int, ...]:
    engine = identity.engine(max_model_len=LONGEST, sharing=False)
    return tuple(identity.drive(engine, [asked("plain", order, "", "")], [0]).texts["plain"])


act = st.one_of(
    st.tuples(st.just("add"), st.sampled_from(ORDERS), st.sampled_from(["", *METHODS]), st.sampled_from(["", "tenant"])),
    st.tuples(st.sampled_from(["preempt", "abort"]), st.integers(0, 7)),
    st.tuples(st.just("step"), st.integers(1, 4)),
    st.tuples(st.just("forget")),
)


def run(engine: Engine, acts: list[tuple]) -> tuple[dict[str, list[int]], dict[str, Request]]:  # type: ignore[type-arg]
    texts: dict[str, list[int]] = {}
    requests: dict[str, Request] = {}

    def step() -> None:
        for event in engine.step():
            assert event.error is None, event.error
            texts[event.request.id] += event.tokens
        engine.memory.check()

    for kind, *args in acts:
        if kind == "add":
            name = str(len(texts))
            requests[name], texts[name] = asked(name, *args), []
            engine.add(requests[name])
        elif kind == "step":
            for _ in range(args[0]):
                step()
        elif kind == "forget":
            engine.table.forget()
        elif engine.running:
            seq = engine.running[args[0] % len(engine.running)]
            if kind == "preempt":
                engine._preempt(seq)
            else:
                engine.abort(seq.request.id)
                requests.pop(seq.request.id, None)
        engine.memory.check()
    for _ in range(3000):
        if not engine.has_work:
            break
        step()
    assert not engine.has_work, "no progress"
    return texts, requests


@settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.lists(act, min_size=4, max_size=24), st.sampled_from([12, 40]), st.sampled_from([8, 40, 512]))
def test_anything_may_happen(acts: list[tuple], pool: int, chunk: int) -> None:  # type: ignore[type-arg]
    engine = identity.engine(pool=pool, chunk=chunk, max_model_len=LONGEST)
    texts, requests = run(engine, acts)
    for name, request in requests.items():
        assert len(texts[name]) == NEW.max_tokens
        if not request.reuse:
            length = len(request.prompt)
            order = next(order for order in ORDERS if joined("", order).prompt == request.prompt)
            assert length and tuple(texts[name]) == plainly(order), f"a plain text beside {[one.reuse for one in requests.values()]}"
    assert engine.memory.used() == 0 and not engine.outputs
    assert not engine.chunk_texts._texts and not engine.chunk_texts._lacking


@pytest.mark.parametrize("reuse", METHODS)
def test_every_method_survives_all_of_it(reuse: str) -> None:
    """The same for each alone, in a fixed order of events that reaches learning, repairs, and both ends."""
    acts: list[tuple] = []  # type: ignore[type-arg]
    for i, order in enumerate(ORDERS * 2):
        acts += [("add", order, reuse, "tenant" if i % 4 == 3 else ""), ("step", 1 + i % 3), ("preempt", i), ("step", 5)]
        acts += [("abort", i)] if i % 3 == 2 else [("add", order, "", "")]
    engine = identity.engine(pool=60, chunk=24, max_model_len=LONGEST)
    texts, requests = run(engine, acts)
    assert sum(request.reused_tokens for request in requests.values()) > 30, "nothing was reused"
    for name, request in requests.items():
        if not request.reuse:
            order = next(order for order in ORDERS if joined("", order).prompt == request.prompt)
            assert tuple(texts[name]) == plainly(order)
    assert engine.memory.used() == 0
