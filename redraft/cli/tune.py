"""`redraft tune`: which drafter and how many rows are fastest for these prompts on this machine, and why."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from redraft.cli.compare import complete
from redraft.cli.options import ENGINE, SAMPLING, SHARING, Given, Model, engine_config, measured, takes


@takes(
    sampling=SAMPLING.without("n", "temperature", "max_tokens", "seed"),
    engine=ENGINE.without("draft", "draft_rows", *SHARING),
)
def tune(
    model: Model = "embedded",
    prompts: Annotated[Path | None, typer.Option(help="JSON lines with prompt, messages or turns; else our own suite.")] = None,
    batch: Annotated[int, typer.Option(help="Prompts that run at once, all of one category.")] = 1,
    draft: Annotated[
        list[str] | None, typer.Option(help="A candidate, name:option=value,...; repeat for more; else auto and all without training.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="New tokens a prompt and turn.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="The prompts' own seeds are made from it.")] = 0,
    rounds: Annotated[int, typer.Option(help="How often the best candidates are measured, 2 or more.")] = 3,
    best: Annotated[int, typer.Option(help="Pairs of drafter and rows that are measured, auto beside them.")] = 4,
    limit: Annotated[int | None, typer.Option(help="At most this many prompts, evenly from all categories.")] = None,
    category: Annotated[list[str] | None, typer.Option(help="Only this category, repeated for more.")] = None,
    yaml: Annotated[Path | None, typer.Option(help="Write the settings to this file, for --config; else to stdout.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write one page with plots to this file.")] = None,
    *,
    sampling: Given,
    engine: Given,
) -> None:
    """Find the fastest drafter and number of draft rows for your prompts, and say why.

    Measured are the time of a step by its rows, how many drafts each drafter gets accepted, and then the speed of the best
    candidates by these figures, interleaved with the plain loop. If none beats it in every round, the settings say draft: none.
    With --lora, given once, all prompts have this adapter.

    The table goes to stdout and the settings to --yaml; without --yaml the settings go to stdout and the table to stderr.
    """
    from rich.console import Console

    from redraft.bench import files, report
    from redraft.bench import prompts as suite
    from redraft.bench import tune as bench
    from redraft.bench.advice import Advice
    from redraft.bench.compare import BASELINE
    from redraft.bench.estimate import duration
    from redraft.columns import fold, width
    from redraft.config import SamplingParams
    from redraft.engine.interrupt import InterruptBetween
    from redraft.llm import LLM

    # With prefix sharing the second candidate would not read the prompt.
    config = engine_config(model, {"max_seqs": max(64, batch), **engine, "draft": BASELINE, "prefix_sharing": False})
    params = SamplingParams(**{**measured(sampling, config), "max_tokens": max_tokens, "temperature": temperature, "seed": seed})
    options = bench.TuneOptions(tuple(draft or training_free()), params, rounds, batch, lenient=not draft, best=best)
    chosen = suite.load(prompts, category or None, limit)
    for name, path in (("yaml", yaml), ("html", html)):
        if path is not None:
            files.check_writable(path, name)
    progress = Console(stderr=True)

    def say(text: str) -> None:
        for line in fold(text, width()):
            progress.print(line, markup=False, highlight=False, soft_wrap=True)

    def announce(seconds: float) -> None:
        say(f"estimated duration: about {duration(seconds)}, from one pass of the plain loop; longer if drafters are slower")

    if warning := report.busy():
        say(warning)
    with report.bar(progress, bench.ticks(len(chosen), options)) as tick:
        tuned = bench.tune(LLM(config=config), options, chosen, tick, announce)
    with InterruptBetween():  # a second Ctrl-C must not lose the results
        advice = Advice(tuned, options, model, engine)
        for line in advice.text():
            typer.echo(line, err=yaml is None)
        if yaml is None:
            typer.echo("", err=True)
            typer.echo(advice.yaml(), nl=False)
        else:
            files.write_text(yaml, advice.yaml())
            say(f"written to {yaml}, for redraft serve --config {yaml}")
        if html is not None:
            files.write_text(html, advice.page())
            say(f"written to {html}")
    if tuned.comparison.stopped:
        say("stopped: the table holds what was measured before")
        raise typer.Exit(130)


def training_free() -> list[str]:
    """Auto, and the drafters that need neither a draft model nor options."""
    from redraft import registry
    from redraft.bench.compare import BASELINE

    known = [name for name in registry.METHODS["draft"] if name not in (BASELINE, "auto") and complete(name)]
    return ["auto", *(name for name in known if "model" not in registry.create("draft", name).card.needs)]
