"""auto: its parts, what it leaves out, and the same text as plain decoding with every sampling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from redraft import LLM, registry
from redraft.draft.auto import Auto
from redraft.draft.planner import Planner
from redraft.engine.idle import forward_seconds
from redraft.errors import InvalidInput, UnknownMethod
from tests.checkpoints import tiny_llama
from tests.contracts.identity import SAMPLING, Condition, check


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return str(tiny_llama(tmp_path / "llama"))


def opened(llm: LLM) -> Planner:
    found = llm.engine.drafter.own.drafter
    assert isinstance(found, Planner)
    return found


@pytest.mark.parametrize("sampling", SAMPLING)
def test_the_text_is_that_of_plain_decoding(sampling: str) -> None:
    for condition in (
        Condition("auto", sampling),
        Condition("auto", sampling, chunk=3, arrivals=(0, 1, 0, 5), pool=12),
        Condition("auto:parts=copyspec+token-recycling+union", sampling, arrivals=(0, 0, 2)),
    ):
        check(condition)


def test_a_part_that_does_not_exist_is_left_out_of_the_default_only(monkeypatch: pytest.MonkeyPatch) -> None:
    left = {name: target for name, target in registry.METHODS["draft"].items() if name != "suffix"}
    monkeypatch.setitem(registry.METHODS, "draft", left)
    assert list(Auto().made()) == ["ngram", "token-recycling"]
    with pytest.raises(UnknownMethod, match="suffix"):
        Auto("suffix+ngram")
    with pytest.raises(InvalidInput, match="auto:parts"):
        Auto("")


def test_other_verifiers_get_drafts_of_a_fixed_size(folder: str) -> None:
    llm = LLM(folder, draft="auto", verify="typical", cache_memory=1 << 20)
    assert not opened(llm).timed
    llm.generate("abcabcabcabc", max_tokens=9, temperature=0)
    assert opened(llm).cost.unit is None, "no time was read"
    assert opened(llm.sibling(verify="coupled")).timed


def test_it_measures_after_a_reply_and_keeps_the_times(folder: str) -> None:
    llm = LLM(folder, draft="auto", cache_memory=1 << 20)
    assert not opened(llm).cost.calibrated
    llm.calibrate()
    assert not opened(llm).cost.calibrated, "nothing before the first reply"
    text = llm.generate("abcabcabcabc", max_tokens=9, temperature=0)[0].outputs[0].text
    llm.calibrate()
    blocks = llm.engine.memory.available()
    assert opened(llm).cost.calibrated and not llm.engine.idle()
    again = LLM(folder, draft="auto", cache_memory=1 << 20)
    assert opened(again).cost.calibrated and opened(again).cost.shape == opened(llm).cost.shape
    assert again.generate("abcabcabcabc", max_tokens=9, temperature=0)[0].outputs[0].text == text
    assert blocks == llm.engine.memory.available() == again.engine.memory.available(), "timed steps leave no page"
    other = LLM(folder, draft="auto", quant="int8", cache_memory=1 << 20)
    assert not opened(other).cost.calibrated, "other weights have other times"


def test_a_user_without_a_home_keeps_no_times(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", none)
    assert opened(LLM(folder, draft="auto", cache_memory=1 << 20)).cost.path is None


def test_a_draft_model_that_is_a_part_drafts_once(folder: str) -> None:
    llm = LLM(folder, draft="auto:parts=(draft-model:length=3)+suffix", draft_model=folder, cache_memory=1 << 20)
    assert list(opened(llm).names) == ["draft-model:length=3", "suffix"]


def test_a_draft_model_joins_the_parts(folder: str) -> None:
    llm = LLM(folder, draft="auto", draft_model=folder, cache_memory=1 << 20)
    assert list(opened(llm).names) == ["suffix", "ngram", "token-recycling", "draft-model"]
    plain = llm.sibling(draft="none")
    one: Any = {"max_tokens": 12, "temperature": 0}
    assert llm.generate("hello", **one)[0].outputs[0].token_ids == plain.generate("hello", **one)[0].outputs[0].token_ids


def test_more_parts_than_weights_are_kept_for_are_refused() -> None:
    with pytest.raises(InvalidInput, match="at most 6 drafters"):
        Auto("+".join(f"copyspec:gamma={gamma}" for gamma in range(1, 8)))


def test_a_short_context_is_calibrated_with_what_fits(folder: str) -> None:
    llm = LLM(folder, draft="auto", max_model_len=20, cache_memory=1 << 20)
    llm.generate("abc", max_tokens=9, temperature=0)
    llm.calibrate()
    assert forward_seconds(llm.engine, 21) is None and forward_seconds(llm.engine, 8, 13) is None
    assert opened(llm).cost.calibrated


def test_a_full_memory_puts_the_calibration_off(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(folder, draft="auto", cache_memory=1 << 20)
    llm.sibling(draft="none").generate("abc", max_tokens=2)
    opened(llm).cost.unit, opened(llm)._stepped = 0.01, True
    with monkeypatch.context() as full:
        full.setattr(llm.engine.memory, "available", lambda: 0)
        llm.calibrate()
    assert not opened(llm).cost.calibrated
    llm.calibrate()
    assert opened(llm).cost.calibrated


def test_a_drafter_without_the_optional_members_drafts(folder: str) -> None:
    llm = LLM(folder, draft="draft-model", draft_model=folder, cache_memory=1 << 20)
    found = llm.generate("abc", max_tokens=9, temperature=0)[0].outputs[0]
    assert not found.stats.fault and found.stats.drafted and not found.stats.stopped
