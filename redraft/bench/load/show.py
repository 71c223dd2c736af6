"""The report of a load test: progress, a table, a JSON document with vLLM's keys, a page with plots."""

from __future__ import annotations

import base64
import html
import importlib.util
import io
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from redraft.bench import files
from redraft.bench.load.client import Target
from redraft.bench.load.drive import Found, Tick
from redraft.bench.load.figures import METRICS, Record, Run, in_flight, latencies, throughput
from redraft.bench.load.workload import Load
from redraft.errors import Unsupported

EVERY = 10.0  # seconds between lines of progress where no terminal shows a bar
BINS = 60  # of a plot over time
DPI = 110


def document(target: Target, load: Load, found: Found, figures: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON document: vLLM's keys first, as far as they apply. It does not contain the API key."""
    rate: float | str | None = None if load.trace is not None else load.requests_a_second
    return {
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": "openai-chat" if target.endpoint == "chat" else "openai",
        "backend": "openai-chat" if target.endpoint == "chat" else "openai",
        "model_id": found.model,
        "tokenizer_id": None,
        "num_prompts": len(found.run.records),
        "request_rate": "inf" if rate == math.inf else rate,
        "burstiness": None if rate is None else 1.0,
        "max_concurrency": load.concurrency,
        **figures,
        "base_url": target.root,
        "workload": _workload(load, found),
        "arrivals": _arrivals(load),
        "input_lengths": None if found.words is None else "tokens" if found.words.exact else "words",
        "seed": load.seed,
        "temperature": target.temperature,
        "ignore_eos": target.ignore_eos,
        "extra": target.extra,
        "warmups": load.warmups,
    }


def _arrivals(load: Load) -> str:
    bound = "" if load.concurrency is None else f", at most {load.concurrency} in flight"
    if load.trace is not None:
        return f"as in {load.trace.name}{'' if load.scale == 1 else f', {load.scale:g} times as fast'}{bound}"
    if load.closed:
        return f"{load.concurrency} in flight, a new one when one has ended"
    return f"all at once{bound}" if load.requests_a_second == math.inf else f"Poisson, {load.requests_a_second:g} a second{bound}"


def _workload(load: Load, found: Found) -> str:
    if load.prompts is not None:
        return f"prompts of {load.prompts.name}"
    what = "random words"
    if load.trace is not None:
        what += f", lengths of {load.trace.name}"
    else:
        record = found.run.records[0] if found.run.records else None
        what += f", {record.wanted_input} tokens" if record is not None else ""
    return what + (f", of them {load.shared} shared in {load.groups or 1} group{'s' * ((load.groups or 1) > 1)}" if load.shared else "")


# ---- progress


@contextmanager
def progress(console: Console, total: int) -> Iterator[Tick]:
    """A progress bar that disappears at the end. Without a terminal, a line every few seconds."""
    begun, reported, done, failed, tokens = time.monotonic(), time.monotonic(), 0, 0, 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("sending", total=total)

        def tick(record: Record) -> None:
            nonlocal reported, done, failed, tokens
            now = time.monotonic()
            done, failed, tokens = done + 1, failed + (record.failure is not None), tokens + record.output_tokens
            what = f"{tokens / max(now - begun, 1e-9):.0f} tokens/s{f', {failed} failed' if failed else ''}"
            bar.update(task, advance=1, description=what)
            if not console.is_terminal and now - reported >= EVERY:
                reported = now
                console.print(f"{done} of {total}, {what}", highlight=False)

        yield tick


# ---- the table


def show(console: Console, target: Target, load: Load, found: Found, figures: Mapping[str, Any]) -> None:
    head = f"{found.model} at {target.root}, {target.endpoint}\n{_workload(load, found)}; {_arrivals(load)}"
    console.print(Text(head, style="bold"))
    console.print()
    console.print(_lines(figures))
    console.print()
    console.print(_latencies(figures))
    remarks = Table.grid(padding=(0, 1, 0, 0))
    for note in notes(found, figures):
        remarks.add_row("-", Text(note))
    console.print()
    console.print(remarks)


def facts(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("requests", f"{figures['completed']} completed, {figures['failed']} failed" + _unfinished(figures)),
        ("duration", f"{figures['duration']:.2f} s"),
        ("tokens", f"{figures['total_input_tokens']} read, {figures['total_output_tokens']} written"),
        ("requests/s", f"{figures['request_throughput']:.2f}"),
        ("output tokens/s", f"{figures['output_throughput']:.1f}, at most {figures['max_output_tokens_per_s']:.0f} in a second"),
        ("tokens/s with input", f"{figures['total_token_throughput']:.1f}"),
        ("in flight", f"at most {figures['max_concurrent_requests']}"),
    ]
    if figures["request_goodput"] is not None:
        limits = ", ".join(f"{name} {limit:g} ms" for name, limit in figures["goodput_limits_ms"].items())
        rows.append(("goodput", f"{figures['request_goodput']:.2f} requests/s; {figures['good']} kept {limits}"))
    if figures["mean_tokens_per_chunk"] is not None:
        rows.append(("tokens per chunk", f"{figures['mean_tokens_per_chunk']:.2f}"))
    if figures["max_lag_ms"] is not None:
        rows.append(("sent late by", f"p99 {figures['p99_lag_ms']:.1f} ms, at most {figures['max_lag_ms']:.1f} ms"))
    if own := figures.get("redraft"):
        length = own.get("mean_acceptance_length")
        rows.append(("drafted, accepted", f"{own['drafted']}, {own['accepted']}" + (f"; acceptance length {length:.2f}" if length else "")))
    return rows


def _unfinished(figures: Mapping[str, Any]) -> str:
    return f", {figures['unfinished']} not finished when interrupted" if figures["interrupted"] else ""


def _lines(figures: Mapping[str, Any]) -> Table:
    table = Table.grid(padding=(0, 3, 0, 0))
    for name, value in facts(figures):
        table.add_row(name, Text(value))
    return table


def rows(figures: Mapping[str, Any]) -> list[list[str]]:
    """The name of each metric, then mean, median, p99 and standard deviation in ms."""
    cells = []
    for name, words in METRICS.items():
        values = [figures[f"{which}_{name}_ms"] for which in ("mean", "median", "p99", "std")]
        cells.append([f"{words} ({name})", *("-" if value is None else f"{value:.2f}" for value in values)])
    return cells


def _latencies(figures: Mapping[str, Any]) -> Table:
    table = Table(box=None, padding=(0, 3, 0, 0), pad_edge=False, header_style="")
    for i, name in enumerate(("ms", "mean", "median", "p99", "std")):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    for row in rows(figures):
        table.add_row(*row)
    return table


def notes(found: Found, figures: Mapping[str, Any]) -> list[str]:
    """Notes below the table."""
    lines = []
    for kind, count in figures["failures"].items():
        first = next(record.failure[1] for record in found.run.records if record.failure is not None and record.failure[0] == kind)
        lines.append(f"failed, {count} times {kind}: {first}")
    if found.warmups:
        kind, words = found.warmups[0].failure or ("", "")
        lines.append(f"{len(found.warmups)} of the warm-ups failed: {kind}: {words}")
    if found.words is not None and found.run.done:
        lines.append(_lengths(found.words.exact, found.run, figures))
    if (per := figures["mean_tokens_per_chunk"] or 1) > 1.05:
        lines.append(f"an inter-token latency is the time between two chunks, here of {per:.2f} tokens on average; tpot is by tokens")
    for source, count in figures["output_tokens_from"].items():
        if source != "usage":
            how = "counted by its /tokenize" if source == "tokenize" else "assumed to be one for each chunk, which may be too few"
            lines.append(f"the server sent no usage in {count} streams: their output tokens are {how}")
    if (lag := figures["p99_lag_ms"]) is not None and lag > 100:
        lines.append("latencies count from the moment of sending; this client sent late, because it lacked a slot or time")
    return lines


def _lengths(exact: bool, run: Run, figures: Mapping[str, Any]) -> str:
    how = "exact, by the server's /tokenize" if exact else "in words, as the server has no /tokenize that finds words of one token each"
    right, done = figures["input_tokens_as_wanted"], len(run.done)
    if right == done:
        return f"input lengths: {how}; the server counted the same"
    ratio = figures["total_input_tokens"] / sum(record.wanted_input or 0 for record in run.done)
    return f"input lengths: {how}; the server counted {ratio:.2f} times as many tokens, and just as many in {right or 0} of {done} prompts"


# ---- the page


def check_html(path: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise Unsupported("html needs matplotlib: pip install 'redraft[plot]'")
    files.check_writable(path, "html")


STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; background: #fff; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.35rem; margin: 0 } h2 { font-size: 1.05rem; margin: 2rem 0 .5rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .15rem 1.2rem .15rem 0; text-align: left; font-weight: normal }
table.numbers td + td, table.numbers th + th { text-align: right } th { color: #666; border-bottom: 1px solid #ccc }
img { width: 100%; height: auto } p, li { color: #444 }
"""


def page(target: Target, load: Load, found: Found, figures: Mapping[str, Any]) -> str:
    """One self-contained HTML file: tables, and plots as embedded pictures."""
    title, server = f"{found.model} under load", f"{target.root}, {target.endpoint}, {datetime.now():%d %B %Y %H:%M}"
    parts = [
        f"<!doctype html>\n<html lang=en><meta charset=utf-8><title>{_text(title)}</title><style>{STYLE}</style>",
        f"<h1>{_text(title)}</h1>",
        f"<p>{_text(server)}<br>{_text(_workload(load, found))}; {_text(_arrivals(load))}</p>",
        _html([], facts(figures), "facts"),
        "<h2>Latencies in ms</h2>",
        _html([("", "mean", "median", "p99", "std")], rows(figures), "numbers"),
        "<ul>" + "".join(f"<li>{_text(note)}" for note in notes(found, figures)) + "</ul>",
    ]
    for title, draw in PLOTS.items() if found.run.done else ():
        picture = base64.b64encode(_picture(draw, found.run, figures)).decode()
        parts.append(f'<h2>{title}</h2>\n<img alt="{title}" src="data:image/png;base64,{picture}">')
    return "\n".join(parts) + "\n"


def _text(text: str) -> str:
    return html.escape(text)


def _html(heads: Any, lines: Any, kind: str) -> str:
    cells = ["".join(f"<th>{_text(cell)}" for cell in head) for head in heads]
    cells += ["".join(f"<td>{_text(cell)}" for cell in line) for line in lines]
    return f'<table class="{kind}">' + "".join(f"<tr>{cell}" for cell in cells) + "</table>"


def _picture(draw: Any, run: Run, figures: Mapping[str, Any]) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained", dpi=DPI)
    draw(figure, run, figures)
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def _distributions(figure: Any, run: Run, figures: Mapping[str, Any]) -> None:
    """The share of values up to each latency; goodput's limits are dashed."""
    figure.set_size_inches(10, 6)
    for axis, (name, values) in zip(figure.subplots(2, 2).flat, latencies(run.done).items()):
        axis.set_title(f"{METRICS[name]} ({name})", fontsize=10)
        axis.grid(alpha=0.3)
        if not values:
            axis.text(0.5, 0.5, "no values", ha="center", transform=axis.transAxes)
            continue
        median, high = (float(np.percentile(values, percent)) for percent in (50, 99))
        axis.ecdf(values, linewidth=1.6)
        axis.plot([median, high], [0.5, 0.99], "o", color="C0", markersize=4)
        axis.set_xlabel(f"ms; median {median:.4g}, p99 {high:.4g}")
        if name in figures["goodput_limits_ms"]:
            axis.axvline(figures["goodput_limits_ms"][name], color="C3", linestyle="--", linewidth=1)
        axis.set_ylim(0, 1.02)
        if min(values) > 0 and max(values) > 50 * median:
            axis.set_xscale("log")
        else:
            axis.set_xlim(left=0)


def _over_time(figure: Any, run: Run, figures: Mapping[str, Any]) -> None:
    figure.set_size_inches(10, 5)
    above, below = figure.subplots(2, 1, sharex=True)
    width = max(run.duration / BINS, 1e-9)
    tokens = throughput(run.done, width) / width
    above.stairs(tokens, np.arange(len(tokens) + 1) * width, fill=True, alpha=0.35)
    above.axhline(figures["output_throughput"], color="C0", linewidth=1, linestyle="--")
    above.set_ylabel("output tokens/s")
    times, counts = in_flight(run.done)
    below.step(times, counts, where="post", color="C1")
    below.set_ylabel("requests in flight")
    below.set_xlabel("seconds from the start")
    for axis in (above, below):
        axis.grid(alpha=0.3)
        axis.set_ylim(bottom=0)


def _by_arrival(figure: Any, run: Run, figures: Mapping[str, Any]) -> None:
    figure.set_size_inches(10, 3.6)
    axis = figure.subplots()
    axis.plot([record.begun for record in run.done], [record.ttft * 1000 for record in run.done], ".", alpha=0.6)
    if failed := [record.begun for record in run.records if record.failure is not None]:
        axis.plot(failed, [0.0] * len(failed), "x", color="C3", label="failed", clip_on=False)
        axis.legend()
    if "ttft" in figures["goodput_limits_ms"]:
        axis.axhline(figures["goodput_limits_ms"]["ttft"], color="C3", linestyle="--", linewidth=1)
    axis.set_xlabel("sent, seconds from the start")
    axis.set_ylabel("time to first token, ms")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)


PLOTS = {"Shares of latencies": _distributions, "Over time": _over_time, "Time to first token by arrival": _by_arrival}
