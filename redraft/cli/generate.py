"""`redraft generate`: continue a prompt."""

from __future__ import annotations

import secrets
import sys
from typing import Annotated

import typer

from redraft.cli.options import ENGINE, SAMPLING, Given, Model, engine_config, takes
from redraft.cli.stream import Screen, show
from redraft.config import SamplingParams

PROMPT = '''class Stack:
    """A last-in, first-out collection of items."""

    def __init__(self, items=()):
        self._items = list(items)

    def push(self, item):
        """Put an item on top."""
'''


@takes(sampling=SAMPLING, engine=ENGINE)
def generate(
    model: Model = "embedded",
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Text to continue; else what is piped in, or an example.")] = None,
    *,
    sampling: Given,
    engine: Given,
) -> None:
    """Continue a prompt; the text streams as it is found.

    The text goes to stdout, what it took to stderr. In a terminal, tokens that were accepted drafts are green.
    """
    config = engine_config(model, engine)
    params = SamplingParams(**{"seed": secrets.randbits(32), **sampling})
    if prompt is None:
        piped = "" if sys.stdin.isatty() else sys.stdin.read().removesuffix("\n")
        prompt = piped or PROMPT
    from redraft.llm import LLM

    llm = LLM(config=config)
    screen = Screen()
    if screen.terminal:
        typer.secho(prompt, dim=True, nl=params.n > 1)
    shown = show(llm, llm.tokenizer.encode(prompt) if prompt else [], params)
    typer.echo(shown.summary(llm, params), err=True)
    if shown.interrupted:
        raise typer.Exit(130)
