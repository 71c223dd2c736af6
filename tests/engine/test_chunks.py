"""Texts that are computed for the cache before a request that reuses them."""

from __future__ import annotations

from random import Random

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from redraft.config import SamplingParams
from redraft.core.sequence import Request
from redraft.engine.engine import Engine
from tests.contracts import identity, plain
from tests.kv.reuse.joined import CHUNKS, LONGEST, joined, text_of, together

SOME = "cacheblend:ratio=0.3"


def steps(engine: Engine) -> list[str]:
    """Runs all; the ids of the requests with events, and each step leaves the table whole."""
    found = []
    while engine.has_work:
        found += [event.request.id for event in engine.step()]
        engine.memory.check()
    return found


def test_nobody_sees_them() -> None:
    engine = identity.engine(max_model_len=LONGEST)
    engine.add(joined("new", reuse=SOME))
    assert len(engine.waiting) == 1 + len(CHUNKS) and engine.waiting[-1].request.id == "new", "they run before the request"
    assert set(steps(engine)) == {"new"}
    assert not engine.outputs and not engine.chunk_texts._texts and not engine.chunk_texts._lacking


def test_a_text_that_several_lack_is_computed_once() -> None:
    engine = identity.engine(max_model_len=LONGEST)
    engine.add(joined("one", (0, 1, 2), SOME))
    engine.add(joined("two", (2, 1, 3), SOME))
    assert len(engine.waiting) == 2 + 4
    assert set(steps(engine)) == {"one", "two"}
    engine.add(joined("three", (3, 2, 0), SOME))
    assert len(engine.waiting) == 1, "all are in the cache"
    steps(engine)


def test_the_text_does_not_depend_on_what_was_in_the_cache() -> None:
    cold = identity.engine(max_model_len=LONGEST)
    warm = identity.engine(max_model_len=LONGEST)
    text_of(warm, joined("before", (3, 1), SOME))
    assert text_of(cold, joined("new", reuse=SOME)) == text_of(warm, joined("new", reuse=SOME))


def test_an_abort_leaves_the_others_alone() -> None:
    engine = identity.engine(max_model_len=LONGEST, chunk=16)
    truth = text_of(identity.engine(max_model_len=LONGEST), joined("two", (1, 2), SOME))
    for name, order in (("one", (0, 1)), ("two", (1, 2))):
        engine.add(joined(name, order, SOME))
    engine.step()
    assert engine.abort("one")
    text: list[int] = []
    while engine.has_work:
        text += [token for event in engine.step() for token in event.tokens]
    assert text == truth and engine.memory.used() == 0 and not engine.chunk_texts._lacking


def test_an_abort_ends_the_texts_that_nobody_else_waits_for() -> None:
    engine = identity.engine(max_model_len=LONGEST, chunk=16)
    engine.add(joined("one", (0, 1, 3), SOME))
    engine.add(joined("two", (1,), SOME))
    engine.step()
    assert engine.abort("one")
    left = {seq.request.id for seq in (*engine.waiting, *engine.running)}
    assert left == {"two", *engine.chunk_texts._lacking["two"]} and len(left) == 2
    assert set(steps(engine)) == {"two"} and engine.memory.used() == 0
    engine.add(joined("three", (0, 3), SOME))
    engine.step()
    assert engine.abort("three") and not engine.has_work and not engine.chunk_texts._texts


def test_what_texts_have_in_common_is_computed_once() -> None:
    """They wait for the first one, so the head is in the cache before the others run."""
    engine = identity.engine(max_model_len=LONGEST)
    head = [token % plain.VOCAB for token in range(64)]
    prompt, spans = list(head), []
    for chunk in CHUNKS[:3]:
        spans.append((len(prompt), len(prompt) + len(chunk)))
        prompt += chunk
    engine.add(Request("r", [*prompt, 1], SamplingParams(temperature=0, max_tokens=1), reuse=SOME, chunks=spans))
    texts = [seq.request for seq in engine.waiting if seq.request.hidden]
    assert set(steps(engine)) == {"r"} and [text.cached_tokens for text in texts] == [0, 64, 64]


def test_a_text_that_fails_is_computed_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = identity.engine(max_model_len=LONGEST)
    start = engine._start

    def fails(seq: object, matched: int) -> None:
        if seq.request.hidden:  # type: ignore[attr-defined]
            raise RuntimeError("planted")
        start(seq, matched)  # type: ignore[arg-type]

    monkeypatch.setattr(engine, "_start", fails)
    request = joined("new", reuse="cacheblend:ratio=1")
    assert text_of(engine, request) == text_of(identity.engine(max_model_len=LONGEST), joined("plain"))
    assert request.reused_tokens == 0


def test_a_text_longer_than_the_context_is_computed_in_its_place() -> None:
    """The filler behind a chunk may be too much, where the prompt itself fits."""
    prompt = [Random(1).randrange(plain.VOCAB) for _ in range(90)]
    engine = identity.engine(max_model_len=95)
    request = Request("r", prompt, SamplingParams(temperature=0, max_tokens=2), reuse=SOME, chunks=[(2, 80)])
    engine.add(request)
    assert len(engine.waiting) == 1
    assert set(steps(engine)) == {"r"}


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_mix_of_requests_leaves_the_table_whole(data: st.DataObject) -> None:
    """Segments, salts, ratios, pools, chunks, aborts and preemptions; every text ends, and nothing is held."""
    dice = Random(data.draw(st.integers(0, 10**6)))
    engine = identity.engine(max_model_len=LONGEST, pool=dice.choice([9, 14, 40]), chunk=dice.choice([8, 40, 512]))
    for i in range(5):
        order = tuple(dice.sample(range(4), dice.randrange(1, 4)))
        reuse = dice.choice(["", "cacheblend:ratio=0", SOME, "cacheblend:ratio=1"])
        params = SamplingParams(temperature=0, max_tokens=dice.randrange(1, 6), seed=1, n=dice.choice([1, 1, 2]))
        engine.add(joined(str(i), order, reuse, params, salt=dice.choice(["", "a"])))
        for _ in range(dice.randrange(4)):
            engine.step()
            engine.memory.check()
            match dice.randrange(8):
                case 0:
                    engine.abort(str(dice.randrange(i + 1)))
                case 1 if len(engine.running) > 1:
                    engine._preempt(engine.running[-1])
            engine.memory.check()
    steps(engine)
    assert engine.memory.used() == 0 and not engine.outputs and not engine.chunk_texts._lacking


def test_chunks_without_a_method_are_a_plain_prompt() -> None:
    engine = identity.engine(max_model_len=LONGEST)
    request = joined("new")
    request.chunks = [(5, 20)]
    engine.add(request)
    assert len(engine.waiting) == 1
    steps(engine)
    assert together(identity.engine(max_model_len=LONGEST), joined("a", (0,)), joined("b", (1,), SOME)).texts.keys() == {"a", "b"}
