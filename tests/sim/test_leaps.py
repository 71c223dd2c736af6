"""Several steps at once give the times, the memory and the decisions of single steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from redraft import registry
from redraft.kv.prefix import Node
from redraft.sim.cluster import Cluster
from redraft.sim.worker import MOST
from tests.sim.test_cluster import same
from tests.sim.worlds import Linear, arrivals, cluster, run


def tree(where: Cluster) -> list[Any]:
    """The published pages of each worker, and in which order they would be evicted, by their texts: the numbers of pages may differ."""

    def text(node: Node) -> tuple[Any, ...]:
        return () if node.parent is None else (*text(node.parent), node.key)

    tables = [worker.engine.table.prefix for worker in where.workers]
    return [(sorted(map(text, prefix.nodes.values())), [text(prefix.nodes[page]) for page in prefix.idle]) for prefix in tables]


@settings(max_examples=6, deadline=None)
@example(seed=99, rate=10.0, blocks=128, sched="fcfs", budget=512, seqs=16, most=9, route="round-robin")
@given(
    seed=st.integers(0, 10**6),
    rate=st.floats(1, 30),
    blocks=st.integers(128, 250),
    sched=st.sampled_from(sorted(registry.METHODS["sched"])),
    budget=st.sampled_from([16, 100, 512]),
    seqs=st.sampled_from([2, 16]),
    most=st.integers(2, MOST),
    route=st.sampled_from(["round-robin", "least-load", "prefix-affinity"]),
)
def test_several_steps_at_once_change_nothing(
    seed: int, rate: float, blocks: int, sched: str, budget: int, seqs: int, most: int, route: str
) -> None:
    coming = arrivals(30, rate, output=(1, 300), prompt=(1, 1500), seed=seed)
    options: dict[str, Any] = {"sched": sched, "route": route, "blocks": blocks, "token_budget": budget, "max_seqs": seqs}
    single, leaping = cluster(2, most=1, **options), cluster(2, most=most, **options)
    assert same(run(single, coming), run(leaping, coming))
    for one, other in zip(single.workers, leaping.workers, strict=True):
        assert one.times == other.times
        assert one.engine.preemptions == other.engine.preemptions
        assert one.engine.table.peak == other.engine.table.peak
        assert all(map(np.array_equal, one.gap_counts()[0], other.gap_counts()[0]))
    assert tree(single) == tree(leaping)


def test_a_long_text_takes_few_steps_of_the_engine() -> None:
    where = cluster(cost=Linear())
    engine, begin, begun = where.workers[0].engine, where.workers[0].engine.begin, []
    engine.begin = lambda: begun.append(1) or begin()  # type: ignore[method-assign, func-returns-value]
    run(where, arrivals(1, 1.0, output=(1000, 1000)))
    assert len(where.workers[0].times) >= 1000
    assert len(begun) < 20


@pytest.mark.parametrize("most", [1, MOST])
def test_a_request_that_comes_between_is_planned_after_the_step_under_way(most: int) -> None:
    where = cluster(cost=Linear(1.0, 0, 0, 0), most=most)
    long, short = run(
        where, [one._replace(at=at) for one, at in zip(arrivals(2, 1.0, prompt=(9, 9), output=(9, 9)), (0.0, 2.5), strict=True)]
    )
    assert (long.first, long.end, short.first) == (1.0, 9.0, 4.0)
