"""`redraft bench`: measurements that are no comparison of drafters, one verb each."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from redraft.cli.options import ENGINE, Given, Model, engine_config, takes

WIDTH = 140  # columns of the tables where it is no terminal that reads them

bench = typer.Typer(name="bench", no_args_is_help=True, help="Measure what a policy costs and what it saves.")


@bench.callback()
def _bench() -> None:  # with a callback typer keeps the verb's name even while there is one verb only
    pass


@bench.command("cache")
@takes(engine=ENGINE.without("draft", "draft_model", "verify", "draft_rows", "draft_total", "prefix_sharing"))
def cache(
    model: Model = "embedded",
    texts: Annotated[list[Path] | None, typer.Option(help="A .txt or .gz file, repeated for more; a folder is a source.")] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(help="seam=name:option=value,..., + between several; {tokens}, {recent}, {paged}, {speedup}: a budget's; else all."),
    ] = None,
    budget: Annotated[list[float] | None, typer.Option(help="Percent of a text, repeated for more; else 100, 50, 25, 10.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of a text; else what the context holds.")] = None,
    limit: Annotated[int, typer.Option(help="Texts of each task, 2 or more.")] = 16,
    turns: Annotated[int, typer.Option(help="Questions about one context, 1 to 5.")] = 5,
    given: Annotated[int, typer.Option(help="Tokens at the start of running text that are not scored.")] = 64,
    batch: Annotated[int, typer.Option(help="Texts scored at once.")] = 8,
    memory: Annotated[int, typer.Option(help="Tokens that each policy generates to measure its cache, 0 for none.")] = 4000,
    seed: Annotated[int, typer.Option(help="Needles, keys and values are drawn from it.")] = 0,
    json: Annotated[Path | None, typer.Option(help="Write all figures to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the curves to this .png, .svg or .pdf; needs matplotlib.")] = None,
    *,
    engine: Given,
) -> None:
    """Measure cache policies against the whole cache: perplexity, needles, key-value retrieval by turn, and bytes.

    Tables go to stdout, the progress bar to stderr. The last lines say where no effect can be seen.
    """
    from rich.console import Console

    from redraft.bench import cache as measurement
    from redraft.bench import curves, report, tasks
    from redraft.llm import LLM

    options = measurement.Options(tuple(policy or ()), tuple(budget or measurement.BUDGETS), batch, memory)
    texts = texts or []
    found = tasks.sources(texts)
    wanted = tasks.Wanted(length, limit, turns, given, seed)
    if json is not None:
        report.check_writable(json)
    if plot is not None:
        curves.check_plot(plot)
    llm = LLM(config=engine_config(model, {**engine, "draft": "none", "prefix_sharing": False}))
    every = tasks.build(llm.tokenizer, found, wanted, llm.max_model_len - 1)
    plan = measurement.Plan.of(llm, options, every)
    progress = Console(stderr=True)
    with report.bar(progress, plan.ticks) as tick:
        measured = measurement.measure(llm, plan, tick)
    curves.show(Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else WIDTH), llm, options, measured)
    if json is not None:
        settings = {"texts": [str(path) for path in texts] or "the standard library", "limit": limit, "turns": turns, "seed": seed}
        report.write(json, curves.document(llm, options, measured, settings))
        progress.print(f"written to {json}")
    if plot is not None:
        curves.plot(plot, f"{llm.name}: cache policies", measured)
        progress.print(f"drawn to {plot}")
