"""`redraft sim`: what a cluster would do, from the measured cost of a step."""

from __future__ import annotations

from itertools import product
from math import isinf
from pathlib import Path
from typing import Annotated

import typer

from redraft.errors import InvalidInput


def sim(
    trace: Annotated[str, typer.Option(help="A .csv of arrivals and lengths, a .jsonl with hash_ids, or poisson:rate=4,prompt=900,...")],
    cost: Annotated[Path, typer.Option(help="What a step takes, as `redraft bench profile` writes it.")],
    replicas: Annotated[list[int] | None, typer.Option(help="Workers (default: 1).", show_default=False)] = None,
    scheduler: Annotated[list[str] | None, typer.Option(help="name:option=value,... (default: sarathi).", show_default=False)] = None,
    router: Annotated[list[str] | None, typer.Option(help="name:option=value,... (default: prefix-affinity).", show_default=False)] = None,
    blocks: Annotated[list[int] | None, typer.Option(help="The pool of a worker in 32 tokens (default: 4096).", show_default=False)] = None,
    split: Annotated[
        list[str] | None, typer.Option(help="Workers for prompts and for the rest, such as 3:5, too.", show_default=False)
    ] = None,
    link: Annotated[str, typer.Option(help="Between split workers: token_bytes, bandwidth, latency, blocking, each with =VALUE.")] = "",
    rate: Annotated[float | None, typer.Option(help="Requests a second; else as in the trace.")] = None,
    poisson: Annotated[bool, typer.Option("--poisson", help="Draw the gaps, instead of those of the trace.")] = False,
    requests: Annotated[int | None, typer.Option(help="How many; a trace that is too short begins again.")] = None,
    limits: Annotated[str, typer.Option(help="Such as ttft=0.5,itl@99=0.1,joint=0.9: seconds, at a percentile.")] = "",
    search: Annotated[str | None, typer.Option(help="rate: the highest that holds the limits; replicas: the fewest.")] = None,
    skip: Annotated[float, typer.Option(help="The share of requests, from the first on, that latencies leave out.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    json: Annotated[Path | None, typer.Option(help="Write all figures to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw latencies to this .png, .svg or .pdf; needs matplotlib.")] = None,
) -> None:
    """Simulate workers under load, from the measured cost of a step.

    Scheduler, page table, prefix tree and router are those of the server. Nothing of a model is loaded.

    --replicas, --split, --scheduler, --router and --blocks may be repeated: all combinations are compared, and replicas with splits.
    Limits are those of all requests together: P90 of ttft, tpot, e2el and second, P99 of itl, unless @ names another percentile.
    joint=0.9: so many of the requests must keep all limits.

    Example: redraft sim --trace poisson:rate=4 --cost measured.json --limits ttft=1,itl=0.1 --search rate
    """
    from rich.console import Console

    from redraft.bench import curves, files
    from redraft.columns import width
    from redraft.core.step_cost import StepCost
    from redraft.sim import show
    from redraft.sim import trace as traces
    from redraft.sim.configuration import Configuration, simulate
    from redraft.sim.figures import Figures, Limits
    from redraft.sim.search import fewest, highest_rate

    if link and not split:
        raise InvalidInput(f"link = {link!r}: is between split workers; --split is needed, such as 1:1")
    others = scheduler or ["sarathi"], router or ["prefix-affinity"], blocks or [4096]
    whole = product(replicas or ([] if split else [1]), *others)
    chosen = [Configuration(*choice) for choice in whole]
    chosen += [Configuration(1, *rest, parts, link) for parts, rest in product(split or [], list(product(*others)))]
    chosen = list(dict.fromkeys(chosen))
    wanted, model = Limits.parse(limits), StepCost.read(cost)
    if search not in (None, "rate", "replicas"):
        raise InvalidInput(f"search = {search!r}: rate or replicas is allowed")
    if search is not None and not wanted.each:
        raise InvalidInput(f"search = {search}: --limits are needed, such as ttft=0.5,itl=0.1")
    if search == "replicas" and split:
        raise InvalidInput("search = replicas: a split has the workers that it names; --search rate takes it")
    for name, value, allowed, least, most in (
        ("rate", rate, "a number above 0", 1e-9, 1e9),
        ("requests", requests, "1 to 10000000", 1, 10_000_000),
        ("skip", skip, "0 to 0.9", 0, 0.9),
    ):
        if value is not None and not least <= value <= most:
            raise InvalidInput(f"{name} = {value:g}: {allowed} is allowed")
    if json is not None:
        files.check_writable(json)
    if plot is not None:
        curves.check_plot(plot)
    for one in chosen:
        one.cluster(model)  # names are checked before anything runs
    played = traces.read(trace, seed)
    played = played.cut(requests) if requests is not None else played
    played = played.poisson(seed) if poisson else played
    played = played.at_rate(rate) if rate is not None else played
    if search == "rate" and isinf(played.rate):
        raise InvalidInput(f"trace = {trace}: all requests come at once, so no rate can be searched; --poisson draws times for --rate")

    def found(one: Configuration) -> show.Result:
        def at(rate: float) -> Figures:
            return simulate(one, model, played.at_rate(rate), wanted, skip)

        def on(count: int) -> Figures:
            return simulate(one.but(replicas=count), model, played, wanted, skip)

        name = one.named(chosen)
        if search == "rate":
            return show.Result(name, *highest_rate(at, played.rate))
        if search == "replicas":
            return show.Result(name, *fewest(on, one.replicas))
        run = simulate(one, model, played, wanted, skip)
        return show.Result(name, run, [run])

    progress, console = Console(stderr=True), Console(width=width(), highlight=False)
    results = []
    for i, one in enumerate(chosen):
        with progress.status(f"{i + 1} of {len(chosen)}: {one.named(chosen) or played.about}"):
            results.append(found(one))
    console.print(f"{played.about}; {model.about.get('model', 'a cost')} on {model.about.get('backend', 'a machine')}")
    console.print()
    show.several(console, results, wanted, searched=search or "") if len(results) > 1 else show.single(console, results[0], wanted)
    settings = {"trace": played.about, "cost": dict(model.about), "limits": limits, "seed": seed, "skip": skip, "search": search}
    if json is not None:
        files.write(json, show.document(results, settings))
        progress.print(f"written to {json}")
    if plot is not None:
        from redraft.sim import plot as figure

        figure.plot(plot, played.about, results, wanted)
        progress.print(f"drawn to {plot}")
