"""The command `redraft`: one file for each verb. Every error that a user can cause is one line.

The verbs import PyTorch and transformers inside their functions, so that --help is fast.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence as Seq
from typing import Annotated, Any, cast

import typer

from redraft import __version__, registry
from redraft.cli import habits
from redraft.cli.options import as_flag
from redraft.errors import InvalidInput, RedraftError, bounded

VERBS = ("generate", "chat", "compare", "tune", "methods", "explain", "calibrate", "doctor", "get", "serve")

USAGE_ERROR = cast(type[Exception], typer.BadParameter.__bases__[0])  # typer exports one of click's errors; its base covers all

app = typer.Typer(
    name="redraft",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(given: bool) -> None:
    if given:
        typer.echo(f"redraft {__version__}")
        raise typer.Exit


@app.callback()
def redraft(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Run large language models faster, with the same text: draft, verify, keep."""


for _verb in VERBS:
    app.command(_verb)(registry.load(f"redraft.cli.{_verb}:{_verb}"))
app.add_typer(registry.load("redraft.cli.bench:bench"))


def run(arguments: Seq[str] | None = None) -> int:
    """The exit code of a command line (None: the process's own): 0; 1 an error; 2 a wrong request; 130 Ctrl-C."""
    typed = sys.argv[1:] if arguments is None else list(arguments)
    try:
        return app(typed, standalone_mode=False, prog_name="redraft") or 0
    except USAGE_ERROR as error:
        return _fail(_usage(error, typed), 2)
    except InvalidInput as error:
        return _fail(as_flag(str(error)), 2)
    except RedraftError as error:
        return _fail(str(error), 1)


def _usage(error: Any, typed: Seq[str]) -> str:
    if hasattr(error, "option_name") and hasattr(error, "possibilities"):  # no such option
        return habits.answer(error.ctx, error.option_name, typed)
    return str(error.format_message())


def _fail(message: str, code: int) -> int:
    if message:  # empty if the help was printed
        typer.echo(f"error: {bounded(' '.join(message.split()))}", err=True)
    return code


def main() -> None:
    sys.exit(run())
