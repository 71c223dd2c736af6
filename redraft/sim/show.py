"""The report of simulations: figures of one, a table of several, and what they say about each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from math import isfinite, isnan
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from redraft.sim.figures import METRICS, PERCENTS, Figures, Limit, Limits

COLUMNS = {"ttft@50": "ttft P50", "ttft@99": "P99", "itl@50": "itl P50", "itl@99": "P99", "e2el@50": "e2el P50"}


class Result(NamedTuple):
    """What was found for one configuration. best: the run that counts, None if no run held the limits; tried: all runs."""

    name: str
    best: Figures | None
    tried: list[Figures]


def seconds(value: float) -> str:
    """Three digits.

    >>> [seconds(one) for one in (0.01234, 1.5, 123.4, float("inf"), float("nan"))]
    ['12.3 ms', '1.50 s', '123 s', 'never', '-']
    """
    if isnan(value):
        return "-"
    if not isfinite(value):
        return "never"
    value, unit = (value, "s") if value >= 1 else (1000 * value, "ms")
    return f"{value:.{max(0, 2 - len(str(int(value))) + 1)}f} {unit}"


def amount(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def single(console: Console, result: Result, limits: Limits) -> None:
    """All figures of one configuration."""
    if result.best is None:
        console.print(Text(f"the limits hold in none of {len(result.tried)} runs"))
    else:
        _single(console, result.best, limits)


def _single(console: Console, figures: Figures, limits: Limits) -> None:
    facts = Table.grid(padding=(0, 2, 0, 0))
    for name, value in _facts(figures, limits):
        facts.add_row(name, value)
    console.print(facts)
    console.print()
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("")
    for percent in PERCENTS:
        table.add_column(f"P{percent}", justify="right")
    for metric, name in METRICS.items():
        table.add_row(f"{name} ({metric})", *(seconds(figures.latencies[f"{metric}@{percent}"]) for percent in PERCENTS))
    console.print(table)


def _facts(figures: Figures, limits: Limits) -> Iterator[tuple[str, str]]:
    refused = f", of which {figures.refused} refused: longer than a worker's pool" if figures.refused else ""
    yield "requests", f"{figures.requests}{refused}"
    yield "requests a second", f"{amount(figures.rate)} arrived, on {figures.workers} worker{'s' * (figures.workers > 1)}"
    yield "duration", f"{seconds(figures.duration)} until the last token"
    yield "output tokens a second", amount(figures.output)
    yield "workers busy", f"{figures.busy:.0%} of the time, {figures.steps} steps"
    yield "prompt tokens in a cache", f"{figures.cached:.1%}"
    yield "preemptions", str(figures.preemptions)
    for limit in limits.each:
        yield "limit", _found(figures, limit)
    if limits.each:
        wanted = "" if limits.joint is None else f", {limits.joint:.0%} wanted"
        yield "requests within all limits", f"{figures.joint:.1%}{wanted}"
        yield "limits", "held" if figures.held else "exceeded"


def _found(figures: Figures, limit: Limit) -> str:
    return f"{limit}: {seconds(figures.values.percentile(limit.metric, limit.percent))}"


def _exceeded(result: Result, limits: Limits) -> Iterator[str]:
    """Each limit that does not hold, and what was found."""
    if (figures := result.best) is None:
        yield f"in none of {len(result.tried)} runs"
        return
    for limit in limits.each:
        if figures.values.percentile(limit.metric, limit.percent) > limit.seconds:
            yield _found(figures, limit)
    if limits.joint is not None and figures.joint < limits.joint:
        yield f"requests within all limits: {figures.joint:.1%}, {limits.joint:.0%} wanted"


def several(console: Console, results: Seq[Result], limits: Limits, *, searched: str) -> None:
    """One line for each configuration; searched: "rate", "replicas" or nothing."""
    for place, result in enumerate(results, 1):
        console.print(Text(f"{place}  {result.name}"))
    console.print()
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column("")
    for title in ("workers", "req/s", *COLUMNS.values(), "cached", "busy"):
        table.add_column(title, justify="right", no_wrap=True)
    for place, result in enumerate(results, 1):
        found = result.best
        if found is None:
            table.add_row(f"{place} *", *["-"] * (len(table.columns) - 1))
            continue
        cells = [str(found.workers), amount(found.rate), *(seconds(found.latencies[key]).replace(" ", "") for key in COLUMNS)]
        mark = " *" if limits.each and not found.held else ""
        table.add_row(f"{place}{mark}", *cells, f"{found.cached:.0%}", f"{found.busy:.0%}")
    console.print(table)
    console.print()
    if limits.each and any(result.best is None or not result.best.held for result in results):
        console.print(Text("* the limits do not hold"))
        for place, result in enumerate(results, 1):
            for line in _exceeded(result, limits):
                console.print(Text(f"{place}  {line}"))
    for line in findings(results, searched):
        console.print(Text(line))


def findings(results: Seq[Result], searched: str) -> list[str]:
    """What another configuration than the first one would give."""
    first = results[0].best
    found = [result for result in results if result.best is not None]
    if searched == "rate" and first is not None and len(found) > 1:
        best = max(found, key=lambda one: _each(one.best))
        ratio = _each(best.best) / _each(first)
        if best is results[0]:
            return [f"the first one serves the most requests a second and worker: {amount(_each(first))}"]
        return [f"{best.name}: {amount(_each(best.best))} requests a second and worker, {ratio:.2f} times those of the first one"]
    if searched == "replicas" and found:
        best = min(found, key=lambda one: one.best.workers if one.best is not None else 0)
        return [f"{best.name or 'the limits'}: {best.best.workers if best.best is not None else 0} workers are enough"]
    return []


def _each(figures: Figures | None) -> float:
    """Requests a second of each worker."""
    return 0.0 if figures is None else figures.rate / figures.workers


def document(results: Seq[Result], settings: Mapping[str, object]) -> dict[str, object]:
    """For a JSON file: the settings, and all runs of each configuration."""
    runs = [
        {"name": one.name, "best": None if one.best is None else one.best.document(), "runs": [run.document() for run in one.tried]}
        for one in results
    ]
    return {"settings": dict(settings), "configurations": runs}
