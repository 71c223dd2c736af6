"""`redraft bench`: measurements other than the comparison of drafters, one verb each."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from redraft.cli.options import ENGINE, SHARING, Given, Model, engine_config, names, takes
from redraft.errors import InvalidInput, RedraftError

if TYPE_CHECKING:
    from rich.console import Console

WIDTH = 80  # columns of the tables if stdout is not a terminal

bench = typer.Typer(
    name="bench",
    add_completion=False,
    no_args_is_help=True,
    help="Measure cache policies, decoding, single operations, or a server under load.",
)


SHAPE = typer.Argument(
    help="A folder, a GGUF file, a hub id, 'embedded', a config.json, or a shape with random weights: llama-3.2-1b, 100m, qwen2-0.5b, "
    "smollm2-135m.",
    metavar="MODEL",
    show_default=False,
)


@bench.callback()
def _bench() -> None:  # with a callback typer keeps the verb's name even if there is only one
    pass


@bench.command("cache")
@takes(engine=ENGINE.without("lora", "draft", "draft_model", "verify", "draft_rows", "draft_total", *SHARING, "cache_policy"))
def cache(
    model: Model = "embedded",
    texts: Annotated[list[Path] | None, typer.Option(help="A .txt or .gz file, repeated for more; a folder is a source.")] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="seam=name:option=value,..., + between several; {tokens}, {part}, {recent}, {paged}, {speedup} of a budget; else all."
        ),
    ] = None,
    budget: Annotated[list[float] | None, typer.Option(help="Percent of a text, repeated for more; else 50, 25, 10, 5.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of a text; else as many as the context holds.")] = None,
    limit: Annotated[int, typer.Option(help="Texts of each task, 2 or more.")] = 16,
    turns: Annotated[int, typer.Option(help="Questions about one context, 1 to 5.")] = 5,
    given: Annotated[int, typer.Option(help="Tokens at the start of running text that are not scored.")] = 64,
    batch: Annotated[int, typer.Option(help="Texts scored at once.")] = 8,
    memory: Annotated[int, typer.Option(help="Tokens of a text whose cache and steps are measured, 0 for none.")] = 2000,
    task: Annotated[list[str] | None, typer.Option(help="A task by its name in the tables, repeated for more; else all.")] = None,
    seed: Annotated[int, typer.Option(help="Needles, keys and values are drawn from it.")] = 0,
    save: Annotated[bool, typer.Option("--save", help="Keep the curves for this model; a server chooses by them.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write all figures to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the curves to this .png, .svg or .pdf; needs matplotlib.")] = None,
    *,
    engine: Given,
) -> None:
    """Measure cache policies against the whole cache: perplexity, needles, retrieval by turn, bytes and speed.

    Tables go to stdout, the progress bar to stderr. The last lines name the tasks that show no effect.
    """
    from rich.console import Console

    from redraft.bench import cache as measurement
    from redraft.bench import curves, files, report, tasks

    options = measurement.CacheOptions(tuple(policy or ()), tuple(budget or measurement.BUDGETS), batch, memory)
    texts = texts or []
    found = tasks.sources(texts)
    wanted = tasks.Wanted(length, limit, turns, given, seed, tuple(task or ()))
    if json is not None:
        files.check_writable(json)
    if plot is not None:
        curves.check_plot(plot)
    llm = measurement.load(engine_config(model, {**engine, "draft": "none"}))
    left_out: list[str] = []
    every = tasks.build(llm.tokenizer, found, wanted, llm.max_model_len - 1, left_out)
    plan = measurement.RunPlan.of(llm, options, every)
    progress = Console(stderr=True)
    for reason in left_out:
        progress.print(f"left out: {reason}")
    with report.bar(progress, plan.ticks) as tick:
        measured = measurement.measure(llm, plan, tick)
    curves.show(_console(), llm, options, measured)
    if save:
        progress.print(f"kept in {curves.kept(llm, measured).save()}")
    if json is not None:
        settings = {
            "texts": [str(path) for path in texts] or "the standard library",
            "limit": limit,
            "turns": turns,
            "seed": seed,
            "left_out": left_out,
        }
        files.write(json, curves.document(llm, options, measured, settings))
        progress.print(f"written to {json}")
    if plot is not None:
        curves.plot(plot, f"{llm.name}: cache policies", measured)
        progress.print(f"drawn to {plot}")


@bench.command("decode")
@takes(adapter=ENGINE.only("lora"))
def decode(
    model: Annotated[str, SHAPE] = "llama-3.2-1b",
    against: Annotated[
        str, typer.Option(help="Engines to compare with: transformers, llama.cpp, openvino, with commas; or none.")
    ] = "transformers",
    redraft: Annotated[
        list[str] | None, typer.Option(help="option=value,... of one redraft engine, repeated for more; ratios are against the first.")
    ] = None,
    backend: Annotated[str | None, typer.Option(help="Of all redraft engines; else the default one, and torch if that differs.")] = None,
    quant: Annotated[str | None, typer.Option(help="How redraft's weights are quantized at load.")] = None,
    dtype: Annotated[str, typer.Option(help="Of all engines; auto: the checkpoint's.")] = "auto",
    threads: Annotated[int, typer.Option(min=0, max=1024, help="Of each engine; 0: one for each core that this process may use.")] = 0,
    context: Annotated[int, typer.Option(help="Tokens of the prompt before the decoded ones.")] = 128,
    tokens: Annotated[int, typer.Option(help="Tokens to generate in each turn.")] = 32,
    prefill: Annotated[int, typer.Option(help="Tokens of the prompt that is read.")] = 512,
    rows: Annotated[str, typer.Option(help="Rows of one step, ascending, with commas.")] = "1,2,3,4,6,8,12,16,24,32",
    rounds: Annotated[int, typer.Option(help="Turns of each engine and measurement.")] = 5,
    isa: Annotated[
        str | None, typer.Option(help="For testing: avx2, avx512 or avx512-bf16 at most; an engine that ignores it is marked.")
    ] = None,
    seed: Annotated[int, typer.Option(help="The prompt is drawn from it.")] = 0,
    timeout: Annotated[float, typer.Option(help="Seconds after which an engine without output is stopped.")] = 600.0,
    json: Annotated[Path | None, typer.Option(help="Write all figures to this file.")] = None,
    *,
    adapter: Given,
) -> None:
    """Measure decode, prefill and steps of many rows against other engines: same weights, same threads, own processes, in turns.

    Speeds are compared with the read bandwidth and the arithmetic peak of the same run, and a step with its limit: the time to
    read weights and cache or to compute the products, whichever is longer. Tables go to stdout, the progress bar to stderr.

    With --lora, given once, the redraft engines have this adapter, which other engines and the limits leave out. To see what it
    takes: --redraft "" --redraft lora=NAME=FOLDER.
    """
    from rich.console import Console

    from redraft.bench import decode as measurement
    from redraft.bench import files, report

    common = {name: value for name, value in (("backend", backend), ("quant", quant)) if value is not None} | adapter
    options = measurement.DecodeOptions(
        redraft=measurement.own_engines(common, redraft or []),
        against=names(against),
        dtype=dtype,
        threads=threads,
        context=context,
        tokens=tokens,
        prefill=prefill,
        rows=_numbers("rows", rows),
        rounds=rounds,
        isa=isa,
        seed=seed,
        timeout=timeout,
    )
    measurement.check(model, options)
    if json is not None:
        files.check_writable(json)
    progress = Console(stderr=True)
    with report.bar(progress, measurement.ticks(options)) as tick:
        found = measurement.compare(model, options, tick)
    measurement.show(_console(), found)
    if json is not None:
        files.write(json, measurement.document(found))
        progress.print(f"written to {json}")
    if found.stopped:
        progress.print("stopped: the tables hold the rounds before")
        raise typer.Exit(130)


@bench.command("ops")
def ops(
    model: Annotated[str, SHAPE] = "llama-3.2-1b",
    backend: Annotated[str | None, typer.Option(help="Names with commas; else all fast ones.")] = None,
    quant: Annotated[str, typer.Option(help="Quantizations to measure beside plain weights, with commas; or none.")] = "int8,int4",
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    threads: Annotated[int, typer.Option(min=0, max=1024, help="0: one for each core that this process may use.")] = 0,
    rows: Annotated[str, typer.Option(help="Rows of a linear layer, with commas.")] = "1,2,3,4,6,8,12,16,24,32,512",
    cached: Annotated[str, typer.Option(help="Tokens that attention reads, with commas.")] = "1024,8192",
    shared: Annotated[int, typer.Option(help="Tokens of a prefix that 8 sequences share; 0: not measured.")] = 4096,
    rounds: Annotated[int, typer.Option(help="Turns of each measurement.")] = 5,
    json: Annotated[Path | None, typer.Option(help="Write all figures to this file.")] = None,
) -> None:
    """Measure linear layers and attention of each backend, compared with the read bandwidth and the arithmetic peak.

    The limit of a number of rows is the time to read the weights or to compute the products, whichever is longer, at the
    bandwidth and the peak of the same round. The last tables add up all linear layers of a step. Tables go to stdout, the
    progress bar to stderr. Only the shape of the model matters; no weight is read.
    """
    from rich.console import Console

    from redraft.bench import files, report, shapes
    from redraft.bench import ops as measurement
    from redraft.ops.library import default_threads

    options = measurement.OpsOptions(
        backends=names(backend),
        quants=names(quant),
        dtype=dtype,
        threads=threads or default_threads(),
        rows=_numbers("rows", rows),
        cached=_numbers("cached", cached),
        shared=shared,
        rounds=rounds,
    )
    shapes.spec_of(model)  # its errors come first
    if json is not None:
        files.check_writable(json)
    progress = Console(stderr=True)
    with report.bar(progress, measurement.ticks(options)) as tick:
        found = measurement.measure(model, options, tick)
    measurement.show(_console(), found)
    if json is not None:
        files.write(json, measurement.document(found))
        progress.print(f"written to {json}")


@bench.command("profile")
@takes(engine=ENGINE.without("lora", "draft", "draft_model", "verify", "draft_rows", "draft_total", *SHARING, "cache_policy"))
def profile(
    model: Model = "embedded",
    output: Annotated[Path, typer.Option(help="The file to write, for `redraft sim --cost`.")] = Path("measured.json"),
    rounds: Annotated[int | None, typer.Option(help="Turns of each step; else 5, with --quick 3.", show_default=False)] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer steps with fewer cached tokens.")] = False,
    seed: Annotated[int, typer.Option(help="Tokens and sizes are drawn from it.")] = 0,
    *,
    engine: Given,
) -> None:
    """Measure what a step takes on this machine, for the simulator: prompts in chunks, decoding texts, and both in one step.

    A step takes a time for its rows, its texts, the pairs of a row and a token that it sees, and the tokens that are read. A fit
    gives these times. The last line says how well it predicts steps that it does not know. The progress bar goes to stderr.
    """
    from rich.console import Console

    from redraft.bench import files, report
    from redraft.bench import profile as measurement
    from redraft.llm import LLM

    options = measurement.ProfileOptions.of(quick, rounds, seed)
    files.check_writable(output, "output")
    llm = LLM(config=engine_config(model, {**engine, "draft": "none"}))
    planned = measurement.plan(llm, options)
    progress = Console(stderr=True)
    if warning := report.busy():
        progress.print(warning)
    with report.bar(progress, options.rounds * len(planned)) as tick:
        cost = measurement.measure(llm, planned, options.rounds, tick).fit(measurement.about(llm))
    measurement.show(_console(), cost)
    files.write(output, cost.document())
    progress.print(f"written to {output}")


@bench.command("quant")
def quant(
    model: Model = "embedded",
    texts: Annotated[list[Path] | None, typer.Option(help="A .txt or .gz file, repeated for more.", show_default=False)] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to score, at most.")] = 8192,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 512,
    decoded: Annotated[int, typer.Option(min=1, help="New tokens of each turn.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each way.")] = 3,
    threads: Annotated[int | None, typer.Option(min=1, max=1024, help="CPU threads; else one for each core.", show_default=False)] = None,
    json: Annotated[Path | None, typer.Option(help="Write all figures to this file.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write one page with plots to this file.")] = None,
) -> None:
    """Measure every way to store the weights: bytes, perplexity, divergence from 16 bits, tokens a second.

    The ways are those of --quant, and for a quantized file its own. All models are loaded at once.
    """
    from rich.console import Console

    from redraft.bench import files
    from redraft.bench import quant as measurement

    if not texts:
        raise InvalidInput("--texts: at least one file of text is needed")
    for path in (json, html):
        if path is not None:
            files.check_writable(path)
    options = measurement.QuantOptions(tuple(texts), tokens, length, decoded, rounds, threads)
    progress = Console(stderr=True)
    found = measurement.measure(model, options, lambda name: progress.print(f"measuring {name}", highlight=False))
    measurement.show(_console(), options, found)
    if json is not None:
        files.write(json, measurement.document(model, options, found))
    if html is not None:
        html.write_text(measurement.page(model, found), encoding="utf-8")
    for path in (json, html):
        if path is not None:
            progress.print(f"written to {path}")


@bench.command("serve")
def serve(
    base_url: Annotated[str, typer.Option(help="The server, with or without /v1.")] = "http://127.0.0.1:8000",
    api_key: Annotated[str | None, typer.Option(envvar="REDRAFT_API_KEY", help="Sent as a bearer token.")] = None,
    model: Annotated[str | None, typer.Option(help="Its name there; else the first of /v1/models.")] = None,
    endpoint: Annotated[str, typer.Option(help="completions or chat.")] = "completions",
    rate: Annotated[float | None, typer.Option(help="Requests a second, Poisson; inf, the default: all at once.")] = None,
    concurrency: Annotated[
        int | None, typer.Option(help="Requests in flight: alone a closed loop; with --rate or --trace the limit.")
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(help="A CSV of arrivals and lengths; columns TIMESTAMP, ContextTokens, GeneratedTokens or arrival, input, output."),
    ] = None,
    trace_scale: Annotated[float, typer.Option(help="How many times faster the trace is played.")] = 1.0,
    prompts: Annotated[Path | None, typer.Option(help="A JSONL file: prompt or messages, and max_tokens or output_len if wanted.")] = None,
    num_prompts: Annotated[int | None, typer.Option(help="Requests; else the whole trace or file, or 100.")] = None,
    input_len: Annotated[int | None, typer.Option(help="Tokens of a random prompt (default: 128).")] = None,
    output_len: Annotated[int | None, typer.Option(help="Tokens to request, if no file gives them (default: 64).")] = None,
    shared_prefix: Annotated[int, typer.Option(help="Tokens before each random prompt that its group shares.")] = 0,
    groups: Annotated[int | None, typer.Option(help="Groups of --shared-prefix (default: 1).")] = None,
    warmups: Annotated[int, typer.Option(help="Requests before the measurement.")] = 1,
    temperature: Annotated[float | None, typer.Option(help="Else the server's own.")] = None,
    seed: Annotated[int, typer.Option(help="Of arrivals and words; request i is sent with this seed plus i.")] = 0,
    ignore_eos: Annotated[
        bool | None,
        typer.Option(help="Generate until max_tokens; not all servers can. On except with --prompts.", show_default=False),
    ] = None,
    extra: Annotated[str, typer.Option(help="""More fields of the body, such as '{"speculation": "off"}'.""")] = "{}",
    goodput: Annotated[list[str] | None, typer.Option(help="Limits in ms, such as 'ttft:500 tpot:50 e2el:5000'.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds for a whole request.")] = 600.0,
    json: Annotated[Path | None, typer.Option(help="Write all figures to this file, under the keys of `vllm bench serve`.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write one page with plots to this file; needs matplotlib.")] = None,
) -> None:
    """Put any OpenAI-compatible server under load: open loop (Poisson or a trace) or closed, latencies, throughput and goodput.

    Tables go to stdout, progress to stderr. Failures are counted by kind; Ctrl-C prints what was measured so far.
    """
    import asyncio
    from functools import partial

    from rich.console import Console

    from redraft.bench import files
    from redraft.bench.load import drive, show
    from redraft.bench.load.client import Target
    from redraft.bench.load.figures import figures, parse_limits
    from redraft.bench.load.workload import Load

    load = Load(
        rate=rate,
        concurrency=concurrency,
        trace=trace,
        scale=trace_scale,
        prompts=prompts,
        count=num_prompts,
        input_len=input_len,
        output_len=output_len,
        shared=shared_prefix,
        groups=groups,
        warmups=warmups,
        seed=seed,
    )
    target = Target(
        base_url=base_url,
        endpoint=endpoint,
        model=model,
        api_key=api_key,
        temperature=temperature,
        seed=seed,
        ignore_eos=prompts is None if ignore_eos is None else ignore_eos,
        extra=_object("extra", extra),
        timeout=timeout,
    )
    limits = parse_limits(goodput or ())
    if json is not None:
        files.check_writable(json)
    if html is not None:
        show.check_html(html)
    progress = Console(stderr=True)
    try:
        found = asyncio.run(drive.measure(target, load, partial(show.progress, progress)))
    except KeyboardInterrupt:
        raise typer.Exit(130) from None  # before the first request
    shown = figures(found.run, limits)
    show.show(_console(), target, load, found, shown)
    if json is not None:
        files.write(json, show.document(target, load, found, shown))
        progress.print(f"written to {json}")
    if html is not None:
        files.write_text(html, show.page(target, load, found, shown))
        progress.print(f"written to {html}")
    if found.run.interrupted:
        raise typer.Exit(130)
    if not shown["completed"]:
        raise RedraftError(f"all {shown['failed']} requests failed, the first: {': '.join(found.run.records[0].failure or ())}")


def _object(name: str, text: str) -> dict[str, Any]:
    import json

    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise InvalidInput(f"{name} = {text!r}: a JSON object is needed")
    return found


def _numbers(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InvalidInput(f"{name} = {text!r}: whole numbers with commas are needed") from None


def _console() -> Console:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else WIDTH)
