"""SnapKV against a plain simulation of its steps."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given as drawn
from hypothesis import settings

from redraft.config import SamplingParams
from redraft.core.sequence import NEVER, UNLIMITED, Request
from redraft.errors import InvalidInput
from redraft.kv.eviction.snap_kv import SnapKV
from tests.contracts import identity
from tests.kv.eviction import LANES, Drive, given, grouped, one_by_one, runner

SMALL = SnapKV(budget=14, window=5, pool=3, sinks=2)
CONTEXT = 40


def opened(method: SnapKV = SMALL) -> Any:
    return method.open(runner())


def plain(method: SnapKV, context: int, kept: int) -> list[list[int]]:
    found, first = [], context - method.window
    for lane in range(LANES):
        mass = [sum(given("mass", lane, row, j) for row in range(first, context)) for j in range(first)]
        half = method.pool // 2
        score = {j: sum(mass[max(0, j - half) : j + half + 1]) for j in range(method.sinks, first)}
        best = sorted(score, key=lambda j: (score[j], j), reverse=True)[: kept - method.window - method.sinks]
        found.append(sorted([*range(method.sinks), *best, *range(first, context)]))
    return found


@settings(max_examples=12, deadline=None)
@drawn(st.integers(0, 1 << 20), st.booleans(), st.sampled_from([1, 3, 5]))
def test_one_decision_as_the_plain_simulation(seed: int, drafting: bool, pool: int) -> None:
    method = SnapKV(14, 5, pool, 2)
    policy = opened(method)
    drive = Drive(policy, context=CONTEXT).run(grouped(policy, 90, seed, drafting, CONTEXT))
    assert drive.kept == {CONTEXT: plain(method, CONTEXT, 14)}
    assert all(lane[-(drive.seq.stored - CONTEXT) :] == list(range(CONTEXT, drive.seq.stored)) for lane in drive.positions())


def test_a_part_of_the_context() -> None:
    drive = Drive(opened(SnapKV(0.5, 5, 3, 2)), context=CONTEXT).run(one_by_one(CONTEXT))
    assert drive.kept == {CONTEXT: plain(SnapKV(0.5, 5, 3, 2), CONTEXT, CONTEXT // 2)}


def test_a_short_context_stays_whole() -> None:
    policy = opened()
    assert policy.onset(14) == NEVER and policy.onset(15).at == 15
    drive = Drive(policy, context=14).run(one_by_one(60))
    assert drive.kept == {} and policy.sync_point(drive.seq) == UNLIMITED and policy.watch(drive.seq) == ()


def test_a_prefix_may_come_from_other_texts_up_to_the_window() -> None:
    onset = opened().onset(CONTEXT)
    assert (onset.at, onset.shareable, onset.skippable, onset.slots) == (40, 40, 35, 14)


@pytest.mark.parametrize(("keep", "admitted"), [("snapkv:budget=16,window=4", True), (None, False)])
def test_what_it_frees_goes_to_a_waiting_text_in_the_next_step(keep: str | None, admitted: bool) -> None:
    """The prompts have 6 and 5 pages, and the pool 10 blocks."""
    engine = identity.engine(pool=10, chunk=64, max_model_len=256)
    engine.add(Request("long", [i % 7 for i in range(190)], SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, keep=keep)))
    engine.add(Request("other", [3] * 150, SamplingParams(temperature=0, max_tokens=4)))
    (first, other) = engine.waiting
    while first.stored < first.context:
        engine.step()
        assert other in engine.waiting
    engine.step()
    assert (other in engine.running) == admitted
    while engine.has_work:
        engine.step()
        engine.memory.check()
    assert engine.preemptions == 0 and engine.memory.used() == 0


@pytest.mark.parametrize("pool", [2, 8])
def test_an_even_pool_is_refused(pool: int) -> None:
    with pytest.raises(InvalidInput, match=f"snapkv:pool={pool}: must be odd"):
        SnapKV(pool=pool)


def test_a_long_output_stays_small_with_drop() -> None:
    method = SnapKV(14, 5, 3, 2, drop=10)
    policy = opened(method)
    drive = Drive(policy, context=CONTEXT).run(one_by_one(75))
    assert list(drive.kept) == [40, 50, 60, 70] and drive.kept[40] == plain(method, CONTEXT, 14)
    assert all(len(lane) == 14 for lanes in drive.kept.values() for lane in lanes)
    assert policy.onset(CONTEXT).longest == 24 and all({45, 49} <= set(lane) for lane in drive.kept[50])
