"""Scissorhands against a plain simulation of its steps, over chunks, trees and forks."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given as drawn
from hypothesis import settings

from redraft import registry
from redraft.core.sequence import Lanes
from redraft.errors import InvalidInput
from redraft.kv.edits import EditableTable
from redraft.kv.eviction.scissorhands import Scissorhands
from tests.kv.eviction import HEADS, HELD, LANES, LAYERS, Drive, Step, given, grouped, one_by_one, runner

SMALL = Scissorhands(budget=24, drop=0.4, history=8, recent=3, sinks=2)  # 10 of 24 go


def opened(method: Scissorhands = SMALL) -> Any:
    return method.open(runner())


def plain(method: Scissorhands, length: int) -> dict[int, list[list[int]]]:
    """Positions after each decision, token by token and head by head, from the numbered steps of the module."""
    gone, found = round(method.budget * method.drop), {}
    lanes: list[list[int]] = [[] for _ in range(LANES)]
    last = 0
    for stored in range(1, length + 1):
        for lane in lanes:
            lane.append(stored - 1)
        if len(lanes[0]) == method.budget:
            for i, lane in enumerate(lanes):
                rows = range(max(last, stored - method.history), stored)
                low = {j: sum(given("low", i, row, j) for row in rows if j <= row) for j in lane}
                mass = {j: sum(given("mass", i, row, j) for row in rows if j <= row) for j in lane}
                free = [j for j in lane if j >= method.sinks and j < stored - method.recent]
                free.sort(key=lambda j: (-low[j], mass[j], j))
                lanes[i] = sorted(set(lane) - set(free[:gone]))
            last = stored
            found[stored] = [list(lane) for lane in lanes]
    return found


def test_decisions_are_those_of_the_plain_simulation() -> None:
    drive = Drive(opened()).run(one_by_one(90))
    assert list(drive.kept) == [24, 34, 44, 54, 64, 74, 84]
    assert drive.kept == plain(SMALL, 90)
    assert len({tuple(lane) for lane in drive.kept[84]}) == LANES, "heads differ, or the test shows little"
    assert drive.seq.cache.lanes is Lanes.PER_HEAD


@settings(max_examples=10, deadline=None)
@drawn(st.integers(0, 1 << 20), st.booleans(), st.integers(1, 40))
def test_chunks_and_trees_change_nothing(seed: int, drafting: bool, history: int) -> None:
    method = Scissorhands(budget=24, drop=0.4, history=history, recent=3, sinks=2)
    policy = opened(method)
    drive = Drive(policy).run(grouped(policy, 70, seed, drafting))
    expected = plain(method, drive.seq.stored)
    assert drive.kept == expected
    assert drive.longest == method.budget == policy.onset(0).longest
    for stored, lanes in drive.kept.items():
        for lane in lanes:
            assert len(lane) == 14 and lane == sorted(lane)
            assert {0, 1} <= set(lane) and {stored - 1, stored - 2, stored - 3} <= set(lane)


@pytest.mark.parametrize("drafting", [False, True])
def test_tallies_do_not_depend_on_steps_either(drafting: bool) -> None:
    policy = opened()
    one, other = Drive(policy).run(one_by_one(53)), Drive(policy)
    for seed in range(100):
        other = Drive(policy).run(grouped(policy, 53, seed, drafting))
        if other.seq.stored == 53:
            break
    mine, theirs = one.seq.state[policy], other.seq.state[policy]
    assert mine.stored == theirs.stored == 44 and mine.lengths.tolist() == theirs.lengths.tolist()
    mine.widen(30), theirs.widen(30)
    width = min(mine.sums.shape[-1], theirs.sums.shape[-1])
    assert np.array_equal(mine.sums[..., :width], theirs.sums[..., :width]) and mine.sums.any()
    assert not mine.sums[..., width:].any() and not theirs.sums[..., width:].any()


def test_a_fork_goes_its_own_way() -> None:
    policy = opened()
    parent = Drive(policy).run(one_by_one(50))
    child = parent.fork(2)
    child.run(one_by_one(30), salt=5)
    parent.run(one_by_one(30))
    assert parent.kept == plain(SMALL, 80)
    assert child.kept[54] != parent.kept[54] and child.kept[44] == parent.kept[44]


def test_preemption_replays_with_tokens_that_were_generated() -> None:
    policy, table = opened(), EditableTable(200, LAYERS, HEADS)
    first = Drive(policy, table=table).run(one_by_one(60))
    policy.end(first.seq.state.pop(policy))
    table.free(first.seq)
    again = Drive(policy, table=table)
    again.seq.prompt_len = 5  # the rest was generated, and runs again in chunks
    again.run(grouped(policy, 60, seed=3, drafting=False)).run(one_by_one(20))
    assert again.kept == plain(SMALL, 80)


def test_nothing_happens_below_the_budget() -> None:
    policy = opened(Scissorhands(budget=1 << 20))
    drive = Drive(policy).run(one_by_one(60))
    assert drive.kept == {} and drive.seq.state[policy].sums.size == 0, "nothing was watched, so no memory was taken"
    assert policy.sync_point(drive.seq) == 1 << 20 and policy.onset(0).shareable == 1 << 20


def test_what_takes_all_attention_never_goes_and_ties_are_settled_by_age() -> None:
    policy = opened(Scissorhands(budget=24, drop=0.5, history=12, recent=3, sinks=0))
    drive = Drive(policy)
    tally = drive.seq.state[policy]
    drive.seq.stored = 24
    tally.widen(24)
    tally.sums[0] = 12.0  # all low in every row ...
    tally.sums[0, :, 7] = 0  # ... but slot 7
    kept = policy.decide(drive.seq, HELD)
    assert [lane.tolist() for lane in kept.slots] == [[7, *range(13, 24)]] * LANES


def test_memory_is_freed() -> None:
    policy, table = opened(), EditableTable(100, LAYERS, HEADS, page=4)
    drive = Drive(policy, table=table).run(one_by_one(94))
    assert list(drive.kept)[-1] == 94
    assert table.used() == 4  # 14 slots a lane; 24 pages of 6 lanes each without eviction
    assert table.peak == 6 + 4  # the first eviction copies what stays


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"history": 0}, "scissorhands:history=0: must be 1 or more"),
        ({"recent": 0}, "scissorhands:recent=0: must be 1 or more"),
        ({"sinks": -1}, "scissorhands:sinks=-1: must be 0 or more"),
        ({"drop": 0.0}, "scissorhands:drop=0.0: must be above 0 and below 1"),
        ({"drop": 1.0}, "scissorhands:drop=1.0: must be above 0 and below 1"),
        ({"drop": float("nan")}, "scissorhands:drop=nan: must be above 0 and below 1"),
        ({"budget": 0}, "scissorhands:budget=0: must be 29 or more"),
        ({"budget": 28}, "scissorhands:budget=28: must be 29 or more"),
        ({"budget": 99, "drop": 0.001}, "scissorhands:budget=99: must be 501 or more"),
    ],
)
def test_bad_values_are_named(options: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        Scissorhands(**options)
    assert str(caught.value).startswith(text)


@drawn(st.floats(1e-3, 0.999), st.integers(0, 20), st.integers(1, 20))
def test_the_smallest_budget_is_the_one_named(drop: float, sinks: int, recent: int) -> None:
    with pytest.raises(InvalidInput) as caught:
        Scissorhands(0, drop, 1, recent, sinks)
    least = int(str(caught.value).split("must be ")[1].split()[0])
    trigger = Scissorhands(least, drop, 1, recent, sinks).trigger
    assert trigger.drop >= 1 and trigger.kept(0) > sinks + recent
    with pytest.raises(InvalidInput):
        Scissorhands(least - 1, drop, 1, recent, sinks)


def test_options_are_registry_options() -> None:
    assert list(registry.options(Scissorhands)) == ["budget", "drop", "history", "recent", "sinks"]


def test_a_step_of_one_is_enough_at_the_border() -> None:
    policy = opened()
    drive = Drive(policy).run([Step(23)])
    assert policy.sync_point(drive.seq) == 24 and drive.kept == {}
    assert list(drive.run([Step(1)]).kept) == [24] and policy.sync_point(drive.seq) == 34
