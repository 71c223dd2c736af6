"""Two engines over one pool: nothing is lost, and controllers find shares that their models allow."""

from __future__ import annotations

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from redraft import registry
from redraft.sim.shared import SharedDevice
from redraft.sim.shares import DECODE, PROMPT, Controller, Fixed, Nexus, SemiPD, slowdown
from tests.sim.worlds import Linear, arrivals, run


def device(controller: Controller, blocks: int = 150, budget: int = 512) -> SharedDevice:
    sched = registry.create("sched", f"fcfs:token_budget={budget}")
    return SharedDevice(Linear(), controller, sched, sched, blocks=blocks)


@settings(max_examples=4, deadline=None, phases=[Phase.generate])
@given(seed=st.integers(0, 10**6), rate=st.floats(1, 20), kind=st.sampled_from(["fixed", "nexus", "semi-pd"]))
def test_every_request_ends_once_and_no_page_is_lost(seed: int, rate: float, kind: str) -> None:
    controller: Controller = {"fixed": Fixed(0.3), "nexus": Nexus(), "semi-pd": SemiPD(0.5, 0.05, window=4)}[kind]
    where, coming = device(controller), arrivals(15, rate, output=(1, 60), prompt=(300, 2000), seed=seed)
    ends = where._end

    def checked(place: int) -> None:
        ends(place)
        where.workers[0].engine.table.check()

    where._end = checked  # type: ignore[method-assign]
    records = run(where, coming)
    assert sorted(records.column("number").tolist()) == list(range(15))
    assert sum(counts.sum() for _, counts in records.gaps) == sum(one.output - 1 for one in coming)


def test_pages_do_not_move_within_a_pool() -> None:
    where = device(Fixed(0.5))
    run(where, arrivals(10, 3.0, prompt=(64, 640)))
    assert where.copied < 10 * 32  # at most the last page of each, which is not full


def test_a_step_takes_what_its_share_gives() -> None:
    assert slowdown(PROMPT, 0.25) == 4
    assert [slowdown(DECODE, share) for share in (1.0, 0.5, 0.25)] == [1, 1, 2]
    where = device(Fixed(0.25))
    (record,) = run(where, arrivals(1, 1.0, prompt=(100, 100), output=(2, 2)))
    alone = Linear().seconds(100, 1, 100 * 101 / 2, 100)
    assert record.first - record.arrived == pytest.approx(alone)  # nobody decodes, so prompts have the whole device


@given(share=st.floats(0.05, 0.95), decode_first=st.booleans())
def test_nexus_keeps_the_slack_of_the_other_stage(share: float, decode_first: bool) -> None:
    nexus = Nexus()
    found = nexus.search(share, decode_first)
    assert 0 < found < 1
    if decode_first:
        assert slowdown(PROMPT, found) <= nexus.alpha + 1e-6
        assert found == pytest.approx(0.77)  # the least share whose inverse is at most 1.3
    else:
        assert slowdown(DECODE, 1 - found) <= nexus.beta + 1e-6
        assert found == pytest.approx(0.54)


def test_nexus_changes_nothing_within_the_dead_band() -> None:
    where = device(Nexus(delta=0.05))
    where.device.share = 0.51
    assert Nexus(delta=0.05).before(where.device) == 0.51
    assert Nexus(delta=0.02).before(where.device) == pytest.approx(0.54)


def test_semi_pd_converges_to_a_share_that_holds_both_limits() -> None:
    semi = SemiPD(ttft=0.5, tpot=0.1, window=1)
    semi.load = 0.2
    for _ in range(30):
        semi.observe(0.15 / max(semi.share - 0.2, 0.02), 0.02 / (1 - semi.share) + 0.03)
    assert 0.15 / (semi.share - 0.2) <= 0.5
    assert 0.02 / (1 - semi.share) + 0.03 <= 0.1


def test_semi_pd_keeps_the_share_if_both_fail_or_both_hold() -> None:
    semi = SemiPD(ttft=0.5, tpot=0.1)
    assert semi.decide(0.6, 0.2) == semi.decide(0.1, 0.01) == semi.share
