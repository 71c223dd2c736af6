"""AWRS: the text of a mask over the whole vocabulary for the same seed, by few questions; what a predicate is asked; what is refused."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import pytest

from redraft import LLM, SamplingParams
from redraft.card import Card, Guarantee
from redraft.errors import InvalidInput, UnknownMethod
from redraft.sample.controls.awrs import AWRS, Asking
from redraft.sample.controls.control import Stage
from redraft.sample.sampler import Sampler
from tests.sample.toy import begun

PROMPT = "def f(x):\n"


def brackets(text: str, ended: bool) -> bool:
    """Brackets that are closed in order, at most three deep, and small letters."""
    depth = 0
    for letter in text:
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if not (0 <= depth <= 3 and (letter in "()\n " or letter.islower())):
            return False
    return not ended or (depth == 0 and len(text) > 8)


@dataclass(frozen=True)
class Mask:
    """Asks about every token that the filters left, before one is drawn."""

    awrs: AWRS
    stage: ClassVar[Stage] = Stage.FILTERED
    card: ClassVar[Card] = Card("A mask", "none", Guarantee.LOSSY)

    def open(self, vocabulary: Any) -> Mask:
        object.__setattr__(self, "asked", self.awrs.open(vocabulary))
        return self

    def begin(self, seq: Any) -> Masking:
        return Masking(self.asked.begin(seq))  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Masking:
    asking: Asking

    def apply(self, row: Any) -> None:
        row.keep([place for place, token in enumerate(row.ids.tolist()) if self.asking.accepts(row.seq, row.drafted, token)])


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("embedded", draft="token-recycling", cache_memory=1 << 26, threads=1)


@pytest.mark.parametrize(
    "way", [{"temperature": 0}, {"temperature": 1.0, "top_p": 0.98, "n": 2}, {"temperature": 0.8, "top_k": 300}], ids=str
)
def test_the_text_of_the_whole_mask(llm: LLM, way: dict[str, Any]) -> None:
    calls = []

    def counted(text: str, ended: bool) -> bool:
        calls.append(text)
        return brackets(text, ended)

    params = SamplingParams(seed=5, max_tokens=16, **way)
    lazy = llm.generate(PROMPT, params.but(control=AWRS(counted)))[0]
    asked = len(calls)
    masked = llm.generate(PROMPT, params.but(control=Mask(AWRS(counted)), draft="none"))[0]
    assert [one.token_ids for one in lazy.outputs] == [one.token_ids for one in masked.outputs]
    assert all(brackets(one.text, one.finish_reason == "stop") for one in lazy.outputs)
    assert asked < (len(calls) - asked) / 3


def test_always_true_is_plain_and_asks_once_a_token(llm: LLM) -> None:
    calls = []
    params = SamplingParams(temperature=0.9, seed=3, max_tokens=30, draft="none")
    free = llm.generate(PROMPT, params.but(control=AWRS(lambda text, ended: calls.append(text) is None)))[0].outputs[0]
    assert free.token_ids == llm.generate(PROMPT, params)[0].outputs[0].token_ids
    assert len(calls) == len(free.token_ids)
    assert all(b.startswith(a) for a, b in pairwise(calls)) and calls[-1].strip() == free.text.strip()


def test_exactly_one_token_fits(llm: LLM) -> None:
    wanted = "return x + 1"

    def exactly(text: str, ended: bool) -> bool:
        return text == wanted if ended else wanted.startswith(text)

    found = llm.generate(PROMPT, SamplingParams(temperature=1, seed=1, control=AWRS(exactly)))
    assert (found[0].outputs[0].text, found[0].outputs[0].finish_reason) == (wanted, "stop")


def test_json_by_name(llm: LLM) -> None:
    found = llm.generate(["data = ", "[1, 2"], SamplingParams(temperature=0.7, seed=2, max_tokens=60, control="awrs"))
    for output in found:
        if output.outputs[0].finish_reason == "stop":
            json.loads(output.outputs[0].text)
        assert output.error is None


def test_what_a_predicate_is_asked() -> None:
    pieces = [b"a", "\u20ac".encode()[:2], "\u20ac".encode()[2:], b"", b"\xff"]
    calls = []

    def predicate(text: str, ended: bool) -> int:
        calls.append((text, ended))
        return 1

    sampler = Sampler(5, frozenset({3}), bytes_of=pieces.__getitem__, special=[3])
    for ignore in (False, True):
        seq = begun(sampler, [0, 0], prompt_len=1, temperature=0, stop_token_ids=(4,), ignore_eos=ignore, control=AWRS(predicate))
        (check,) = seq.state[sampler]
        answers = [check.allows(seq, drafted, token) for drafted, token in (([], 0), ([], 1), ([1], 2), ([1], 0), ([], 3), ([0], 4))]
        assert answers == [True] * 4 + [not ignore, True] and all(type(one) is bool for one in answers)
    assert calls[:6] == [("aa", False), ("a\ufffd", False), ("a\u20ac", False), ("a\ufffda", False), ("a", True), ("aa", True)]
    assert calls[6:] == [*calls[:4], calls[5]], "a special token that does not end the text is no text"


def test_what_is_refused() -> None:
    with pytest.raises(UnknownMethod, match="no predicate 'jsn'"):
        AWRS("jsn")
    with pytest.raises(InvalidInput, match="awrs: needs a model with a tokenizer"):
        Sampler(4, frozenset()).check(SamplingParams(control="awrs"))


def test_a_predicate_that_raises_ends_its_request_alone(llm: LLM) -> None:
    def fails(text: str, ended: bool) -> bool:
        raise ZeroDivisionError("of a user")

    params = SamplingParams(temperature=0, max_tokens=8)
    bad, good = llm.generate([PROMPT, PROMPT], [params.but(control=AWRS(fails)), params])
    assert bad.error == "control: it raised ZeroDivisionError: of a user" and good.error is None
    never, again = llm.generate([PROMPT, PROMPT], [params.but(control=AWRS(lambda text, ended: False)), params])
    assert never.error is not None and never.error.startswith("control: no token that the filters leave may follow token ")
    assert again.outputs[0].token_ids == good.outputs[0].token_ids
    assert np.isfinite(llm.engine.memory.used()) and llm.engine.memory.used() == 0
