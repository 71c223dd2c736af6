"""Prompts and decoding at different workers: nothing is lost, memory returns, and a hand-over takes what its pages take."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from redraft import registry
from redraft.errors import InvalidInput
from redraft.sched.router import Load
from redraft.sim.cluster import Cluster
from redraft.sim.link import Link
from redraft.sim.trace import Arrival
from redraft.sim.worker import MOST
from tests.sim.test_cluster import same
from tests.sim.test_leaps import tree
from tests.sim.worlds import Linear, arrivals, cluster, run

LINKS = [Link(), Link(1.0, 2000.0, 0.01), Link(1.0, 2000.0, 0.01, blocking=True)]
STEP = Linear(1.0, 0, 0, 0)


def check(where: Cluster) -> None:
    """The ledger: every page is held by a running text, by a parked one, or free."""
    for worker in where.workers:
        worker.engine.table.check()
        if not worker.engine.running and not any(place == worker.index for _, place in where._parked.values()):
            assert worker.engine.memory.used() == 0
    for load, worker in zip(where.front.loads, where.workers, strict=True):
        assert load.queued_tokens >= 0 and load.running >= 0 and load.free_blocks <= worker.runner.memory.blocks


@settings(max_examples=5, deadline=None, phases=[Phase.generate])
@given(
    seed=st.integers(0, 10**6),
    rate=st.floats(1, 30),
    blocks=st.integers(128, 160),
    split=st.sampled_from([(1, 1), (2, 1), (1, 2)]),
    route=st.sampled_from(["round-robin", "least-load", "prefix-affinity", "splitwise:queue=500"]),
    link=st.sampled_from(LINKS),
    most=st.sampled_from([1, MOST]),
)
def test_every_request_ends_once_and_no_page_is_lost(
    seed: int, rate: float, blocks: int, split: tuple[int, int], route: str, link: Link, most: int
) -> None:
    coming = arrivals(16, rate, output=(1, 60), prompt=(500, 2000), seed=seed)
    where = cluster(split=split, route=route, link=link, blocks=blocks, most=most)
    ends = where._end

    def checked(place: int) -> None:
        ends(place)
        check(where)

    where._end = checked  # type: ignore[method-assign]
    records = run(where, coming)
    assert sorted(records.column("number").tolist()) == list(range(len(coming)))
    assert sum(counts.sum() for _, counts in records.gaps) == sum(one.output - 1 for one in coming)
    assert [load._replace(stages=(0,)) for load in where.front.loads] == [Load(free_blocks=blocks)] * len(where.workers)
    assert not where._parked


@settings(max_examples=4, deadline=None, phases=[Phase.generate])
@given(seed=st.integers(0, 10**6), blocks=st.integers(128, 200), link=st.sampled_from(LINKS), budget=st.sampled_from([64, 512]))
def test_several_steps_at_once_change_nothing(seed: int, blocks: int, link: Link, budget: int) -> None:
    coming = arrivals(25, 8.0, output=(1, 200), prompt=(1, 2000), seed=seed)
    options: dict[str, Any] = {"split": (1, 2), "route": "least-load", "link": link, "blocks": blocks, "token_budget": budget}
    single, leaping = cluster(most=1, **options), cluster(**options)
    assert same(run(single, coming), run(leaping, coming))
    for one, other in zip(single.workers, leaping.workers, strict=True):
        assert one.times == other.times
        assert one.engine.preemptions == other.engine.preemptions
    assert tree(single) == tree(leaping)


def test_the_rest_of_a_text_comes_from_the_other_worker() -> None:
    where = cluster(split=(1, 1), cost=STEP)
    (record,) = run(where, [Arrival(0.0, 100, 5)])
    assert (record.worker, record.first, record.second, record.end) == (1, 1.0, 2.0, 5.0)
    assert [len(worker.times) for worker in where.workers] == [1, 4]


@pytest.mark.parametrize("blocking", [False, True])
def test_the_second_token_waits_for_the_pages(blocking: bool) -> None:
    where = cluster(split=(1, 1), cost=STEP, link=Link(10.0, 500.0, 0.5, blocking))
    (record,) = run(where, [Arrival(0.0, 100, 3)])
    assert where.copied == 100
    assert record.second == pytest.approx(1.0 + 0.5 + 100 * 10 / 500 + 1.0)
    assert record.end == pytest.approx(record.second + 1.0)


def test_a_copy_that_does_not_block_lets_other_texts_go_on() -> None:
    longest = []
    for blocking in (False, True):
        where = cluster(split=(1, 1), cost=STEP, link=Link(10.0, 100.0, 0.0, blocking))
        old, _ = sorted(run(where, [Arrival(0.0, 1, 40), Arrival(1.0, 100, 4)]))
        longest.append(old.longest)
    assert longest == [pytest.approx(1.1), pytest.approx(11.0)]  # its own page takes 0.1


def test_pages_that_the_receiver_has_do_not_travel() -> None:
    where = cluster(split=(1, 1), cost=STEP, link=Link(1.0, 1.0))
    one, other = sorted(run(where, [Arrival(0.0, 128, 2, (7, 8), 64), Arrival(500.0, 160, 2, (7, 8), 64)]))
    assert (where.copied, where.found) == (128 + 32, 128)
    assert one.second - one.first == pytest.approx(128 + 1)
    assert other.second - other.first == pytest.approx(32 + 1)


def test_a_full_receiver_stops_the_sender() -> None:
    where = cluster(split=(1, 1), cost=STEP, blocks=128, max_seqs=64)
    coming = [Arrival(0.0, 32 * 60, 40)] * 6
    records = run(where, coming)  # two texts fit into each worker
    first = np.sort(records.column("first"))
    assert len(records) == 6
    assert first[4] > 30  # the prompts after the first four wait until a text has ended


def test_a_worker_of_both_stages_keeps_its_texts() -> None:
    where = cluster(2)
    for worker in where.workers:
        worker.stages = (0, 1)
    where = Cluster(where.workers, registry.create("route", "least-load").open())
    run(where, arrivals(20, 5.0))
    assert where.copied == 0


@pytest.mark.parametrize(("field", "value"), [("token_bytes", -1.0), ("bandwidth", 0.0)])
def test_a_link_names_what_is_wrong(field: str, value: float) -> None:
    with pytest.raises(InvalidInput, match=f"{field}"):
        Link(**{field: value})
