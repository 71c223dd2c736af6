"""The policy of requests that choose none: named, or the cheapest within the stated loss."""

from __future__ import annotations

import dataclasses
from math import log
from pathlib import Path

import pytest

from redraft import LLM, SamplingParams
from redraft.engine import cache_policy
from redraft.engine.cache_policy import Auto, Chosen, Named, loss
from redraft.engine.curves import Curve, Curves, Interval, Loss
from redraft.errors import InvalidInput, RedraftError
from redraft.models.trained import model_hash
from tests.arrays import BACKEND

LONG = 200
EVICTING, CODES = "keep=scissorhands:budget={tokens}", "codec=int8"


def lost(perplexity: float, right: float) -> dict[str, Loss]:
    """Of a policy that loses these at most."""
    return {
        "books": Loss(Interval(0, 0, log(1 + perplexity))),
        "needle": Loss(Interval(0, 0, 9), Interval(0, 0, right)),
        "guesses": Loss(Interval(0, 0, 9), Interval(0, 0, 0.9)),
    }


def curves(*measured: Curve, model: str = "abc", backend: str = "native") -> Curves:
    """The model finds needles in 8 of 10 texts, and only guesses in another task."""
    right, chance = {"needle": 0.8, "guesses": 0.25}, {"needle": 0.0, "guesses": 0.25}
    return Curves(model, "m", "float32", backend, LONG, 8, right, chance, measured)


QUARTER = Curve(EVICTING, 25.0, 0.25, None, lost(0.001, 0.08))
HALF = Curve(EVICTING, 50.0, 0.5, None, lost(0.03, 0.0))
EIGHT = Curve(CODES, None, 0.53, None, lost(0.0, 0.0))
MORE = Curve("read=page-top-k:tokens={paged}", 25.0, 1.07, 2.0, lost(0.0, 0.0))


def test_the_loss_is_the_worst_of_perplexity_and_of_answers_that_the_model_knows() -> None:
    assert loss(QUARTER, curves()) == pytest.approx(0.1), "0.08 of 0.8"
    assert loss(HALF, curves()) == pytest.approx(0.03)


@pytest.mark.parametrize(
    ("quality", "long", "short"),
    [
        (0.2, {"keep": "scissorhands:budget=100"}, {"codec": "int8"}),
        (0.05, {"keep": "scissorhands:budget=200"}, {"codec": "int8"}),
        (0.01, {"codec": "int8"}, {"codec": "int8"}),
    ],
)
def test_the_cheapest_within_the_loss_serves_prompts_of_the_measured_length(
    quality: float, long: dict[str, str], short: dict[str, str]
) -> None:
    chosen = Auto(quality).open(curves(HALF, QUARTER, EIGHT, MORE))
    assert chosen.params(2 * LONG) == long and chosen.params(LONG - 1) == short
    assert chosen.lengths == ((1,) if long == short else (1, LONG))


def test_nothing_within_the_loss_is_the_whole_cache() -> None:
    chosen = Auto(0.0).open(curves(QUARTER, MORE))
    assert chosen.params(1000) == {} and chosen.lengths == (1,) and chosen.described(1) == "the whole cache"
    assert Auto(0.2).open(curves(QUARTER)).described(LONG) == "keep=scissorhands:budget=50: 25% of the bytes, loss up to 10.0%"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("auto:quality=1", "quality=1.0: must be 0 or more and below 1"),
        ("auto:loss=1", "unknown option 'loss' of auto; allowed: quality"),
        ("scissorhands", "must be seam=name:option=value"),
        ("depth=layer-skip", "depth is no method of the cache; keep, codec, read are allowed"),
        ("keep=scissorhands:budget={tokens}", "a number is needed in place of {tokens}"),
        ("keep=scissorhands:budget=1", "must be"),
        ("keep=nothing", "nothing"),
    ],
)
def test_a_policy_that_is_none_is_refused_before_anything_is_loaded(text: str, why: str) -> None:
    with pytest.raises(RedraftError, match=r"\S") as error:
        LLM("no such model", cache_policy=text)
    assert why in str(error.value) and "\n" not in str(error.value)


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REDRAFT_CACHE", str(tmp_path))
    return tmp_path


def load(policy: str) -> LLM:
    return LLM("embedded", dtype="float32", backend=BACKEND, max_model_len=512, cache_memory=8 << 20, cache_policy=policy)


def test_a_model_that_was_not_measured_says_how_to_measure_it(kept: Path) -> None:
    with pytest.raises(InvalidInput, match="nothing was measured on this model; `redraft bench cache embedded --save` does it"):
        load("auto")


def test_what_was_measured_in_another_way_does_not_count(kept: Path) -> None:
    plain = LLM("embedded", dtype="float32", max_model_len=64, cache_memory=8 << 20)
    curves(EIGHT, model=model_hash(plain.runner)).save()
    with pytest.raises(InvalidInput, match=f"measured with dtype float32 and backend native, this is float32 and {BACKEND}"):
        load("auto:quality=0.05")


def test_few_texts_are_no_ground_for_a_choice(kept: Path) -> None:
    plain = LLM("embedded", dtype="float32", backend=BACKEND, max_model_len=64, cache_memory=8 << 20)
    few = dataclasses.replace(curves(EIGHT, model=model_hash(plain.runner), backend=BACKEND), texts=7)
    few.save()
    with pytest.raises(InvalidInput, match="measured on 7 texts a task, 8 or more are needed"):
        load("auto:quality=0.05")


def test_requests_get_it_unless_they_choose(kept: Path) -> None:
    plain = LLM("embedded", dtype="float32", backend=BACKEND, max_model_len=512, cache_memory=8 << 20)
    curves(QUARTER, EIGHT, model=model_hash(plain.runner), backend=BACKEND).save()
    llm = load("auto:quality=0.1")
    assert isinstance(llm.cache_policy, Chosen)
    long, short = [5] * (LONG + 40), [5] * 20
    fields = {"temperature": 0, "max_tokens": 3}

    def chosen(prompt: list[int], **more: object) -> tuple[object, object]:
        output = llm.generate({"prompt_token_ids": prompt}, **fields, **more)[0]
        assert output.request is not None
        return output.request.params.keep, output.request.params.codec

    assert chosen(long) == ("scissorhands:budget=60", None)
    assert chosen(short) == (None, "int8")
    assert chosen(long, keep="none") == (None, None), "the request chose the whole cache"
    assert chosen(long, read="page-top-k") == (None, None)
    output = llm.generate({"prompt_token_ids": long}, **fields)[0]
    assert output.guarantee == llm.guarantee_of(SamplingParams(keep="scissorhands:budget=60")).label != "same text"
    assert llm.embed({"prompt_token_ids": short})[0].tolist() == plain.embed({"prompt_token_ids": short})[0].tolist()


def test_a_named_policy_that_the_model_refuses_is_an_error_at_the_start() -> None:
    with pytest.raises(RedraftError, match="a keep policy cannot evict from encoded pages"):
        load("keep=scissorhands+codec=int4")
    found = cache_policy.named("keep=scissorhands:budget=64+codec=int8")
    assert isinstance(found, Named) and found.params(1) == {"keep": "scissorhands:budget=64", "codec": "int8"}


def test_the_cache_of_chunks_is_plain_under_a_policy() -> None:
    """Blocks that a policy stores in another form are nobody else's, so texts for the cache get none."""
    llm = load("codec=int8")
    head, chunk = "def f(x):\n", "    return x\n" * 24
    assert llm.cache([chunk], sink=head)[0] > 64
    assert len(llm.engine.table.prefix.nodes) > 2, "its blocks are published"
    output = llm.generate({"segments": [head, chunk, "    pass\n" * 9, "def g(y):"]}, reuse="cacheblend", max_tokens=2)[0]
    assert output.cached_tokens >= 64
