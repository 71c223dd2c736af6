"""A figure of simulations: the share of values up to each latency, and how many requests keep the limits at each rate that was tried."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from redraft.bench.load.figures import METRICS as MEASURED
from redraft.sim.figures import METRICS, Limits, Values
from redraft.sim.show import Result

DASHED = {"color": "black", "linestyle": "--", "linewidth": 1}


def plot(path: Path, title: str, results: Seq[Result], limits: Limits) -> None:
    """Draws to a .png, .svg or .pdf file; times from the first to the second token only if a limit is set for them."""
    from matplotlib.figure import Figure

    searched = any(len(result.tried) > 1 for result in results)
    limited = {limit.metric for limit in limits.each}
    panels = [metric for metric in METRICS if metric in MEASURED or metric in limited]
    panels += ["rate"] if searched and limits.each else []
    figure = Figure(figsize=(5 * ((len(panels) + 1) // 2), 7), layout="constrained")
    axes = figure.subplots(2, (len(panels) + 1) // 2, squeeze=False).flat
    for panel, axis in zip(panels, axes, strict=False):
        axis.grid(alpha=0.3)
        (_rates if panel == "rate" else _distribution)(axis, panel, results, limits)
    for axis in list(axes):
        axis.axis("off")
    lines, labels = figure.axes[0].get_legend_handles_labels()
    if any(labels):
        figure.legend(lines, labels, loc="outside upper center", ncols=3, frameon=False, title=title)
    else:
        figure.suptitle(title)
    figure.savefig(path, dpi=110)


def _distribution(axis: Any, metric: str, results: Seq[Result], limits: Limits) -> None:
    from matplotlib.ticker import NullFormatter

    for result in results:
        if result.best is not None:
            axis.plot(*_shares(result.best.values, metric), label=result.name)
    for limit in limits.each:
        if limit.metric == metric:
            axis.axvline(limit.seconds, **DASHED)
            axis.axhline(limit.percent / 100, **DASHED)
    axis.set(xscale="log", xlabel=f"{METRICS[metric]}, s", ylabel="share of values up to it", ylim=(0, 1.02))
    low, high = axis.get_xlim()
    if high > 10 * low:  # powers of ten are enough, and more would overlap
        axis.xaxis.set_minor_formatter(NullFormatter())


def _shares(values: Values, metric: str) -> tuple[Any, Any]:
    """Values in order, at most 2000 of them, and the share of all up to each."""
    found, counts = values.of[metric]
    order = np.argsort(found)
    shares = np.cumsum(counts[order]) / max(counts.sum(), 1)
    chosen = np.unique(np.linspace(0, max(len(order) - 1, 0), min(len(order), 2000)).astype(int))
    return found[order][chosen], shares[chosen]


def _rates(axis: Any, panel: str, results: Seq[Result], limits: Limits) -> None:
    for result in results:
        runs = sorted((run.rate / run.workers, run.joint) for run in result.tried if isfinite(run.rate))
        axis.plot([rate for rate, _ in runs], [share for _, share in runs], marker=".", label=result.name)
    if limits.joint is not None:
        axis.axhline(limits.joint, **DASHED)
    axis.set(xlabel="requests a second and worker", ylabel="requests within all limits", ylim=(0, 1.02))
