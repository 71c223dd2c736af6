"""The command `redraft`: one file per verb, and every error that a user can cause on one line.

The files of the verbs import PyTorch and transformers inside their functions, so that help costs no more than its text.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence as Seq
from typing import Annotated, Any, cast

import typer

from redraft import __version__, registry
from redraft.cli.options import as_flag
from redraft.errors import InvalidInput, RedraftError

VERBS = ("generate", "chat", "compare", "methods", "explain", "calibrate", "doctor", "serve")

USAGE_ERROR = cast(type[Exception], typer.BadParameter.__bases__[0])  # of click's errors typer exports this one; its base is all

app = typer.Typer(name="redraft", add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"redraft {__version__}")
        raise typer.Exit


@app.callback()
def redraft(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """An inference engine for large language models: draft, verify, keep."""


for _verb in VERBS:
    app.command(_verb)(registry.load(f"redraft.cli.{_verb}:{_verb}"))
app.add_typer(registry.load("redraft.cli.bench:bench"))


def run(arguments: Seq[str] | None = None) -> int:
    """The exit code of a command line (None: the process's own): 0, 1 what went wrong, 2 what was asked wrongly, 130 Ctrl-C."""
    try:
        return app(arguments, standalone_mode=False) or 0
    except USAGE_ERROR as error:
        return _fail(cast(Any, error).format_message(), 2)
    except InvalidInput as error:
        return _fail(as_flag(str(error)), 2)
    except RedraftError as error:
        return _fail(str(error), 1)


def _fail(message: str, code: int) -> int:
    if message:  # none where the help was shown instead
        typer.echo(f"error: {' '.join(message.split())}", err=True)
    return code


def main() -> None:
    sys.exit(run())
