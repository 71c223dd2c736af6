"""The most requests a second, or the fewest workers, with which limits hold.

Whether limits hold is nearly monotone if all runs have the same requests in the same order, which a trace played at another rate has.
"""

from __future__ import annotations

from collections.abc import Callable

from redraft.sim.figures import Figures

WIDTH = 0.02  # of the rate that is found
GROWTH = 2  # from one rate or number to the next, until limits are exceeded or hold
REACH = 4096  # times the first one


def highest_rate(run: Callable[[float], Figures], start: float) -> tuple[Figures | None, list[Figures]]:
    """The run with the highest rate that holds its limits, None without one, and all runs. start: the first rate that is tried. Rates of
    less or more than REACH times it are not tried."""
    tried: list[Figures] = []
    low, high, rate = 0.0, None, start
    best: Figures | None = None
    while start / REACH <= rate <= start * REACH and (high is None or high - low > WIDTH * high):
        tried.append(run(rate))
        if tried[-1].held:
            low, best = rate, tried[-1]
        else:
            high = rate
        rate = low * GROWTH if high is None else (low + high) / 2 if low else high / GROWTH
    return best, tried


def fewest(run: Callable[[int], Figures], start: int) -> tuple[Figures | None, list[Figures]]:
    """The run with the fewest workers that hold their limits, None without one, and all runs. start: the first number that is tried. More
    than REACH times it are not tried."""
    tried: list[Figures] = []
    low, high, count = 0, None, start
    best: Figures | None = None
    while count <= start * REACH and (high is None or high - low > 1):
        tried.append(run(count))
        if tried[-1].held:
            high, best = count, tried[-1]
        else:
            low = count
        count = 2 * low if high is None else (low + high) // 2
    return best, tried
