"""The report of cache policies: tables and findings for people, a JSON document and a figure with curves."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from redraft import registry
from redraft.bench import report
from redraft.bench.cache import (
    F64,
    FULL,
    CacheOptions,
    Footprint,
    Measured,
    PolicyAtBudget,
    Result,
    Scores,
    bootstrap,
)
from redraft.card import NOTHING
from redraft.engine.curves import ENOUGH, Curve, Curves, Interval, Loss
from redraft.engine.policies import SEAMS
from redraft.errors import InvalidInput, Unsupported
from redraft.llm import LLM
from redraft.models.memory import size
from redraft.models.trained import model_hash

WHOLE = "whole cache"
BEYOND = 1.4  # times the full cache's perplexity; larger values are not drawn
DASHED = {"color": "black", "linestyle": "--", "linewidth": 1, "zorder": 5}


def lines_of(result: Result) -> list[tuple[PolicyAtBudget, Scores]]:
    return [(FULL, result.full), *result.runs]


def perplexity(logprob: float) -> float:
    return math.exp(-logprob)


# ---- words


def findings(measured: Measured, options: CacheOptions) -> list[str]:
    """What the results show and, above all, what they do not show."""
    reported = [*neutral(measured.results)]
    if (fewest := min(result.task.items for result in measured.results)) < ENOUGH:
        reported.append(f"{fewest} texts in a task: with fewer than {ENOUGH} the spreads are too narrow to be trusted")
    for result in measured.results:
        reported += _finding(result)
    for policy, reasons in measured.refused.items():
        reported.append(f"refused and left out: {labels((policy, budget) for budget in reasons)}: {next(iter(reasons.values()))}")
    if others := unmeasured(options):
        reported.append(f"not measured: {', '.join(others)}")
    return reported


def _finding(result: Result) -> Iterator[str]:
    name, retrieves = result.task.name, result.retrieves
    if retrieves is not None:
        hits = f"accuracy {result.full.right.mean():.1%}, {result.task.chance:.1%} by chance"
        gap = f"an answer gains {retrieves.mean:+.2f} nats a token because the context states it ({span(retrieves)}); {hits}"
        if retrieves.low <= 0:
            yield f"{name}: shows nothing about retrieval, because even with its {WHOLE} the model does not know the right answer: {gap}"
        else:
            yield f"{name}: with its {WHOLE} the model uses the context: {gap}"
    tight = [(choice, result.difference(scores)) for choice, scores in result.runs if choice.budget != 100]
    hidden = [(choice.policy, choice.budget) for choice, difference in tight if not difference.visible]
    better = [(choice.policy, choice.budget) for choice, difference in tight if difference.low > 0]
    if hidden:
        yield f"{name}: no difference to the {WHOLE} beyond the spread over {result.task.items} texts: {labels(hidden)}"
    if better:
        yield f"{name}: better than the {WHOLE}: {labels(better)}"


def labels(chosen: Iterable[tuple[str, float | None]]) -> str:
    """ "scissorhands at 50, 25 %; int8" """
    budgets: dict[str, list[float]] = {}
    for policy, budget in chosen:
        budgets.setdefault(policy, []).extend([] if budget is None else [budget])
    return "; ".join(f"{policy} at {', '.join(f'{one:g}' for one in some)} %" if some else policy for policy, some in budgets.items())


def neutral(results: Seq[Result]) -> Iterator[str]:
    """The largest change of a text's score under each policy with a budget of 100 %, which should change nothing."""
    gaps: dict[str, float] = {}
    for result in results:
        for choice, scores in result.runs:
            if choice.budget == 100:
                gap = float(np.abs(scores.logprobs - result.full.logprobs).max())
                gaps[choice.policy] = max(gap, gaps.get(choice.policy, 0.0))
    if same := [policy for policy, gap in gaps.items() if not gap]:
        yield f"at 100 % the same scores as the {WHOLE}: {', '.join(same)}"
    if other := [f"{policy} (by {gap:.1e} nats a token at most)" for policy, gap in gaps.items() if gap]:
        yield f"at 100 % other scores than the {WHOLE}: {', '.join(other)}"


def unmeasured(options: CacheOptions) -> list[str]:
    """Methods of these seams that are not among the policies, with what they need, if anything."""
    chosen = {(seam, registry.parse(method)[0]) for policy in options.chosen for seam, method in policy.parts}
    others = [(seam, name) for seam in SEAMS for name in registry.METHODS[seam] if (seam, name) not in chosen]
    needs = [cast(Any, registry.method(seam, name)).card.needs for seam, name in others]
    return [f"{seam}={name}" + (f" (needs: {what})" if what != NOTHING else "") for (seam, name), what in zip(others, needs, strict=True)]


def span(one: Interval) -> str:
    return f"{one.low:+.2f} to {one.high:+.2f}"


# ---- tables


def show(console: Console, llm: LLM, options: CacheOptions, measured: Measured) -> None:
    machine = report.hardware()
    dtype = str(llm.runner.backend.dtype).removeprefix("torch.")
    console.print(Text(f"{llm.name}, {dtype}; {machine['cpu']}{report.beside_pytorch(machine)}", style="bold"))
    parts = [part for result in measured.results for part in _scores(result)]
    if measured.footprints:
        parts.append(_memory(measured.footprints))
    for title, table in parts:
        console.print()
        console.print(Text(title, style="bold"))
        console.print(table)
    reported = Table.grid(padding=(0, 1, 0, 0))
    for line in findings(measured, options):
        reported.add_row("-", line)
    console.print()
    console.print(reported)


def _table(names: Seq[str]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="")
    for i, name in enumerate(names):
        table.add_column(name, justify="right" if i else "left", no_wrap=bool(i), overflow="fold")
    return table


def _scores(result: Result) -> list[tuple[str, Table]]:
    task = result.task
    measure = ["accuracy", "log-prob"] if task.retrieval else ["perplexity"]
    what = "log-probability of the right answer, nats a token" if task.retrieval else "perplexity"
    title = f"{task.name}: {what}; {task.items} texts of up to {task.longest} tokens"
    table, places = _table(["policy", "budget", *measure, "change (95 %)"]), _table(["policy", "budget", *task.places])
    for choice, scores in lines_of(result):
        budget = f"{choice.budget:g} %, {choice.tokens}" if choice.budget else f"{choice.share:.0%} of bytes" if choice.share else ""
        cells = _cells(result, scores)
        table.add_row(choice.policy, budget, *cells[: len(measure)], "" if choice is FULL else _change(result, scores))
        places.add_row(choice.policy, budget.partition(",")[0], *cells[len(measure) :])
    return [(title, table), (f"{task.name}: {measure[-1]} by place", places)]


def _cells(result: Result, scores: Scores) -> list[str]:
    places = scores.logprobs.mean(0)
    if result.task.retrieval:
        return [f"{scores.right.mean():.1%}", f"{places.mean():.2f}", *(f"{place:.2f}" for place in places)]
    return [f"{perplexity(place):.4g}" for place in (places.mean(), *places)]


def _change(result: Result, scores: Scores) -> Text:
    change = result.difference(scores)
    style = "" if not change.visible else "green" if change.low > 0 else "red"
    if result.task.retrieval:
        return Text(f"{change.mean:+.2f} ({span(change)})", style=style)
    mean, low, high = (math.expm1(-one) + 0.0 for one in (change.mean, change.high, change.low))
    return Text(f"{mean:+.1%} ({low:+.1%} to {high:+.1%})", style=style)


def _memory(footprints: Seq[Footprint]) -> tuple[str, Table]:
    whole = footprints[0]
    title = f"cache of one text of {whole.tokens} tokens, and what a written token takes of a processor"
    table = _table(["policy", "budget", "peak", "steady", "of\nwhole", "beside it,\ntokens", "a token,\nms", "times\nas fast"])
    for one in footprints:
        budget = f"{one.choice.budget:g} %" if one.choice.budget else ""
        shares = f"{one.steady / whole.steady:.0%}", str(one.beside), f"{1000 * one.seconds:.1f}", f"{whole.seconds / one.seconds:.2f}"
        table.add_row(one.choice.policy, budget, size(one.peak), size(one.steady), *shares)
    return title, table


# ---- what is kept, and a table for a page of documentation


def kept(llm: LLM, measured: Measured) -> Curves:
    """What later choices of a policy need. A loss is what the whole cache has more."""
    results = measured.results
    points = []
    for choice in policies(results):
        found = {}
        for result, scores in _of(results, choice):
            right = bootstrap((result.full.right - scores.right).mean(1)) if result.task.retrieval else None
            found[result.task.name] = Loss(bootstrap((result.full.logprobs - scores.logprobs).mean(1)), right)
        points.append(Curve(choice.text, choice.budget, *beside_whole(measured, choice), found))
    return Curves(
        model_hash(llm.runner),
        llm.name,
        str(llm.runner.backend.dtype).removeprefix("torch."),
        llm.runner.backend.name,
        max(result.task.longest for result in results),
        min(result.task.items for result in results),
        {result.task.name: float(result.full.right.mean()) for result in results if result.task.retrieval},
        {result.task.name: result.task.chance for result in results if result.task.retrieval},
        tuple(points),
    )


def policies(results: Seq[Result]) -> list[PolicyAtBudget]:
    """Each policy at each budget once. Its options differ from task to task."""
    return [*{(choice.policy, choice.budget): choice for result in results for choice, _ in result.runs}.values()]


def _of(results: Seq[Result], choice: PolicyAtBudget) -> Iterator[tuple[Result, Scores]]:
    for result in results:
        for one, scores in result.runs:
            if (one.policy, one.budget) == (choice.policy, choice.budget):
                yield result, scores


def beside_whole(measured: Measured, choice: PolicyAtBudget) -> tuple[float | None, float | None]:
    """Bytes while a text is written, and tokens a second, over those of the whole cache; None where they were not measured."""
    for one in measured.footprints:
        if (one.choice.policy, one.choice.budget) == (choice.policy, choice.budget):
            whole = measured.footprints[0]
            return one.steady / whole.steady, whole.seconds / one.seconds
    return None, None


def markdown(measured: Measured) -> str:
    """One table, a line for each policy and budget. Running text: the change of perplexity; other tasks: the answers that are right, then
    the nats a token beside the whole cache's, with the interval."""
    tasks = [result.task for result in measured.results]
    lines = [_row("policy", "budget", "bytes", "tokens/s", *(task.name for task in tasks)), "|---" * (4 + len(tasks)) + "|"]
    cells = [_right(result, result.full) or _cells(result, result.full)[0] for result in measured.results]
    whole = [_row(WHOLE, "", "100 %", "1.00", *cells)]
    for choice in policies(measured.results):
        held, speed = beside_whole(measured, choice)
        own = {
            result.task.name: ", ".join(filter(None, (_right(result, scores), _change(result, scores).plain)))
            for result, scores in _of(measured.results, choice)
        }
        budget = "" if choice.budget is None else f"{choice.budget:g} %"
        figures = "-" if held is None else f"{held:.0%}", "-" if speed is None else f"{speed:.2f}"
        whole.append(_row(choice.policy, budget, *figures, *(own.get(task.name, "-") for task in tasks)))
    return "\n".join([*lines, *whole]) + "\n"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _right(result: Result, scores: Scores) -> str:
    return f"{scores.right.mean():.0%}" if result.task.retrieval else ""


# ---- JSON


def document(llm: LLM, options: CacheOptions, measured: Measured, settings: dict[str, Any]) -> dict[str, Any]:
    """The JSON document. `settings`: how the texts were made."""
    return {
        "model": llm.name,
        "dtype": str(llm.runner.backend.dtype).removeprefix("torch."),
        "hardware": report.hardware(),
        "commit": report.commit(),
        "settings": {**settings, "policies": [policy.text for policy in options.chosen], "budgets": list(options.budgets)},
        "tasks": [_task(result) for result in measured.results],
        "memory": [
            {
                **_choice(one.choice),
                "text_tokens": one.tokens,
                "peak_bytes": one.peak,
                "steady_bytes": one.steady,
                "tokens_beside": one.beside,
                "seconds_a_token": one.seconds,
            }
            for one in measured.footprints
        ],
        "markdown": markdown(measured),
        "findings": findings(measured, options),
    }


def _choice(choice: PolicyAtBudget) -> dict[str, Any]:
    return {"policy": choice.policy, "budget": choice.budget, "tokens": choice.tokens, "params": choice.params, "share": choice.share}


def _task(result: Result) -> dict[str, Any]:
    task, retrieves = result.task, result.retrieves
    return {
        "task": task.name,
        "texts": task.items,
        "longest": task.longest,
        "gain_of_context": None if retrieves is None else retrieves._asdict(),
        "chance": task.chance if task.retrieval else None,
        "rows": [
            {
                **_choice(choice),
                "logprob": bootstrap(scores.logprobs.mean(1))._asdict(),
                "perplexity": None if task.retrieval else perplexity(float(scores.logprobs.mean())),
                "accuracy": bootstrap(scores.right.mean(1))._asdict() if task.retrieval else None,
                "difference": result.difference(scores)._asdict(),
                "places": {
                    place: {"logprob": float(scores.logprobs[:, i].mean()), "accuracy": float(scores.right[:, i].mean())}
                    for i, place in enumerate(task.places)
                },
            }
            for choice, scores in lines_of(result)
        ],
    }


# ---- figure


def check_plot(path: Path) -> None:
    """Raises InvalidInput or Unsupported if `plot` could not write its file."""
    if importlib.util.find_spec("matplotlib") is None:
        raise Unsupported("plot needs matplotlib: pip install 'redraft[plot]'")
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise InvalidInput(f"plot = {path}: a name that ends in .png, .svg or .pdf is needed")
    if not path.parent.is_dir():
        raise InvalidInput(f"plot = {path}: there is no folder {path.parent}")


def plot(path: Path, title: str, measured: Measured) -> None:
    """A row of panels for each task: its measure by budget; accuracy, or the last quarter of running text, by budget; the measure by
    turn, depth or quarter at one budget. The last row shows cache bytes."""
    from matplotlib.figure import Figure

    results, rows = measured.results, len(measured.results) + bool(measured.footprints)
    names = [choice.policy for result in results for choice, _ in result.runs] + [one.choice.policy for one in measured.footprints[1:]]
    styles = {name: {"color": f"C{i % 10}", "marker": "osD^vPX*<>"[i % 10]} for i, name in enumerate(dict.fromkeys(names))}
    figure = Figure(figsize=(15, 3.4 * rows + 1), layout="constrained")
    axes = figure.subplots(rows, 3, squeeze=False)
    for row, result in zip(axes, results):
        last = len(result.task.places) - 1
        _by_budget(row[0], result, _Measure(result), styles)
        _by_budget(row[1], result, _Measure(result, accuracy=True) if result.task.retrieval else _Measure(result, place=last), styles)
        _by_place(row[2], result, styles)
    if measured.footprints:
        _bytes(axes[-1][0], measured.footprints, styles)
        for axis in axes[-1][1:]:
            axis.axis("off")
    known = {label: line for axis in axes.flat for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(known.values(), known.keys(), loc="outside upper center", ncols=6, frameon=False, title=title)
    figure.savefig(path, dpi=110)


@dataclass(frozen=True)
class _Measure:
    """What a panel shows of a result: accuracy, perplexity or log-probability, at one place or over all."""

    result: Result
    accuracy: bool = False
    place: int | None = None

    @property
    def name(self) -> str:
        if self.accuracy:
            return "accuracy"
        if self.result.task.retrieval:
            return "log-probability of the answer"
        return "perplexity" if self.place is None else f"perplexity, {self.result.task.places[self.place]}"

    def values(self, scores: Scores) -> F64:
        """f64[items]"""
        every = scores.right if self.accuracy else scores.logprobs
        return every.mean(1) if self.place is None else every[:, self.place]

    def shown(self, mean: float) -> float:
        return mean if self.accuracy or self.result.task.retrieval else perplexity(mean)

    def bar(self, scores: Scores) -> list[float]:
        """The mean and the ends of its bar. The bar is the full cache's mean plus the spread of the difference."""
        whole, own = self.values(self.result.full), self.values(scores)
        change = bootstrap(own - whole)
        return [self.shown(float(own.mean())), *sorted(self.shown(float(whole.mean()) + end) for end in (change.low, change.high))]


def _by_budget(axis: Any, result: Result, measure: _Measure, styles: dict[str, Any]) -> None:
    """A curve over budgets for each policy. A codec is a point at its share of the bytes."""
    curves: dict[str, list[list[float]]] = {}
    for choice, scores in result.runs:
        curves.setdefault(choice.policy, []).append([choice.budget or 100 * (choice.share or 1), *measure.bar(scores)])
    for policy, points in curves.items():
        x, y, low, high = np.array(sorted(points)).T
        ends = np.maximum(0, (y - low, high - y))  # by rounding, a mean may lie slightly outside its interval
        axis.errorbar(x, y, ends, label=policy, capsize=2, linewidth=1.4, markersize=5, **styles[policy])
    whole = measure.shown(float(measure.values(result.full).mean()))
    axis.axhline(whole, label=WHOLE, **DASHED)
    ticks = sorted({choice.budget for choice, _ in result.runs if choice.budget} | {100.0})
    axis.set_xscale("log")
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel("budget, % of the text (codecs: % of the bytes)")
    if measure.accuracy:
        axis.set_ylim(-0.01, max(0.1, axis.get_ylim()[1]))
    elif not result.task.retrieval:
        _cut(axis, whole)
    _finish(axis, result.task.name, measure.name)


def _by_place(axis: Any, result: Result, styles: dict[str, Any]) -> None:
    """A curve over turns, depths or quarters for each policy, at the middle budget below 100 %. It shows differences from the full
    cache, because places differ by more than policies do."""
    budgets = sorted({choice.budget for choice, _ in result.runs if choice.budget is not None and choice.budget < 100})
    middle = budgets[len(budgets) // 2] if budgets else None
    for choice, scores in lines_of(result):
        if choice.budget in (None, middle):
            change = (scores.logprobs - result.full.logprobs).mean(0)
            style = DASHED if choice is FULL else styles[choice.policy]
            y = change if result.task.retrieval else np.exp(-change)
            axis.plot(result.task.places, y, **{"linewidth": 1.4, "markersize": 5, **style})
    if middle is not None:
        axis.set_xlabel(f"budget {middle:g} %")
    if not result.task.retrieval:
        _cut(axis, 1)
    measure = "log-probability less the whole cache's" if result.task.retrieval else "perplexity over the whole cache's"
    _finish(axis, result.task.name, measure)


def _cut(axis: Any, whole: float) -> None:
    """Limits the panel, so that the other curves stay distinguishable if one policy ruins the text."""
    axis.set_ylim(top=min(axis.get_ylim()[1], BEYOND * whole))


def _finish(axis: Any, title: str, measure: str) -> None:
    axis.set_title(title, fontsize=10)
    axis.set_ylabel(measure)
    axis.grid(alpha=0.3)


def _bytes(axis: Any, footprints: Seq[Footprint], styles: dict[str, Any]) -> None:
    whole = footprints[0]
    for i, one in enumerate(footprints):
        color = styles[one.choice.policy]["color"] if i else "black"
        axis.barh(i - 0.2, one.peak / whole.peak * 100, 0.38, color=color)
        axis.barh(i + 0.2, one.steady / whole.steady * 100, 0.38, color=color, alpha=0.45)
    axis.set_yticks(range(len(footprints)), [WHOLE, *(one.choice.label for one in footprints[1:])], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("% of the whole cache's bytes: peak (full), steady (pale)")
    axis.set_title(f"cache of a text of {whole.tokens} tokens", fontsize=10)
    axis.grid(alpha=0.3, axis="x")
