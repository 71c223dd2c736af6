"""`redraft calibrate`: what a method must know of a model, found once and kept."""

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
    method: Annotated[str, typer.Option(help="The way to read the cache that wants it.")] = "double-sparsity",
    samples: Annotated[int, typer.Option(help="Pieces of 512 tokens to run at most, evenly from all texts.")] = 256,
    output: Annotated[Path | None, typer.Option(help="Where to write it; else where the method looks for it.", show_default=False)] = None,
) -> None:
    """Run texts through a model and keep what a method must know of it.

    Done once for a model: what is found is saved with the model's hash, and refused for any other.
    """
    made: Any = registry.create("read", method)
    if not hasattr(made, "calibrate"):
        raise InvalidInput(f"--method {method}: needs no calibration")
    if not texts:
        raise InvalidInput("--texts: at least one file of text is needed")
    from redraft.bench.tasks import read
    from redraft.llm import LLM

    given = [read(file) for file in texts]
    llm = LLM(config=engine_config(model, {"draft": "none"}))
    profile = made.calibrate(llm.runner, [llm.tokenizer.encode(text) for text in given if text], samples)
    try:
        path = profile.save(output)
    except OSError as error:
        raise InvalidInput(f"cannot write {error.filename or output}: {error.strerror}") from None
    typer.echo(f"{method}: {profile.tokens} tokens of {profile.texts} texts", err=True)
    typer.echo(path)
