"""Figures of a simulation, limits, and the search for the most requests a second."""

from __future__ import annotations

from math import inf, nan

import numpy as np
import pytest

from redraft.core.step_cost import StepCost
from redraft.errors import InvalidInput
from redraft.sim.configuration import Configuration, simulate
from redraft.sim.figures import Figures, Limit, Limits, Values, latencies
from redraft.sim.records import Record, Records
from redraft.sim.search import REACH, fewest, highest_rate
from redraft.sim.trace import Arrival, Trace, read
from tests.sim.worlds import Linear, arrivals, cluster, run

COST = StepCost((1, 512), (0.01, 0.05), cell=1e-7)
NONE = Limits()


def records() -> Records:
    found = Records()
    found.add(Record(1, 1.0, 0, 8, 3, 0, 2.0, 2.5, 3.5, 1.0))
    found.add(Record(0, 0.0, 0, 8, 1, 4, 0.5, nan, 0.5, 0.0))
    found.add(Record(2, 1.0, prompt=8, output=2))
    found.gaps = [(np.array([0.5, 1.0]), np.array([1, 1]))]
    return found


def test_each_metric_is_what_its_name_says() -> None:
    found = {name: values.tolist() for name, values in latencies(records()).items()}
    assert found["ttft"] == [1.0, 0.5, inf] and found["e2el"] == [2.5, 0.5, inf]
    assert found["itl"] == [1.0, 0.0, inf]
    assert found["tpot"] == pytest.approx([0.75, nan, inf], nan_ok=True)
    assert found["second"] == pytest.approx([0.5, nan, inf], nan_ok=True)


def test_percentiles_count_refused_requests_and_how_often_a_gap_occurs() -> None:
    values = Values.within(records())
    assert [values.percentile("ttft", percent) for percent in (1, 33, 34, 66, 67)] == [0.5, 0.5, 1.0, 1.0, inf]
    weighted = Values({"itl": (np.array([3.0, 1.0, 2.0]), np.array([1, 98, 1]))})
    assert [weighted.percentile("itl", percent) for percent in (98, 98.5, 99, 99.5)] == [1.0, 2.0, 2.0, 3.0]
    assert weighted.mean("itl") == pytest.approx(1.03)
    assert np.isnan(Values({"itl": (np.zeros(0), np.zeros(0))}).percentile("itl", 50))


def test_weighted_percentiles_are_those_of_all_values() -> None:
    where = cluster(2, blocks=130)
    run(where, arrivals(60, 10.0))
    values, counts = Values.within(where.records).of["itl"]
    every = np.repeat(values, counts.astype(int))
    for percent in (1, 50, 90, 99, 100):
        assert Values.within(where.records).percentile("itl", percent) == np.percentile(every, percent, method="inverted_cdf")


def test_figures_add_up() -> None:
    where = cluster(2, cost=Linear(0.5, 0, 0, 0))
    run(where, [Arrival(1.0, 64, 2), Arrival(2.0, 10, 4), Arrival(3.0, 10, 1)])
    found = Figures.of(where, NONE)
    assert (found.workers, found.requests, found.refused, found.preemptions, found.steps) == (2, 3, 0, 0, 7)
    assert (found.duration, found.output, found.busy, found.rate) == (3.0, pytest.approx(7 / 3), pytest.approx(7 / 12), 1.0)
    assert found.latencies["ttft@50"] == pytest.approx(0.5)
    assert found.joint == 1.0 and found.held
    assert found.document()["latencies"]["itl@99"] == pytest.approx(0.5)


def test_limits_hold_for_all_together_or_for_a_share_of_the_requests() -> None:
    where = cluster(cost=Linear(1.0, 0, 0, 0), sched="fcfs", max_seqs=1)
    run(where, [Arrival(0.0, 8, 1)] * 10)  # times to the first token are 1 to 10 s
    held = {text: Figures.of(where, Limits.parse(text)).held for text in ("ttft=9", "ttft=8.9", "ttft@50=5", "ttft=9,joint=0.9")}
    assert held == {"ttft=9": True, "ttft=8.9": False, "ttft@50=5": True, "ttft=9,joint=0.9": True}
    assert not Figures.of(where, Limits.parse("ttft=9,joint=0.91")).held
    assert Figures.of(where, Limits.parse("ttft=9,itl=1")).joint == pytest.approx(0.9)
    assert Figures.of(where, Limits.parse("ttft=9"), skip=0.5).latencies["ttft@50"] == 8.0


def test_limits_that_can_be_read() -> None:
    assert Limits.parse(" ttft = 0.5, itl@99.9=0.1 ,joint=0.9") == Limits((Limit("ttft", 90, 0.5), Limit("itl", 99.9, 0.1)), 0.9)
    assert Limits.parse("") == NONE and Limits.parse("itl=1").each == (Limit("itl", 99, 1.0),)


@pytest.mark.parametrize("text", ["ttft", "tbt=1", "ttft=x", "ttft=0", "ttft=inf", "ttft@0=1", "ttft@101=1", "joint=0.9", "ttft=1,joint=2"])
def test_limits_that_cannot_be_read(text: str) -> None:
    with pytest.raises(InvalidInput, match="limits"):
        Limits.parse(text)


def test_the_rate_that_is_found_holds_the_limits_and_a_higher_one_does_not() -> None:
    trace, limits = read("poisson:rate=1,prompt=200,output=20,requests=120"), Limits.parse("ttft=0.3")
    best, tried = highest_rate(lambda rate: simulate(Configuration(), COST, trace.at_rate(rate), limits), 1.0)
    assert best is not None and best.held and best in tried
    failed = min(one.rate for one in tried if not one.held)
    assert best.rate < failed <= best.rate / 0.97
    other, _ = highest_rate(lambda rate: simulate(Configuration(), COST, trace.at_rate(rate), limits), 200.0)
    assert other is not None and other.rate == pytest.approx(best.rate, rel=0.05)


def test_no_rate_holds_a_limit_that_one_request_exceeds() -> None:
    trace = read("poisson:requests=3")
    best, tried = highest_rate(lambda rate: simulate(Configuration(), COST, trace.at_rate(rate), Limits.parse("ttft=0.001")), 1.0)
    assert best is None and all(1 / REACH <= one.rate <= REACH for one in tried)


def test_the_fewest_workers() -> None:
    trace, limits = read("poisson:rate=300,prompt=200,output=20,requests=120"), Limits.parse("ttft=0.3")

    def on(count: int) -> Figures:
        return simulate(Configuration(count, router="least-load"), COST, trace, limits)

    best, tried = fewest(on, 1)
    assert best is not None and best.workers > 1
    assert {one.workers: one.held for one in tried}[best.workers - 1] is False
    other, _ = fewest(on, 16)
    assert other is not None and other.workers == best.workers


def test_what_configurations_differ_in_names_them() -> None:
    chosen = [Configuration(2), Configuration(4), Configuration(4, scheduler="fcfs")]
    assert [one.named(chosen) for one in chosen] == ["2 replicas sarathi", "4 replicas sarathi", "4 replicas fcfs"]
    assert Configuration().named([Configuration()]) == ""


@pytest.mark.parametrize("wrong", [{"replicas": 0}, {"scheduler": "nope"}, {"router": "nope"}, {"router": "splitwise"}, {"blocks": 0}])
def test_configurations_that_do_not_exist(wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidInput):
        simulate(Configuration(**wrong), COST, Trace([Arrival(0.0, 1, 1)], ""), NONE)  # type: ignore[arg-type]
