"""A cluster as options, and one simulation of it."""

from __future__ import annotations

import gc
import re
from collections.abc import Sequence as Seq
from dataclasses import dataclass, fields, replace
from typing import Any

from redraft import registry
from redraft.errors import InvalidInput, shown
from redraft.ops.format import PAGE
from redraft.options import Options, number
from redraft.sched.router import FIRST
from redraft.sched.scheduler import Scheduler
from redraft.sim.cluster import LAST, Cluster
from redraft.sim.figures import Figures, Limits
from redraft.sim.link import Link
from redraft.sim.runner import Cost
from redraft.sim.trace import Trace, requests
from redraft.sim.worker import Worker

COUNTED = ("replicas", "blocks", "split")


@dataclass(frozen=True)
class Configuration(Options):
    """replicas: workers; split: "3:5" for 3 workers that compute prompts and 5 that go on with them, in place of replicas; scheduler,
    router: "name:option=value,..."; blocks: the pool of each worker, in blocks of 32 tokens; link: between split workers,
    "token_bytes=...,bandwidth=...,latency=..."."""

    replicas: int = number(1, ge=1, le=100_000)
    scheduler: str = "sarathi"
    router: str = "prefix-affinity"
    blocks: int = number(4096, ge=1, le=1 << 24)
    split: str = ""
    link: str = ""

    @property
    def stages(self) -> Seq[tuple[int, ...]]:
        """Of each worker, see redraft.sched.router.Load. InvalidInput for a split that is none."""
        if not self.split:
            return [FIRST] * self.replicas
        if not (found := re.fullmatch(r"([1-9]\d{0,4}):([1-9]\d{0,4})", self.split)):
            raise InvalidInput(f"split = {shown(self.split)}: PROMPT:DECODE, two numbers of workers from 1 to 99999, is needed")
        return [FIRST] * int(found[1]) + [(LAST,)] * int(found[2])

    def cluster(self, cost: Cost) -> Cluster:
        """UnknownMethod or InvalidInput for a scheduler or router that does not exist."""
        scheduler: Scheduler = registry.create("sched", self.scheduler)
        router = registry.create("route", self.router).open()
        if router.any_stage and not self.split:
            raise InvalidInput(f"router = {self.router!r}: it splits prompts and decoding, and these workers run both")
        link: Link = registry.build(Link, f"link:{self.link}" if self.link else "link")
        workers = [
            Worker(i, cost, scheduler, blocks=self.blocks, context=PAGE * self.blocks, stages=stages, link=link)
            for i, stages in enumerate(self.stages)
        ]
        return Cluster(workers, router)

    def but(self, **values: Any) -> Configuration:
        return replace(self, **values)

    def named(self, others: Seq[Configuration]) -> str:
        """What it has unlike some of the others, without the option's name where the value says it."""
        differ = [field.name for field in fields(self) if len({getattr(one, field.name) for one in others}) > 1]
        unsaid = ("replicas", "link") if self.split else ("split", "link")  # a command has one link
        differ = [name for name in differ if name not in unsaid]
        return " ".join(f"{getattr(self, name)} {name}" if name in COUNTED else getattr(self, name) for name in differ)


def simulate(configuration: Configuration, cost: Cost, trace: Trace, limits: Limits, skip: float = 0.0) -> Figures:
    """skip: see Figures.of."""
    cluster = configuration.cluster(cost)
    gc.disable()  # what a simulation drops is in no cycle, and its many objects take long to look through
    try:
        cluster.run(requests(trace.arrivals))
    finally:
        gc.enable()
    return Figures.of(cluster, limits, skip)
