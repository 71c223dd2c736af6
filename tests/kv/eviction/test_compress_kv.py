"""CompressKV: which heads choose, what layers keep, and its calibration."""

from __future__ import annotations

from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from redraft.core.sequence import Lanes
from redraft.errors import InvalidInput
from redraft.kv.eviction.compress_kv import ByDamage, CompressKV, HeadScores
from redraft.llm import LLM

NONE = np.zeros((0, 0))


def shares(damage: list[float], kept: int, least: int, length: int = 1000) -> list[int]:
    part = np.array(damage) / sum(damage)
    none = np.zeros((len(damage), 0), np.int64)
    return ByDamage(part, least).shares(kept, [NONE], none, np.full(len(damage), length)).tolist()


@given(st.lists(st.floats(0, 10), min_size=2, max_size=9).filter(lambda some: sum(some) > 1e-3), st.integers(10, 60), st.integers(1, 60))
def test_budgets_fill_the_total_within_their_bounds(damage: list[float], kept: int, least: int) -> None:
    found = shares(damage, kept, least)
    assert sum(found) == kept * len(damage) and min(found) >= min(least, kept) and max(found) <= 3 * kept


def test_fragile_layers_keep_more() -> None:
    assert shares([1, 1, 1], 20, 8) == [20, 20, 20]
    assert shares([1, 2, 3], 20, 8) == [14, 20, 26]
    assert shares([0, 0, 1], 20, 8) == [8, 8, 44] and shares([0, 0, 9], 20, 0) == [0, 0, 60]


def test_the_best_heads_of_a_layer() -> None:
    scores = HeadScores(np.array([[1, 5, 3, 5], [0, 0, 0, 0]], np.float32), np.ones(2, np.float32), "", 1, 1)
    assert scores.best(2) == ((False, True, False, True), (True, True, False, False))
    assert scores.best(9) == ((True,) * 4,) * 2


def test_calibrate_then_open(tmp_path: Path) -> None:
    llm = LLM("embedded", max_seqs=1)
    text = llm.tokenizer.encode(Path(__file__).read_text(encoding="utf-8"))
    made = CompressKV.calibrate(llm.runner, [text], samples=2)
    attention = llm.runner.spec.attention
    assert made.heads.shape == (len(attention), attention[0].heads) and (made.heads >= 0).all() and (made.heads <= 1).all()
    assert made.damage.sum() == pytest.approx(1) and made.heads.max() > 0
    again = CompressKV.calibrate(llm.runner, [text], samples=2)
    assert np.array_equal(made.heads, again.heads)
    path = made.save(tmp_path / "votes.safetensors")
    assert np.array_equal(HeadScores.load(path).heads, made.heads)
    policy = CompressKV(profile=path, heads=1).open(llm.runner)
    assert policy.lanes is Lanes.PER_LAYER
    with pytest.raises(InvalidInput, match=r"compresskv: no profile .*; make one with: redraft calibrate"):
        CompressKV(profile=tmp_path / "none").open(llm.runner)
    with pytest.raises(InvalidInput, match="at least"):
        CompressKV.calibrate(llm.runner, [text[:20]])


def test_all_heads_and_even_budgets_choose_as_snapkv_does_for_a_whole_layer(tmp_path: Path) -> None:
    llm = LLM("embedded", max_seqs=1, prefix_sharing=False)
    heads = llm.runner.spec.attention[0].heads
    prompt = "class Stack:\n    def push(self, item):\n        self.items.append(item)\n\n" * 8
    path = CompressKV.calibrate(llm.runner, [llm.tokenizer.encode(prompt * 8)], samples=1).save(tmp_path / "votes.safetensors")
    assert llm.runner.spec.kv_heads == 1, "one kv head: a layer is a head"
    every = f"compresskv:budget=0.3,heads={heads},window=8,pool=7,even=true,profile={path}"
    one, other = (
        llm.generate(prompt, max_tokens=30, temperature=0, keep=keep)[0].outputs[0].token_ids
        for keep in (every, "snapkv:budget=0.3,window=8,pool=7")
    )
    assert one == other
