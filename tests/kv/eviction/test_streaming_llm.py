"""StreamingLLM: it evicts only slots that no later row sees, and a lane never exceeds its bound."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from redraft import registry
from redraft.core.sequence import Lanes
from redraft.core.view import Window
from redraft.errors import InvalidInput
from redraft.kv.edits import EditableTable
from redraft.kv.eviction.streaming_llm import StreamingLLM
from tests.kv.eviction import HEADS, LAYERS, Drive, Step, grouped, one_by_one, runner


def opened(sinks: int, recent: int, page: int = 4) -> Any:
    return StreamingLLM(sinks, recent).open(runner(page=page))


def visible(policy: Any, row: int) -> set[int]:
    """The positions that a row sees, from the definition of Window."""
    return {j for j in range(row + 1) if j < policy.window.sinks or row - j < policy.window.recent}


shapes = st.tuples(st.integers(0, 9), st.integers(1, 23), st.sampled_from([4, 8]))


@settings(max_examples=25, deadline=None)
@given(shapes, st.integers(0, 1 << 20), st.booleans())
def test_what_any_later_row_sees_is_there(shape: tuple[int, int, int], seed: int, drafting: bool) -> None:
    sinks, recent, page = shape
    policy = opened(*shape)
    drive, length = Drive(policy, page=page), 100
    for step in grouped(policy, length, seed, drafting):
        drive.step(step)
        (held,) = drive.positions()
        stored = drive.seq.stored
        assert held == sorted(held)
        seen_later = set().union(*(visible(policy, row) for row in range(stored, stored + 4)))
        assert {j for j in seen_later if j < stored} <= set(held), "a later row misses a key"
        # of what nobody sees any more, less than one page of sinks and one of the window stay at a sync point
        assert len(held) <= sinks + recent - 1 + 2 * (page - 1) + stored % policy.sync_every or stored < policy.max_slots
        assert len(held) <= policy.max_slots
    assert drive.longest <= policy.max_slots
    assert drive.moved == 0, "pages are relisted, not copied"
    assert all(stored % policy.sync_every == 0 for stored in drive.kept), "however rows were grouped into steps"


@pytest.mark.parametrize("shape", [(0, 1, 4), (4, 20, 4), (5, 13, 4), (1, 8, 8), (9, 300, 8)])
def test_most_is_reached_and_never_passed(shape: tuple[int, int, int]) -> None:
    policy = opened(*shape)
    drive = Drive(policy, page=shape[2])
    drive.step(Step(policy.sync_point(drive.seq)))  # a lane grows until a step could pass the bound ...
    assert policy.max_slots - policy.sync_every < drive.longest <= policy.max_slots
    drive.longest = 0
    while drive.seq.stored < 4 * policy.max_slots:  # ... and from there on by steps of the grid
        drive.step(Step(policy.sync_point(drive.seq) - drive.seq.stored))
    assert drive.longest == policy.max_slots


def test_the_defaults() -> None:
    policy = opened(4, 1020, page=32)
    assert (policy.window, policy.onset(0).shareable, policy.lanes, policy.endless) == (Window(4, 1020), 1024, Lanes.SHARED, True)
    assert policy.sync_every == 128 and policy.max_slots == 32 + 1024 + 128
    drive = Drive(policy).run([Step(1152), Step(128), Step(1)])
    assert list(drive.kept) == [1152, 1280]
    assert drive.kept[1280] == [[*range(32), *range(256, 1280)]]  # row 1280 sees 261 and on
    assert drive.table.used() == 1 + 33


def test_short_texts_meet_no_border() -> None:
    policy = opened(4, 20)
    drive = Drive(policy, page=4)
    first = policy.sync_point(drive.seq)
    assert policy.onset(0).shareable <= first <= policy.max_slots
    drive.run(one_by_one(policy.onset(0).shareable))
    assert drive.kept == {} and drive.positions() == [list(range(policy.onset(0).shareable))]


def test_rows_below_pure_see_everything_and_no_others() -> None:
    policy = opened(3, 10)
    assert all(visible(policy, row) == set(range(row + 1)) for row in range(policy.onset(0).shareable))
    assert visible(policy, policy.onset(0).shareable) != set(range(policy.onset(0).shareable + 1))


def test_borders_are_a_function_of_what_is_stored() -> None:
    policy = opened(4, 20)
    drive = Drive(policy, page=4)
    borders = []
    for _ in range(100):
        borders.append(policy.sync_point(drive.seq))
        assert drive.seq.stored < borders[-1]
        drive.step(Step(1))
    assert borders == [max(44 // 20, stored // 20 + 1) * 20 for stored in range(100)]


def test_all_lanes_go_the_same_way_where_a_codec_has_split_them() -> None:
    policy = opened(4, 20)
    policy.lanes = Lanes.PER_HEAD
    held = Drive(policy, page=4).run(grouped(policy, 100, seed=1, drafting=True)).positions()
    assert len(held) == LAYERS * HEADS and held == held[:1] * len(held)
    policy.lanes = Lanes.SHARED
    assert held[:1] == Drive(policy, page=4).run(one_by_one(100)).positions()


def test_freed_pages_serve_another_text() -> None:
    policy, table = opened(4, 20), EditableTable(22, LAYERS, HEADS, page=4)
    drives = [Drive(policy, table=table, ident=i) for i in (1, 2)]  # 25 pages each without eviction
    for _ in range(100):
        for drive in drives:
            drive.step(Step(1))
    assert table.peak == 22  # max_slots each, 44, before the oldest pages go


def test_a_fork_shares_pages_and_goes_its_own_way() -> None:
    policy = opened(4, 20)
    parent = Drive(policy, page=4).run(one_by_one(30))
    child = parent.fork(2).run(one_by_one(40))
    assert parent.positions() == Drive(policy, page=4).run(one_by_one(30)).positions()
    assert child.positions() == Drive(policy, page=4).run(one_by_one(70)).positions()


@pytest.mark.parametrize(("option", "value"), [("sinks", -1), ("recent", 0)])
def test_bad_values_are_named(option: str, value: int) -> None:
    with pytest.raises(InvalidInput, match=rf"^streaming-llm:{option}={value}: must be \d or more$"):
        StreamingLLM(**{option: value})


def test_options_are_registry_options() -> None:
    assert list(registry.options(StreamingLLM)) == ["sinks", "recent"]
