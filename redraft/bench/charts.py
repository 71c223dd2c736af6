"""The page of a comparison: speeds, acceptance by depth, and the cost of a step, each as a plot and a table."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from itertools import groupby

from redraft.bench.compare import CompareOptions, Comparison
from redraft.bench.page import Section, whole
from redraft.bench.report import heading, legend, notes
from redraft.bench.results import Row, Speed
from redraft.bench.svg import Dot, Point, dots, lines, spread
from redraft.core.cost import KNOTS, CostModel
from redraft.llm import LLM

ALL = "all prompts"
DEEPEST = 16  # depths that are shown
ROWS = [rows for rows in KNOTS if rows <= 32]  # of a step


def page(comparison: Comparison, options: CompareOptions, rows: list[Row]) -> str:
    llms = {entry.method: entry.llm for entry in comparison.entries}
    sections = [*speeds(rows), *beside(rows), acceptance({name(row): row.acceptance_by_depth for row in rows if row.category is None})]
    title = f"Drafters compared: {comparison.entries[0].llm.name}"
    return whole(
        title, heading(comparison, options), [*sections, modelled(llms)], [*legend(options, rows), *notes(comparison, options, rows)]
    )


def name(row: Row) -> str:
    return row.method if row.mode in ("baseline", "cold=hot") else f"{row.method}, {row.mode}"


def speeds(rows: Seq[Row]) -> list[Section]:
    """Tokens a second by method and category: prompts included, and of generation alone if some text has a second token."""
    text = (
        "Dots are the median of the rounds, lines go from the slowest round to the fastest. Dashed: the plain loop. At least: the "
        "one-sided 95 % bound of the ratio."
    )
    found = [_speeds("Tokens a second", text, [(row, row) for row in rows])]
    if alone := [(row, row.generation) for row in rows if row.generation is not None]:
        found.append(_speeds("Generation alone", f"Tokens after the first by the time after it. {text}", alone))
    return found


def _speeds(title: str, text: str, measured: Seq[tuple[Row, Row | Speed]]) -> Section:
    groups = {
        category or ALL: [Dot(name(row), s.tokens_per_second, s.tokens_per_second_low, s.tokens_per_second_high) for row, s in part]
        for category, part in groupby(measured, key=lambda pair: pair[0].category)
    }
    cells = []
    for row, speed in measured:
        tokens = f"{speed.tokens_per_second:.1f}", f"{speed.tokens_per_second_low:.1f}-{speed.tokens_per_second_high:.1f}"
        claimed = speed.speedup is not None and speed.speedup_low is not None and speed.speedup_high is not None
        ratio = (f"{speed.speedup:.2f}x", f"{speed.speedup_low:.2f}-{speed.speedup_high:.2f}") if claimed else ("", "")
        least = "" if speed.speedup_bound is None else f"{speed.speedup_bound:.2f}x"
        cells.append([row.category or ALL, name(row), *tokens, *ratio, least, f"{row.mean_acceptance_length:.2f}"])
    head = ["category", "method", "tokens/s", "min-max", "speed-up", "min-max", "at least", "tokens a step"]
    return Section(title, text, dots(groups, "tokens/s"), head, cells)


def beside(rows: Seq[Row]) -> list[Section]:
    """The method that chooses beside the fastest of the others."""
    cells = []
    for row in rows:
        for what, one in row.besides:
            figures = f"{one.ratio:.2f}", f"{one.low:.2f}-{one.high:.2f}", "" if one.bound is None else f"{one.bound:.2f}"
            cells.append([row.category or ALL, name(row), what, one.method, *figures])
    head = ["category", "method", "time", "fastest other", "ratio", "min-max", "at least"]
    return [Section("Beside the fastest other method", "Of the same category and state.", "", head, cells)] if cells else []


def acceptance(shares: Mapping[str, Seq[float]]) -> Section:
    """shares: of passes that kept i + 1 drafts or more, for each name. Names that kept none have no line."""
    drawn = {one: values[:DEEPEST] for one, values in shares.items() if values}
    depths = range(1, max(map(len, drawn.values()), default=0) + 1)
    series = {one: [Point(depth, *[value] * 3) for depth, value in enumerate(values, 1)] for one, values in drawn.items()}
    cells = [[one, *(f"{values[depth - 1]:.1%}" if depth <= len(values) else "0" for depth in depths)] for one, values in drawn.items()]
    plot = lines(series, "depth", "passes that kept so many drafts or more", percent=True) if series else ""
    text = "The share of forward passes that kept at least so many drafted tokens." if series else "No draft was kept."
    return Section("Acceptance by depth", text, plot, ["method", *map(str, depths)], cells)


def modelled(llms: Mapping[str, LLM]) -> Section:
    """The cost of a step as the cost models of these drafters know it."""
    models = {method: model for method, llm in llms.items() if (model := cost_model(llm)) is not None}
    known = {method: [(rows, model.seconds(rows)) for rows in ROWS] for method, model in models.items()}
    series = {
        f"{method}{'' if models[method].calibrated else ', not measured yet'}": [Point(rows, *[1000 * t] * 3) for rows, t in times if t]
        for method, times in known.items()
    }
    return cost(
        {one: points for one, points in series.items() if points}, "A step without cache, as the cost model of the drafter knows it."
    )


def cost(series: Mapping[str, Seq[Point]], text: str) -> Section:
    """series: ms of a step by rows, the first of which is one row."""
    cells = [
        [one, f"{point.x:g}", spread(point.y, point.low, point.high), f"{point.y / points[0].y:.2f}", f"{point.y / point.x:.2f}"]
        for one, points in series.items()
        for point in points
    ]
    if not series:
        return Section("Cost of a step", "None of these drafters has a cost model; auto has one.")
    head = ["", "rows", "ms", "in the time of one row", "ms a row"]
    return Section("Cost of a step", text, lines(series, "rows", "ms"), head, cells)


def cost_model(llm: LLM) -> CostModel | None:
    found = getattr(llm.engine.drafter.own.drafter, "cost", None)
    return found if isinstance(found, CostModel) else None
