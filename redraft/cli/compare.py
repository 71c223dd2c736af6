"""`redraft compare`: the plain loop and drafting methods, and with --against other engines, on the same prompts, side by side."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from redraft.cli.options import ENGINE, SAMPLING, SHARING, STRUCTURE, Given, Model, engine_config, measured, names, structured, takes


@takes(
    sampling=SAMPLING.without("n", "temperature", "max_tokens", "seed"),
    structure=STRUCTURE,
    engine=ENGINE.without("draft", *SHARING),
)
def compare(
    model: Model = "embedded",
    prompts: Annotated[Path | None, typer.Option(help="JSON lines with prompt, messages or turns; else our own suite.")] = None,
    draft: Annotated[
        list[str] | None, typer.Option(help="name:option=value,... of a drafter, or auto; repeat for more; else all, or auto with against.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="New tokens a prompt and turn.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="The prompts' own seeds are made from it.")] = 0,
    batch: Annotated[int, typer.Option(help="Prompts that run at once, all of one category.")] = 1,
    rounds: Annotated[int, typer.Option(help="How often everything is measured.")] = 3,
    limit: Annotated[int | None, typer.Option(help="At most this many prompts, evenly from all categories.")] = None,
    category: Annotated[list[str] | None, typer.Option(help="Only this category, repeated for more.")] = None,
    turns: Annotated[int | None, typer.Option(help="At most this many turns of each prompt.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Raw texts are what a user says, by the chat template.")] = False,
    warm: Annotated[Path | None, typer.Option(help="Drafters learn from its other prompts before, in place of the other half.")] = None,
    warm_limit: Annotated[int | None, typer.Option(help="At most this many of them, evenly from all categories.")] = None,
    bound: Annotated[bool, typer.Option("--bound", help="Also measure the share of the best possible acceptance.")] = False,
    against: Annotated[
        str | None, typer.Option(help="Other engines with their own speculation: transformers, llama.cpp, openvino, with commas.")
    ] = None,
    assistant: Annotated[str | None, typer.Option(help="With against: folder of the draft model of these engines.")] = None,
    gguf: Annotated[Path | None, typer.Option(help="With against: llama.cpp reads this file, else one made from MODEL.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write all figures to this file.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write one page with plots to this file.")] = None,
    *,
    sampling: Given,
    structure: Given,
    engine: Given,
) -> None:
    """Measure drafters against the plain loop, on the same prompts and in the same process.

    Runs are interleaved and repeated. The table has tokens a second, the speed-up with its spread, tokens a step, whether
    the text is the plain loop's, and how repetitive it is. The second table has the same without the reading of prompts,
    and the lower bounds of the speed-ups; the third, auto beside the fastest other method. Tables go to stdout; the estimated
    duration and the progress go to stderr. After Ctrl-C the tables and the file hold what was measured. With --lora, given
    once, all prompts have this adapter.

    With --against every engine has its own process and they take turns. All get the same weights, ids, threads and lengths.
    The table has tokens a second of each engine and mode, Redraft's best beside it, and how many texts are Redraft's.
    """
    from rich.console import Console

    from redraft import registry
    from redraft.bench import against as engines
    from redraft.bench import charts, files, report, results
    from redraft.bench import compare as bench
    from redraft.bench import prompts as suite
    from redraft.bench.estimate import duration
    from redraft.columns import fold, width
    from redraft.config import SamplingParams
    from redraft.engine.interrupt import InterruptBetween
    from redraft.errors import InvalidInput
    from redraft.llm import LLM

    every = [name for name in registry.METHODS["draft"] if name != bench.BASELINE and complete(name)]
    # With prefix sharing the second method would not read the prompt.
    config = engine_config(model, {"max_seqs": max(64, batch), **engine, "draft": bench.BASELINE, "prefix_sharing": False})
    given = {**measured(sampling, config), **structured(structure)}
    params = SamplingParams(**{**given, "max_tokens": max_tokens, "temperature": temperature, "seed": seed})
    drafts = tuple(draft or (every if against is None else ["auto"]))
    chosen = suite.load(prompts, category or None, limit, turns=turns, chat=chat)
    if warm_limit is not None and warm_limit < 1:
        raise InvalidInput(f"warm_limit = {warm_limit}: must be 1 or more")
    lessons = () if warm is None else tuple(suite.load(warm, limit=warm_limit, turns=turns, chat=chat, without=chosen))
    options = bench.CompareOptions(drafts, params, rounds, batch, lenient=not draft, bound=bound, warm=lessons)
    peers = None if against is None else engines.Against(names(against), assistant, gguf, engine)
    if peers is not None:
        peers.check(options)
    if warm_limit is not None and warm is None:
        raise InvalidInput(f"warm_limit = {warm_limit}: is for the prompts of warm, and there are none")
    for name, value in (("assistant", assistant), ("gguf", gguf)):
        if value is not None and peers is None:
            raise InvalidInput(f"{name} = {value}: is for the engines of against, and there are none")
    if warm is not None and peers is not None:
        raise InvalidInput(f"warm = {warm}: not with against")
    source = "the suite of redraft" if prompts is None else str(prompts)
    if json is not None:
        files.check_writable(json)
    if html is not None:
        if peers is not None:
            raise InvalidInput(f"html = {html}: not with against, whose figures --json writes")
        files.check_writable(html, "html")
    progress = Console(stderr=True)

    def say(text: str) -> None:
        for line in fold(text, width()):
            progress.print(line, markup=False, highlight=False, soft_wrap=True)

    def announce(seconds: float) -> None:
        say(f"estimated duration: about {duration(seconds)}, from a short run of each method; shorter if texts end early")

    def keep(document: Callable[[], dict[str, Any]], stopped: bool) -> None:
        if json is not None:
            files.write(json, document())
            say(f"written to {json}")
        if stopped:
            say("stopped: the table holds what was measured before")
            raise typer.Exit(130)

    if warning := report.busy():
        say(warning)
    if peers is not None:
        with report.bar(progress, engines.ticks(len(chosen), options, peers)) as tick:
            beside = engines.compare(model, options, peers, chosen, tick)
        with InterruptBetween():
            engines.show(Console(width=width()), beside, options, peers)
            keep(lambda: engines.document(beside, options, peers, source), beside.stopped)
        return
    with report.bar(progress, bench.ticks(len(chosen), options)) as tick:
        comparison = bench.compare(LLM(config=config), options, chosen, tick, announce)
    with InterruptBetween():  # a second Ctrl-C must not lose the results
        rows = results.rows(comparison)
        report.show(Console(width=width()), comparison, options, rows)
        if html is not None:
            files.write_text(html, charts.page(comparison, options, rows))
            say(f"written to {html}")
        keep(lambda: report.document(comparison, options, rows, source), comparison.stopped)


def complete(name: str) -> bool:
    """Whether a drafter can be made without options. Wrappers cannot."""
    from redraft import registry
    from redraft.errors import InvalidInput

    try:
        registry.create("draft", name)
    except InvalidInput:
        return False
    return True
