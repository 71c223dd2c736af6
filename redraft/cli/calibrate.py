"""`redraft calibrate`: measures what a method needs to know about a model, and saves it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from redraft import registry
from redraft.cli.options import Model, engine_config
from redraft.errors import InvalidInput


def calibrate(
    model: Model = "embedded",
    texts: Annotated[list[Path] | None, typer.Option(help="A .txt or .gz file, repeated for more.", show_default=False)] = None,
    method: Annotated[str, typer.Option(help="name:option=value of the cache method that needs it.")] = "double-sparsity",
    samples: Annotated[
        int | None,
        typer.Option(help="Pieces of 512 tokens at most, evenly from all texts; else the method's own number.", min=1, show_default=False),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="The file to write; else the one that the method reads.", show_default=False)] = None,
) -> None:
    """Run texts through a model and save what a method needs to know about it.

    Needed once for each model. The file holds the model's hash and is refused for any other model.
    """
    from redraft.engine.budgets import CACHE

    known = {name: cls for seam in CACHE for name in registry.METHODS[seam] if hasattr(cls := registry.method(seam, name), "calibrate")}
    name = registry.parse(method)[0]
    if name not in known:
        raise InvalidInput(f"--method {method}: these methods need a calibration: {', '.join(sorted(known))}")
    made: Any = registry.build(known[name], method)
    if not texts and getattr(made, "reads_texts", True):
        raise InvalidInput("--texts: at least one file of text is needed")
    from redraft.bench.tasks import read
    from redraft.llm import LLM

    given = [read(file) for file in texts or ()]
    llm = LLM(config=engine_config(model, {"draft": "none"}))
    count = {} if samples is None else {"samples": samples}
    profile = made.calibrate(llm.runner, [llm.tokenizer.encode(text) for text in given if text], **count)
    try:
        path = profile.save(output)
    except OSError as error:
        raise InvalidInput(f"cannot write {error.filename or output}: {error.strerror}") from None
    typer.echo(f"{name}: {profile.tokens} tokens of {profile.texts} texts", err=True)
    typer.echo(path)
