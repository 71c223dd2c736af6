"""Ada-KV against a plain simulation of its steps: the heads of a layer share its budget exactly."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given as drawn
from hypothesis import settings

from redraft import registry
from redraft.errors import InvalidInput
from redraft.kv.edits import EditableTable
from redraft.kv.eviction.ada_kv import AdaKV
from tests.kv.eviction import HEADS, LANES, LAYERS, Drive, given, grouped, one_by_one, runner

SMALL = AdaKV(budget=24, drop=0.4, history=6, recent=3, sinks=2, floor=0.5)  # 14 stay, 7 of them in every head


def opened(method: AdaKV = SMALL) -> Any:
    return method.open(runner())


def plain(method: AdaKV, length: int) -> dict[int, list[list[int]]]:
    """Positions after each decision, token by token and layer by layer, from the numbered steps of the module."""
    gone, found = round(method.budget * method.drop), {}
    kept = method.budget - gone
    floor = max(method.sinks + method.recent, int(method.floor * kept))
    lanes: list[list[int]] = [[] for _ in range(LANES)]
    last = 0
    for stored in range(1, length + 1):
        for lane in lanes:
            lane.append(stored - 1)
        if sum(map(len, lanes)) == LANES * method.budget:
            rows = range(max(last, stored - method.history), stored)
            for layer in range(LAYERS):
                mine: list[set[int]] = []
                rest: list[tuple[int, int, int, int]] = []
                for head in range(HEADS):
                    i = layer * HEADS + head
                    mass = {j: sum(given("mass", i, row, j) for row in rows if j <= row) for j in lanes[i]}
                    spared = {j for j in lanes[i] if j < method.sinks or j >= stored - method.recent}
                    best = sorted(lanes[i], key=lambda j: (j in spared, mass[j], j), reverse=True)
                    mine.append(set(best[:floor]))
                    rest += [(mass[j], head, lanes[i].index(j), j) for j in best[floor:]]
                rest.sort(reverse=True)
                for _, head, _, j in rest[: HEADS * (kept - floor)]:
                    mine[head].add(j)
                for head in range(HEADS):
                    lanes[layer * HEADS + head] = sorted(mine[head])
            last = stored
            found[stored] = [list(lane) for lane in lanes]
    return found


def test_decisions_are_those_of_the_plain_simulation() -> None:
    drive = Drive(opened()).run(one_by_one(90))
    assert list(drive.kept) == [24, 34, 44, 54, 64, 74, 84]
    assert drive.kept == plain(SMALL, 90)
    lengths = [len(lane) for lane in drive.kept[84]]
    assert max(lengths) > 14 > min(lengths), "lengths differ, or the test shows little"


@settings(max_examples=12, deadline=None)
@drawn(st.integers(0, 1 << 20), st.booleans(), st.integers(1, 20), st.sampled_from([0.0, 0.2, 0.6, 1.0]))
def test_chunks_and_trees_change_nothing(seed: int, drafting: bool, history: int, floor: float) -> None:
    method = AdaKV(24, 0.4, history, 3, 2, floor)
    policy = opened(method)
    drive = Drive(policy).run(grouped(policy, 70, seed, drafting))
    assert drive.kept == plain(method, drive.seq.stored)
    assert drive.longest <= policy.max_slots
    for stored, lanes in drive.kept.items():
        for layer in range(LAYERS):
            assert sum(map(len, lanes[layer * HEADS : (layer + 1) * HEADS])) == HEADS * 14, "the layer's budget, exactly"
        for lane in lanes:
            assert len(lane) >= max(5, int(floor * 14)) and lane == sorted(lane)
            assert {0, 1} <= set(lane) and {stored - 1, stored - 2, stored - 3} <= set(lane)


def test_a_floor_of_all_is_the_same_for_all_heads() -> None:
    drive = Drive(opened(AdaKV(24, 0.4, 6, 3, 2, 1.0))).run(one_by_one(60))
    assert {len(lane) for lanes in drive.kept.values() for lane in lanes} == {14}


def test_one_head_may_take_all_above_the_floors_of_the_others_and_most_says_so() -> None:
    policy = opened()
    drive = Drive(policy)
    seq, length = drive.seq, 0
    for stored in range(24, 200, 10):
        seq.stored = stored
        tally = seq.state[policy]
        lengths = tally.now(stored)
        length = max(length, int(lengths.max()))
        tally.widen(length)
        tally.sums[0, ::HEADS] = 1.0
        policy.decide(seq, list)
        assert seq.state[policy].lengths.sum() == LANES * 14
    assert seq.state[policy].lengths.tolist() == [28, 7, 7] * LAYERS
    assert length == policy.max_slots == 24 + 2 * 7


def test_what_lanes_gave_up_serves_another_text() -> None:
    policy, table = opened(), EditableTable(100, LAYERS, HEADS, page=2)
    pages = sum(-(-len(lane) // 2) for lane in Drive(policy, table=table).run(one_by_one(94)).positions())
    assert pages <= 7 * LANES + LANES // 2  # 47 of each lane without eviction
    assert table.peak <= 24 // 2 + 2
    before = table.used() * LANES
    Drive(policy, table=table, ident=2).run(one_by_one(14))
    assert table.used() == max(before, pages + 7 * LANES + LANES - 1) // LANES


def test_a_fork_goes_its_own_way() -> None:
    policy = opened()
    parent = Drive(policy).run(one_by_one(50))
    child = parent.fork(2).run(one_by_one(30), salt=5)
    assert parent.run(one_by_one(30)).kept == plain(SMALL, 80)
    assert child.kept[54] != parent.kept[54]


def test_the_defaults() -> None:
    policy = AdaKV().open(runner(layers=2, heads=8))
    assert policy.max_slots == 512 + 8 * 512 - 7 * 102 and policy.shareable_tokens == 1024


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"floor": -0.1}, "ada-kv:floor=-0.1: must be 0 to 1"),
        ({"floor": 1.1}, "ada-kv:floor=1.1: must be 0 to 1"),
        ({"floor": float("nan")}, "ada-kv:floor=nan: must be 0 to 1"),
        ({"budget": 72}, "ada-kv:budget=72: must be 73 or more"),
        ({"history": 0}, "ada-kv:history=0: must be 1 or more"),
    ],
)
def test_bad_values_are_named(options: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        AdaKV(**options)
    assert str(caught.value).startswith(text)


def test_options_are_registry_options() -> None:
    assert list(registry.options(AdaKV)) == ["budget", "drop", "history", "recent", "sinks", "floor"]
