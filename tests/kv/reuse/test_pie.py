"""PIE: which tokens are reused, and that the reused cache is correct."""

from __future__ import annotations

from random import Random

import hypothesis.strategies as st
import pytest
from hypothesis import given

from redraft.config import SamplingParams
from redraft.core.sequence import Pooling, Request, Wants
from redraft.engine.engine import Engine
from redraft.engine.output import checked
from redraft.errors import InvalidInput, Unsupported
from redraft.kv.reuse.pie import PIE
from tests.arrays import BACKEND
from tests.contracts import identity, plain
from tests.contracts.identity import drive

GREEDY = SamplingParams(temperature=0, max_tokens=6, seed=1, logprobs=5)
OLD = [Random(4).randrange(plain.VOCAB) for _ in range(110)]


def edited(at: int, gone: int, new: int) -> list[int]:
    """OLD with `gone` tokens at `at` replaced by `new` other tokens."""
    return OLD[:at] + [(token + 1) % plain.VOCAB for token in Random(at).choices(range(plain.VOCAB), k=new)] + OLD[at + gone :]


EDITS = {
    "insert": (50, 0, 5),
    "delete": (50, 7, 0),
    "replace, longer": (40, 3, 9),
    "replace, shorter": (40, 9, 3),
    "replace, as long": (60, 4, 4),
    "at the start": (0, 0, 4),
    "first token": (0, 1, 1),
    "at the end": (110, 0, 8),
    "across pages": (30, 40, 35),
    "one token": (70, 1, 0),
}


def request(name: str, tokens: list[int], **extra: object) -> Request:
    return Request(name, list(tokens), GREEDY, **extra)  # type: ignore[arg-type]


def run(engine: Engine, one: Request) -> list[int]:
    return drive(engine, [one], [0]).texts[one.id]


def reported(engine: Engine, one: Request) -> list[float]:
    """Log-probabilities of the likeliest tokens at every position of the text."""
    engine.add(one)
    found = []
    while engine.has_work:
        found += [value for event in checked(engine.step()) for row in event.logprobs for _, value in sorted(row.top)]
    return found


@given(st.lists(st.integers(0, 5), max_size=80), st.lists(st.integers(0, 5), min_size=1, max_size=80), st.integers(1, 4), st.integers(1, 9))
def test_spans_are_equal_tokens_in_order(old: list[int], new: list[int], refresh: int, shortest: int) -> None:
    spans = PIE(refresh=refresh, shortest=shortest).spans(request("new", new, before=old), 0, len)
    at = first = 0
    for span in spans:
        assert span.at >= at and span.first >= first and span.length >= shortest
        assert new[span.at : span.at + span.length] == old[span.first : span.first + span.length]
        assert span.exact == (new[: span.at] == old[: span.first])
        at, first = span.at + span.length, span.first + span.length
    assert at <= max(0, len(new) - refresh)


@pytest.mark.parametrize("edit", EDITS.values(), ids=list(EDITS))
@pytest.mark.parametrize("backend", ["torch", "reference", "numpy"])
def test_one_layer_is_exact(edit: tuple[int, int, int], backend: str) -> None:
    """Keys and values of the first layer depend on token and position only, so reuse is exact there."""
    new = edited(*edit)
    engine = identity.engine(backend=backend, layers=1, max_model_len=160)
    run(engine, request("old", OLD))
    changed = request("new", new, before=OLD, reuse="pie:shortest=4")
    found = reported(engine, changed)
    fresh = identity.engine(backend=backend, layers=1, max_model_len=160, sharing=False)
    assert found == pytest.approx(reported(fresh, request("plain", new)), abs=1e-10)
    assert changed.reused_tokens + (changed.cached_tokens or 0) > 60


def test_a_wrong_rotation_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A control of the test above: without the rotation, keys keep their old positions."""
    from redraft.kv.store import Store

    move = Store.move
    monkeypatch.setattr(Store, "move", lambda store, moves: move(store, [one._replace(delta=0) for one in moves]))
    with pytest.raises(AssertionError):
        test_one_layer_is_exact((40, 3, 9), BACKEND)


def test_an_edit_behind_everything_is_the_prefix_cache() -> None:
    """So is an edit that changes nothing: the tokens are those of a run without a cache, with two layers."""
    for new in (OLD, [*OLD, 3, 4, 5]):
        engine = identity.engine(max_model_len=160)
        run(engine, request("old", OLD))
        text = run(engine, request("new", new, before=OLD, reuse="pie"))
        assert text == run(identity.engine(max_model_len=160, sharing=False), request("plain", new))


def test_edited_pages_are_nobody_elses() -> None:
    """A request for the edited text alone must not get reused slots. The pages of the old text do not change."""
    new = edited(40, 3, 9)
    engine = identity.engine(max_model_len=160)
    before = run(engine, request("old", OLD))
    run(engine, request("new", new, before=OLD, reuse="pie:shortest=4"))
    plainly = request("again", new)
    assert run(engine, plainly) == run(identity.engine(max_model_len=160, sharing=False), request("plain", new))
    assert plainly.cached_tokens == 32  # the page before the edit
    assert run(engine, request("old again", OLD)) == before
    engine.memory.check()


@pytest.mark.parametrize("pool", [40, 8])
def test_with_drafts_in_a_batch_and_chunks(pool: int) -> None:
    """The text does not depend on how tokens were grouped, nor on preemption while the old text is in the cache."""
    new = edited(40, 3, 9)
    texts = set()
    for drafter, chunk in (("none", 512), ("token-recycling", 24), ("random", 512)):
        engine = identity.engine(identity.drafter(drafter, {}), chunk=chunk, pool=pool, max_model_len=160)
        run(engine, request("old", OLD))
        others = [request(f"o{i}", OLD[i : i + 40]) for i in range(3)]
        seen = drive(engine, [request("new", new, before=OLD, reuse="pie:shortest=4"), *others], [0, 0, 1, 1])
        texts.add(tuple(seen.texts["new"]))
    assert len(texts) == 1 or pool < 40


def test_gone_from_the_cache_it_is_computed() -> None:
    new = edited(40, 3, 9)
    engine = identity.engine(max_model_len=160)
    one = request("new", new, before=OLD, reuse="pie")
    assert run(engine, one) == run(identity.engine(max_model_len=160, sharing=False), request("plain", new))
    assert one.reused_tokens == 0


def test_memory_that_others_need_is_not_held() -> None:
    """The pool holds one text only: the old pages are evicted, and the edited text still finishes."""
    new = edited(10, 3, 9)
    engine = identity.engine(max_model_len=160, pool=5)
    run(engine, request("old", OLD))
    text = run(engine, request("new", new, before=OLD, reuse="pie:shortest=4"))
    assert len(text) == GREEDY.max_tokens
    assert engine.memory.used() == 0


def test_refusals() -> None:
    for option in ("refresh", "shortest"):
        with pytest.raises(InvalidInput, match=rf"pie:{option}=0: must be 1 or more"):
            PIE(**{option: 0})
    engine = identity.engine(max_model_len=160)
    with pytest.raises(Unsupported, match="reuse pie takes over plain pages"):
        engine.add(Request("r", OLD, GREEDY.but(codec="int8"), before=OLD, reuse="pie"))
    with pytest.raises(InvalidInput, match=r"before\[0\] = 99"):
        engine.add(Request("r", OLD, GREEDY, before=[99], reuse="pie"))


def test_a_prompt_that_must_run_whole_takes_nothing_over() -> None:
    engine = identity.engine()
    for wants, name in ((Wants(prompt_logprobs=1), "prompt_logprobs"), (Wants(pooling=Pooling.MEAN), "mean embeddings")):
        request = Request("r", [1, 2, 3], SamplingParams(temperature=0, max_tokens=1), wants=wants, before=[1, 2], reuse="pie")
        with pytest.raises(Unsupported, match=f"^reuse pie: {name} need the whole prompt computed"):
            engine.add(request)
        assert not engine.has_work and not engine.outputs and not request.sequences
