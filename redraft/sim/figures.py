"""From the records of a simulation to its figures, with the names of bench/load/figures.py, in seconds; and the limits of goodput.

    arrives       first token    second           last one
       |---- ttft ----|-- second --|-- itl --|-- itl --|      e2el = all of it; tpot = (e2el - ttft) / (output tokens - 1)

`second` and `tpot` have one value for each request with a second token; `itl` are all times between two tokens of a text, which `second`
are among. A refused request counts as one that never ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, fields
from math import inf, nan
from typing import Any, NamedTuple

import numpy as np

from redraft.bench.load.figures import METRICS as MEASURED
from redraft.core.tree import F64
from redraft.errors import InvalidInput, shown
from redraft.sim.cluster import Cluster
from redraft.sim.records import Records

METRICS = {**MEASURED, "second": "time from the first to the second token"}
PERCENTS = (50, 90, 99)
PERCENT = dict.fromkeys(METRICS, 90.0) | {"itl": 99.0}  # of a limit that names none
JOINT = "joint"


class Limit(NamedTuple):
    """At most `seconds` for `percent` % of the values of `metric`."""

    metric: str
    percent: float
    seconds: float

    def __str__(self) -> str:
        return f"P{self.percent:g} of {self.metric} {self.seconds:g} s"


@dataclass(frozen=True)
class Limits:
    """each: what must hold for all requests together; joint: the least share of requests that must keep all limits alone, with their
    longest time between tokens for itl; None: any."""

    each: tuple[Limit, ...] = ()
    joint: float | None = None

    @classmethod
    def parse(cls, text: str) -> Limits:
        """ "ttft=0.5,itl@99=0.1,joint=0.9": seconds by metric, or by metric and percentile. InvalidInput names the part."""
        each, joint = [], None
        for part in filter(None, (part.strip() for part in text.split(","))):
            name, _, value = part.partition("=")
            metric, at, percent = name.strip().partition("@")
            try:
                number, place = float(value), float(percent) if at else PERCENT.get(metric, nan)
            except ValueError:
                number = place = nan
            if metric == JOINT and not at and 0 < number <= 1:
                joint = number
            elif metric in METRICS and 0 < place <= 100 and 0 < number < inf:
                each.append(Limit(metric, place, number))
            else:
                allowed = f"{', '.join(METRICS)}, each with =SECONDS or @PERCENT=SECONDS, and joint=SHARE, are allowed"
                raise InvalidInput(f"limits = {shown(part)}: {allowed}")
        if joint is not None and not each:
            raise InvalidInput("limits: joint needs another limit, which requests keep or not")
        return cls(tuple(each), joint)


def latencies(records: Records, first: int = 0) -> dict[str, F64]:
    """The values of requests from number `first` on, in one order; of itl the longest of each. inf: it was refused; nan: it has none."""
    kept = records.column("number") >= first
    arrived, begun, second, end, longest, output = (
        records.column(name)[kept] for name in ("arrived", "first", "second", "end", "longest", "output")
    )
    found: dict[str, F64] = {
        "ttft": begun - arrived,
        "tpot": np.where(output > 1, end - begun, nan) / np.maximum(output - 1, 1),
        "itl": longest,
        "e2el": end - arrived,
        "second": second - begun,
    }
    return {name: np.where(np.isnan(end), inf, values) for name, values in found.items()}


@dataclass(frozen=True)
class Values:
    """The values of each metric and how often each occurs."""

    of: Mapping[str, tuple[F64, F64]]

    @classmethod
    def within(cls, records: Records, first: int = 0) -> Values:
        """first: the first request whose values count; of itl all do."""
        gaps = [np.concatenate(part).astype(np.float64) for part in zip(*records.gaps, strict=True)]
        known = {name: values[~np.isnan(values)] for name, values in latencies(records, first).items()}
        return cls({name: (values, np.ones(len(values))) for name, values in known.items()} | {"itl": (gaps[0], gaps[1])})

    def percentile(self, metric: str, percent: float) -> float:
        """The smallest value that so many percent of all do not exceed; nan without values."""
        values, counts = self.of[metric]
        order = np.argsort(values)
        ranks = np.cumsum(counts[order])
        if not len(ranks):
            return nan
        return float(values[order[np.searchsorted(ranks, ranks[-1] * percent / 100 * (1 - 1e-12))]])

    def mean(self, metric: str) -> float:
        values, counts = self.of[metric]
        return float(values @ counts / counts.sum()) if counts.sum() else nan


@dataclass(frozen=True)
class Figures:
    """rate: requests that arrived a second; duration: seconds until the last token; output: tokens a second; cached: the share of prompt
    tokens that the prefix cache had; busy: the share of the time in which workers ran steps; joint: the share of requests that keep all
    limits; held: whether the limits hold; latencies: "metric@percent" -> seconds."""

    workers: int
    requests: int
    refused: int
    rate: float
    duration: float
    output: float
    cached: float
    busy: float
    preemptions: int
    steps: int
    joint: float
    held: bool
    latencies: dict[str, float]
    values: Values = field(repr=False)

    @classmethod
    def of(cls, cluster: Cluster, limits: Limits, skip: float = 0.0) -> Figures:
        """skip: the share of requests, from the first one on, whose latencies do not count."""
        records, workers = cluster.records, cluster.workers
        first = int(skip * len(records))
        arrived, done = np.sort(records.column("arrived")), records.column("worker") >= 0
        span = arrived[-1] - arrived[0]
        duration = max(records.column("end")[done], default=arrived[0]) - arrived[0]
        values, joint = Values.within(records, first), _joint(records, limits, first)
        return cls(
            workers=len(workers),
            requests=len(records),
            refused=int((~done).sum()),
            rate=float((len(records) - 1) / span) if span else inf,
            duration=float(duration),
            output=float(records.column("output")[done].sum() / duration) if duration else 0.0,
            cached=float(records.column("cached").sum() / records.column("prompt").sum()),
            busy=float(sum(worker.seconds for worker in workers) / (len(workers) * duration)) if duration else 0.0,
            preemptions=sum(worker.engine.preemptions for worker in workers),
            steps=sum(len(worker.times) for worker in workers),
            joint=joint,
            held=(limits.joint is None or joint >= limits.joint)
            and not any(values.percentile(limit.metric, limit.percent) > limit.seconds for limit in limits.each),
            latencies={f"{metric}@{percent}": values.percentile(metric, percent) for metric in METRICS for percent in PERCENTS},
            values=values,
        )

    def document(self) -> dict[str, Any]:
        """For a JSON file; null for what has no value."""
        plain = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in ("values", "latencies")}
        return _finite(plain) | {"latencies": _finite(self.latencies)}


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value if np.isfinite(value) else None for name, value in values.items()}


def _joint(records: Records, limits: Limits, first: int) -> float:
    """The share of requests that keep all limits."""
    found = latencies(records, first)
    good = np.ones(len(found["ttft"]), bool)
    for limit in limits.each:
        good &= ~(found[limit.metric] > limit.seconds)
    return float(good.mean()) if len(good) else nan


def goodput(tried: Seq[Figures]) -> Figures | None:
    """The one with the most requests a second among those that hold their limits."""
    return max((one for one in tried if one.held), key=lambda one: one.rate, default=None)
