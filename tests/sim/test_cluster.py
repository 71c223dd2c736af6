"""Simulated clusters: every request ends once, times add up, and a queue is as long as theory says."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from redraft import registry
from redraft.core.sequence import Request
from redraft.sched.router import Load
from redraft.sim.records import Records
from redraft.sim.trace import Arrival
from tests.contracts.identity import preempts
from tests.sim.worlds import Linear, arrivals, cluster, run


def same(one: Records, other: Records) -> bool:
    return len(one) == len(other) and all(np.array_equal(one.column(name), other.column(name), equal_nan=True) for name in one.fields)


@pytest.mark.parametrize("sched", sorted(registry.METHODS["sched"]))
@pytest.mark.parametrize("route", ["round-robin", "least-load", "prefix-affinity"])
def test_every_request_ends_once_and_blocks_return(sched: str, route: str) -> None:
    coming = arrivals(150, rate=40.0)
    where = cluster(3, sched=sched, route=route, blocks=130)
    records = run(where, coming)
    assert sorted(records.column("number").tolist()) == list(range(150))
    assert records.column("output").sum() == sum(one.output for one in coming)
    assert sum(counts.sum() for _, counts in records.gaps) == sum(one.output - 1 for one in coming)
    assert where.front.loads == [Load(free_blocks=130)] * 3
    assert not preempts(sched) or sum(worker.engine.preemptions for worker in where.workers) > 0
    assert records.column("cached").sum() > 0


def test_times_of_a_request_add_up() -> None:
    records = run(cluster(2, blocks=130), arrivals(100, rate=5.0))
    for record in records:
        assert record.arrived < record.first <= record.end
        assert (record.output == 1) == np.isnan(record.second)
    total = sum(record.end - record.first for record in records)
    assert sum((gaps * counts).sum() for gaps, counts in records.gaps) == pytest.approx(total)
    assert max(record.longest for record in records) == pytest.approx(max(gaps.max(initial=0) for gaps, _ in records.gaps))


def test_a_step_takes_what_its_cost_says() -> None:
    cost = Linear(step=1.0, row=0.1, text=0.01, cell=0.001)
    (record,) = run(cluster(cost=cost, token_budget=64, draft_total=0), [Arrival(5.0, 100, 3)])
    chunk, rest = 1 + 6.4 + 0.01 + 0.001 * 64 * 65 / 2, 1 + 3.6 + 0.01 + 0.001 * 36 * (64 + 37 / 2)
    second, third = 1.11 + 0.001 * 101, 1.11 + 0.001 * 102
    assert record.first == pytest.approx(5 + chunk + rest)
    assert (record.second, record.longest) == pytest.approx((record.first + second, third))
    assert record.end == pytest.approx(record.first + second + third)


def test_the_same_arrivals_give_the_same_run() -> None:
    coming = arrivals(80, rate=6.0)
    one, other = (run(cluster(2, route="prefix-affinity"), coming) for _ in range(2))
    assert same(one, other)


def test_the_mean_wait_is_that_of_a_queue_with_equal_service_times() -> None:
    load, service = 0.5, 0.5
    coming = [one._replace(prompt=8, output=1, blocks=()) for one in arrivals(5_000, rate=load / service)]
    scaled = coming[-1].at * load / service / len(coming)  # the drawn times, at the exact rate
    coming = [one._replace(at=one.at / scaled) for one in coming]
    records = run(cluster(cost=Linear(service, 0, 0, 0), sched="fcfs", max_seqs=1), coming)
    wait = float((records.column("first") - records.column("arrived")).mean())
    assert wait == pytest.approx(service + load * service / (2 * (1 - load)), rel=0.03)


def test_a_request_that_is_too_long_is_refused_and_counted() -> None:
    records = run(cluster(blocks=130), [Arrival(0.0, 5000, 1), Arrival(0.0, 10, 2)])
    refused, done = sorted(records)
    assert (refused.worker, np.isnan(refused.end)) == (-1, True)
    assert (done.worker, done.output) == (0, 2)


def test_arrivals_at_one_time_share_the_first_step() -> None:
    records = run(cluster(), [Arrival(1.0, 10, 1)] * 5)
    assert len(set(records.column("first").tolist())) == 1


def test_the_router_sees_every_request_that_was_sent() -> None:
    seen: list[list[Load]] = []

    class Recording:
        def route(self, request: Request, loads: list[Load], stage: int = 0) -> int:
            seen.append(list(loads))
            return len(seen) % 2

    where = cluster(2)
    where.front.router = Recording()
    run(where, [Arrival(0.0, 40, 30), Arrival(0.0, 50, 30), Arrival(0.1, 60, 30)])
    assert [[load.queued_tokens for load in loads] for loads in seen] == [[0, 0], [0, 40], [0, 0]]
    assert [load.running for load in seen[2]] == [1, 1]
    assert [load.free_blocks for load in seen[2]] == [400 - 3, 400 - 3]


def test_no_package_of_tensors_is_imported() -> None:
    code = (
        "import sys; from tests.sim.worlds import arrivals, cluster, run; run(cluster(), arrivals(3, 1.0));"
        "sys.exit(', '.join({'torch', 'transformers'} & set(sys.modules)) or None)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
