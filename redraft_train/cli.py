"""`redraft train`: trains a drafter for a model, from text that the model writes."""

from __future__ import annotations

import importlib.util
import shlex
from pathlib import Path
from typing import Annotated

import typer

from redraft.cli.options import ENGINE, Given, Model, engine_config, takes
from redraft.errors import InvalidInput, Unsupported
from redraft_train import budget as budgets

HEADS = "eagle, hydra, medusa, kangaroo, ppd or draft (a small model), with its options as name:option=value,..."
NEEDED = "dtype", "device", "backend", "quant", "threads", "weight_cache", "max_model_len", "max_seqs", "token_budget", "cache_memory"


@takes(engine=ENGINE.only(*NEEDED))
def train(
    model: Model = "embedded",
    head: Annotated[str | None, typer.Option(help=HEADS, show_default=False)] = None,
    prompts: Annotated[Path | None, typer.Option(help="Prompts like yours: a .txt file, one a line, or JSON lines.")] = None,
    out: Annotated[Path | None, typer.Option(help="The folder to make. An unfinished run in it goes on.", show_default=False)] = None,
    budget: Annotated[str, typer.Option(help="The time for all of it, such as 40m or 1h30m.", metavar="TIME")] = "1h",
    data: Annotated[
        Path | None, typer.Option(help="The folder of texts and states, which several heads may share; else OUT/data.", show_default=False)
    ] = None,
    kept: Annotated[int, typer.Option(help="The number of tokens that the head can draft, the most frequent ones.")] = 8192,
    max_tokens: Annotated[int, typer.Option(help="New tokens of an answer that the model writes.")] = 256,
    rate: Annotated[float | None, typer.Option(help="The peak learning rate; else the head's own.", show_default=False)] = None,
    seed: Annotated[int, typer.Option(help="Of answers and of training.", min=0)] = 0,
    steps: Annotated[int | None, typer.Option(help="Train so many steps, whatever they take.", show_default=False)] = None,
    texts: Annotated[int | None, typer.Option(help="Write so many texts, whatever they take.", show_default=False)] = None,
    compare: Annotated[bool, typer.Option("--compare/--no-compare", help="Measure the head on held-out prompts at the end.")] = True,
    *,
    engine: Given,
) -> None:
    """Train a drafter for a model, from text that the model writes.

    The model answers the prompts, its states are stored, and a head learns to guess its next tokens from them. A twentieth of the
    prompts is held out: on these the head is measured, and compared with drafters that need no training.

    The folder is for --draft HEAD:path=OUT of every other verb. After Ctrl-C the same command goes on where it stopped.
    """
    for name, value in (("head", head), ("prompts", prompts), ("out", out)):
        if value is None:
            raise InvalidInput(f"--{name}: is needed")
    if importlib.util.find_spec("torch") is None:
        raise Unsupported("redraft train needs PyTorch, which is not installed: pip install 'redraft[train]'")
    assert head is not None and prompts is not None and out is not None
    seconds = budgets.seconds(budget)
    if not prompts.is_file():
        raise InvalidInput(f"--prompts = {prompts}: {'is a folder' if prompts.is_dir() else 'there is no such file'}")
    from rich.console import Console

    from redraft.columns import width
    from redraft.llm import LLM
    from redraft_train import folder, report, run
    from redraft_train.progress import Progress
    from redraft_train.texts import prompts as read

    order = run.Order(head, out, data or out / "data", seconds, kept, max_tokens, seed, steps, texts, rate, compare)
    order.check()
    given = {"max_seqs": 32, **engine, "draft": "none", "prefix_sharing": False}  # the comparison reads all prompts
    llm = LLM(config=engine_config(model, given))
    found = read(prompts, llm)
    console = Console(stderr=True)
    made = run.run(llm, order, found, Progress(console))
    own = {"data": data, "kept": kept, "max_tokens": max_tokens, "rate": rate, "seed": seed, "steps": steps, "texts": texts, **engine}
    command = _command(model, {"head": head, "prompts": prompts, "out": out, "budget": budget, **own}, compare=compare)
    run.save(llm, made, order, report.card(made, order, llm, f"{len(found)} of {prompts.name}", command))
    if compare:
        report.compare(llm, made, out, Console(width=width()), console)
    typer.echo(folder.draft(made.head.method, out))


def _command(model: str, given: Given, *, compare: bool) -> str:
    """What was typed, with the defaults."""
    words = [word for name, value in given.items() if value is not None for word in (f"--{name.replace('_', '-')}", str(value))]
    return shlex.join(["redraft", "train", model, *words, *([] if compare else ["--no-compare"])])
