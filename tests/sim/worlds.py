"""Small simulated clusters and random arrivals, for tests of the simulator."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import accumulate
from random import Random
from typing import Any

from redraft import registry
from redraft.sim.cluster import Cluster
from redraft.sim.link import FREE, Link
from redraft.sim.records import Records
from redraft.sim.trace import Arrival, requests
from redraft.sim.worker import MOST, Worker


@dataclass(frozen=True)
class Linear:
    """A cost with a term for each figure."""

    step: float = 0.01
    row: float = 1e-4
    text: float = 1e-5
    cell: float = 1e-7

    def seconds(self, rows: int, texts: int, cells: float, read: float) -> float:
        return self.step + self.row * rows + self.text * texts + self.cell * cells


def cluster(
    workers: int = 1,
    *,
    cost: Any = None,
    sched: str = "sarathi",
    route: str = "round-robin",
    blocks: int = 400,
    most: int = MOST,
    split: tuple[int, int] | None = None,
    link: Link = FREE,
    **options: Any,
) -> Cluster:
    """split: workers for prompts and workers for the rest, in place of `workers`."""
    stages: list[tuple[int, ...]] = [(0,)] * workers if split is None else [(0,)] * split[0] + [(1,)] * split[1]
    made = [
        Worker(
            i, cost or Linear(), registry.create("sched", sched, **options), blocks=blocks, context=4096, most=most, stages=own, link=link
        )
        for i, own in enumerate(stages)
    ]
    return Cluster(made, registry.create("route", route).open())


def arrivals(
    count: int, rate: float, *, prompt: tuple[int, int] = (1, 900), output: tuple[int, int] = (1, 200), seed: int = 0
) -> list[Arrival]:
    """Poisson arrivals; every second prompt begins with the blocks of an earlier one."""
    random = Random(seed)
    times = accumulate(random.expovariate(rate) for _ in range(count))
    found: list[Arrival] = []
    for i, at in enumerate(times):
        length = random.randint(*prompt)
        old = random.choice(found).blocks if found and random.random() < 0.5 else ()
        kept = list(old[: random.randint(0, len(old))])
        names = kept + [1000 * i + k for k in range(length // 64 - len(kept))]
        found.append(Arrival(at, length, random.randint(*output), names, 64))
    return found


def run(where: Cluster, coming: Seq[Arrival]) -> Records:
    records = where.run(requests(coming))
    for worker in where.workers:
        worker.engine.table.check()
        assert worker.engine.memory.used() == 0 and not worker.engine.has_work
    return records
