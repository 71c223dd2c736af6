"""`redraft generate`: continue or answer one prompt, or a file of prompts."""

from __future__ import annotations

import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from redraft.bench import files
from redraft.cli import options
from redraft.cli.options import ENGINE, MODEL, SAMPLING, STRUCTURE, Given, Template, engine_config, structured, takes
from redraft.cli.prompting import Prompting
from redraft.cli.stream import Screen, show
from redraft.config import SamplingParams
from redraft.errors import InvalidInput

if TYPE_CHECKING:
    from redraft.llm import LLM

PROMPT = '''class Stack:
    """A last-in, first-out collection of items."""

    def __init__(self, items=()):
        self._items = list(items)

    def push(self, item):
        """Put an item on top."""
'''
QUESTION = "Explain in two sentences what a stack is in programming."  # the example for a model with a chat template


@takes(sampling=SAMPLING, structure=STRUCTURE, engine=ENGINE)
def generate(
    model: Annotated[str | None, MODEL] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="The prompt; else what is piped in, or an example.")] = None,
    suffix: Annotated[
        str | None, typer.Option(help="The text after the new text: fill in what stands between --prompt and it.", metavar="TEXT")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as it is, without a chat template.")] = False,
    chat_template: Template = None,
    prompts: Annotated[Path | None, typer.Option(help="A file of prompts, JSON lines or Parquet.", show_default=False)] = None,
    output: Annotated[
        Path | None, typer.Option(help="With --prompts: the file of results, or the folder with --ray; else stdout.", show_default=False)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="--output may replace results.")] = False,
    ray: Annotated[
        bool, typer.Option("--ray", help="With --prompts: on a Ray cluster, which is started if RAY_ADDRESS names none.")
    ] = False,
    ray_address: Annotated[
        str | None, typer.Option(help="The Ray cluster to use, which has a node on this machine.", metavar="HOST:PORT", show_default=False)
    ] = None,
    replicas: Annotated[
        int | None, typer.Option(help="With --ray: the number of engines; else one for each node.", min=1, max=1024, show_default=False)
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Write a page with the origin of every token, which opens offline.", metavar="FILE.html")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="A YAML file of options, as for serve; of them the engine's are used.", metavar="FILE")
    ] = None,
    *,
    sampling: Given,
    structure: Given,
    engine: Given,
) -> None:
    """Answer a prompt by the model's chat template, or continue it if there is none.

    The text goes to stdout as it is generated, statistics go to stderr. In a terminal, accepted drafts are green. With
    --lora the first adapter is used.

    Each line of --prompts is a string or an object: prompt, messages or prompt_token_ids, and optionally id, sampling
    options such as max_tokens, and lora, the name of an adapter (null: none). Each gives one line of results, in the
    same order: index, id, text, token_ids, finish_reason, usage, seed, error. A wrong line gets an error and the others finish;
    the exit code is then 1. Results are written as they finish, so Ctrl-C keeps the lines that are complete.
    With --scheduler batchllm lines that begin alike run together, of 1,024 lines at a time.

    With --ray, --output is a folder of files, in Parquet if its name ends with .parquet. The same command again continues
    a run that was stopped, however it ended: each row of prompts has one row of results, with its index.
    """
    template = options.chat_template(chat_template)
    if trace is not None:
        if prompts is not None:
            raise InvalidInput("--trace and --prompts exclude each other: a trace shows one prompt")
        files.check_writable(trace, "trace")
    if raw and template is not None:
        raise InvalidInput("--raw and --chat-template exclude each other")
    if suffix is not None and (template is not None or prompts is not None):
        raise InvalidInput(f"--suffix and {'--prompts' if template is None else '--chat-template'} exclude each other")
    if config is None:
        chosen = engine_config(model or "embedded", engine)
    else:
        from redraft.cli.serve import engine_of

        chosen = engine_of(config, {"model": model, **engine})
    sampling = {**sampling, **structured(structure)}
    SamplingParams(**sampling)
    sampling = options.adapted(sampling, chosen)
    if prompts is not None:
        if prompt is not None:
            raise InvalidInput("--prompt and --prompts exclude each other")
        if ray or ray_address is not None:
            where = ray_address, replicas
            raise typer.Exit(_distributed(chosen, prompts, output, sampling, template, where, raw=raw, overwrite=overwrite))
        if replicas is not None:
            raise InvalidInput("--replicas needs --ray")
        raise typer.Exit(_batch(chosen, prompts, output, sampling, template, raw=raw, overwrite=overwrite))
    if output is not None or overwrite or ray or ray_address is not None or replicas is not None:
        raise InvalidInput("--output, --overwrite, --ray, --ray-address and --replicas need --prompts")
    if prompt is None:
        prompt = "" if sys.stdin.isatty() else sys.stdin.read().removesuffix("\n")
        prompt = prompt or None
    _one(chosen, prompt, suffix, sampling, template, trace, raw=raw)


def _one(
    config: Any, prompt: str | None, suffix: str | None, sampling: Given, template: str | None, trace: Path | None, *, raw: bool
) -> None:
    llm = _load(config)
    prompting = Prompting.of(llm, template, raw=raw or suffix is not None)
    params = SamplingParams(**{"seed": secrets.randbits(32), **sampling})
    if trace is not None:
        from redraft.cli.trace import traced

        params = traced(params)
    example = prompt is None
    if prompt is None:
        prompt = QUESTION if prompting.chat else PROMPT
    if Screen().terminal:
        typer.secho(prompt, dim=True, nl=prompting.chat or params.n > 1)
    elif example:  # whoever did not write it should see it
        typer.echo(prompt, err=True)
    tokens, kind = prompting.text(prompt), "chat template" if prompting.chat else "raw prompt"
    if suffix is not None:
        tokens, params, kind = llm.fill.tokens(prompt, suffix), llm.fill.params(params), "filled in the middle"
    shown = show(llm, tokens, params)
    typer.echo(shown.summary(llm, params, kind), err=True)
    if trace is not None:
        from redraft.cli.trace import write

        write(trace, llm, prompt, params, shown, chat=prompting.chat)
    if shown.interrupted:
        raise typer.Exit(130)


def _batch(config: Any, prompts: Path, output: Path | None, sampling: Given, template: str | None, *, raw: bool, overwrite: bool) -> int:
    from redraft.cli import batch

    found = batch.check(prompts, output, sampling, overwrite=overwrite)
    llm = _load(config)
    return batch.run(llm, Prompting.of(llm, template, raw=raw), found, output, sampling)


def _distributed(
    config: Any,
    prompts: Path,
    output: Path | None,
    sampling: Given,
    template: str | None,
    where: tuple[str | None, int | None],
    *,
    raw: bool,
    overwrite: bool,
) -> int:
    from redraft.cli import batch, distributed, rows

    batch.one_text(sampling)
    if output is None:
        raise InvalidInput("--ray needs --output, the folder of results")
    found = rows.prompts(prompts, batch.ALLOWED)
    return distributed.run(distributed.Job(config, template, raw, sampling), found, output, *where, overwrite=overwrite)


def _load(config: Any) -> LLM:
    from redraft.llm import LLM

    return LLM(config=config)
