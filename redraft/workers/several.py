"""A host with several workers on this machine: each gets its share of the processors and of the memory."""

from __future__ import annotations

import os
from collections.abc import Mapping

from redraft import registry
from redraft.config import EngineConfig, SamplingParams
from redraft.front import Headless
from redraft.workers.cluster import Cluster
from redraft.workers.link import Process
from redraft.workers.message import Begin


def workers_of(
    config: EngineConfig, stages: Mapping[str, tuple[int, ...]], router: str, check: SamplingParams, step_timeout: float
) -> tuple[Headless, Cluster]:
    """Workers with these names, each with the stages of a request that it runs. A cache memory that `config` gives is that of each worker.
    check: parameters that the workers must be able to serve. Raises what LLM raises, where this needs no weights."""
    count = len(stages)
    if config.cache.memory is None:
        config = config.but(cache=config.cache.but(fraction=config.cache.fraction / count))
    front = Headless(config)
    check = front.cached(check, front.cache_lengths[-1])
    begins = [
        Begin(name, _placed(front.of_worker, str(front.backend.device), i), cores, check, own, shares=len(set(stages.values())) > 1)
        for i, ((name, own), cores) in enumerate(zip(stages.items(), _cores(count), strict=True))
    ]
    return front, Cluster(front, begins, registry.create("route", router).open(), Process, step_timeout=step_timeout)


def _cores(count: int) -> list[tuple[int, ...] | None]:
    """The processors of each worker. None for all: there are fewer than workers, or this system does not say which there are."""
    if not hasattr(os, "sched_getaffinity") or len(cores := sorted(os.sched_getaffinity(0))) < count:
        return [None] * count
    return [tuple(cores[i * len(cores) // count : (i + 1) * len(cores) // count]) for i in range(count)]


def _placed(config: EngineConfig, device: str, index: int) -> EngineConfig:
    """With the GPU of this number, if GPUs compute."""
    return config.but(model=config.model.but(device=f"cuda:{index}")) if device == "cuda" else config
