"""`redraft chat`: talk to a model that has a chat template."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Iterator
from typing import Annotated

import typer

from redraft.cli.options import ENGINE, SAMPLING, Given, Model, engine_config, takes
from redraft.cli.stream import show
from redraft.config import SamplingParams
from redraft.errors import InvalidInput

Message = dict[str, str]

SHARE = 4  # a reply takes at most this part of the context unless told otherwise, or the first would leave no room for a second


@takes(sampling=SAMPLING.without("n"), engine=ENGINE)
def chat(
    model: Model = "embedded",
    system: Annotated[str | None, typer.Option(help="What the model is told before the conversation.")] = None,
    *,
    sampling: Given,
    engine: Given,
) -> None:
    """Talk to a model that has a chat template.

    /clear forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C ends a reply. Piped in, each line is a turn.
    """
    config = engine_config(model, engine)
    SamplingParams(**sampling)
    from redraft.llm import LLM

    llm = LLM(config=config)
    sampling = {"max_tokens": max(1, llm.max_model_len // SHARE), "seed": secrets.randbits(32), **sampling}
    params = SamplingParams(**sampling)
    opening: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    llm.tokenizer.encode_chat([*opening, {"role": "user", "content": "?"}])  # refused now, not after the first question
    messages = list(opening)
    terminal = sys.stdin.isatty()
    for said in _typed() if terminal else _piped():
        if said == "/exit":
            break
        if said == "/clear":
            messages = list(opening)
            continue
        asked = [*messages, {"role": "user", "content": said}]
        prompt = llm.tokenizer.encode_chat(asked)
        cached = llm.runner.memory.match(prompt, "")
        try:
            shown = show(llm, prompt, params)
        except InvalidInput as error:
            if not terminal:
                raise
            typer.echo(f"error: {error}; /clear starts anew", err=True)
            continue
        typer.secho(f"{shown.summary(llm, params)}, {cached} of {len(prompt)} prompt tokens cached", dim=True, err=True)
        messages = [*asked, {"role": "assistant", "content": shown.texts[0]}]
        if shown.interrupted and not terminal:
            raise typer.Exit(130)


def _typed() -> Iterator[str]:
    """Lines from the terminal until Ctrl-D; Ctrl-C drops the line."""
    import readline  # noqa: F401 - gives input() its line editing and history

    while True:
        try:
            said = input("> ").strip()
        except EOFError:
            typer.echo()
            return
        except KeyboardInterrupt:
            typer.echo()
            continue
        if said:
            yield said


def _piped() -> Iterator[str]:
    yield from (said for line in sys.stdin if (said := line.strip()))
