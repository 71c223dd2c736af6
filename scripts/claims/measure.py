"""Goodput of configurations over rates and seeds, and the spread of a ratio of two of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from math import nan, sqrt
from pathlib import Path
from typing import NamedTuple

import numpy as np

from redraft.core.step_cost import StepCost
from redraft.sim.cluster import Cluster
from redraft.sim.figures import Figures, Limits
from redraft.sim.trace import Trace, requests

COSTS = Path(__file__).parent
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}  # Student's t for the mean of n values


class Interval(NamedTuple):
    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} ({self.low:.2f} to {self.high:.2f})"


def interval(values: Seq[float]) -> Interval:
    """The mean with its 95 % interval, from values of independent seeds."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return Interval(mean, nan, nan)
    half = T95.get(len(values), 1.96) * float(np.std(values, ddof=1)) / sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def verdict(found: Interval, above: float = 1.0) -> str:
    """Whether it is above a number, with its whole interval."""
    return "confirmed" if found.low > above else "refuted" if found.high < above else "not decided"


def gpu() -> StepCost:
    return StepCost.read(COSTS / "opt-13b-a100.json")


def simulated(cluster: Cluster, trace: Trace, skip: float = 0.05) -> Figures:
    cluster.run(requests(trace.arrivals))
    return Figures.of(cluster, Limits(), skip)


def goodputs(build: Callable[[], Cluster], devices: int, trace: Trace, limits: Mapping[str, Limits], rates: Seq[float]) -> dict[str, float]:
    """The highest rate, in requests a second and device, for each of the limits: between the last rate that holds them and the first
    one that does not, where the worst of their values meets its limit, on a line. 0 if none holds. rates: rising, a device."""
    slack: dict[str, list[float]] = {name: [] for name in limits}
    for rate in rates:
        figures = simulated(build(), trace.at_rate(rate * devices))
        for name, wanted in limits.items():
            if not slack[name] or slack[name][-1] >= 0:
                slack[name].append(room(figures, wanted))
        if all(found[-1] < 0 for found in slack.values()):
            break
    return {name: crossing(rates, found) for name, found in slack.items()}


def room(figures: Figures, limits: Limits) -> float:
    """How far below its limit the worst value is, as a share of the limit; negative above it."""
    return min(1 - figures.values.percentile(limit.metric, limit.percent) / limit.seconds for limit in limits.each)


def crossing(rates: Seq[float], slack: Seq[float]) -> float:
    """Where the room ends, on a line between two rates."""
    held = sum(value >= 0 for value in slack)
    if held == 0:
        return 0.0
    if held == len(slack):
        return rates[held - 1]
    low, high = slack[held - 1], max(slack[held], -1.0)
    return rates[held - 1] + (rates[held] - rates[held - 1]) * low / (low - high)
