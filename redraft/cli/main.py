"""The command `redraft`: one file for each verb. Every error that a user can cause is one line.

A verb's file is imported when the verb is used, so that --help is fast; its function imports the engine. Other packages add verbs
by entry points of the group VERBS_OF_OTHERS, each of them (first line of the help, "module:function").
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence as Seq
from typing import Annotated, Any, cast

import typer
from typer.core import TyperGroup
from typer.main import get_command

from redraft import __version__, registry
from redraft.cli import habits
from redraft.errors import InvalidInput, RedraftError, bounded

VERBS = {  # name -> the first line of its help
    "generate": "Answer a prompt by the model's chat template, or continue it if there is none.",
    "chat": "Talk to a model that has a chat template.",
    "compare": "Measure drafters against the plain loop, on the same prompts and in the same process.",
    "tune": "Find the fastest drafter and number of draft rows for your prompts, and say why.",
    "methods": "List the methods: what each does and when to use it.",
    "explain": "Print the step for a configuration, and the part that does each line.",
    "calibrate": "Run texts through a model and save what a method needs to know about it.",
    "doctor": "Show what this machine has, which backend is used and why, and measure the machine's limits.",
    "get": "Download a real model, for machines that reach the Python index but no hub.",
    "cache": "List the packed weights that are kept on disk, so that models start faster, or remove them.",
    "serve": "Serve a model to clients of OpenAI's interface.",
    "sim": "Simulate workers under load, from the measured cost of a step.",
    "bench": "Measure cache policies, decoding, single operations, or a server under load.",
}

VERBS_OF_OTHERS = "redraft.verbs"
USAGE_ERROR = cast(type[Exception], typer.BadParameter.__bases__[0])  # typer exports one of click's errors; its base covers all


@functools.cache
def others() -> dict[str, tuple[str, str]]:
    """The verbs that other packages add: name -> (first line of the help, "module:function")."""
    from importlib.metadata import entry_points

    return {point.name: point.load() for point in entry_points(group=VERBS_OF_OTHERS)}


def verb(name: str) -> Any:
    """The command of a verb, whose file is imported."""
    found = registry.load(f"redraft.cli.{name}:{name}" if name in VERBS else others()[name][1])
    if not isinstance(found, typer.Typer):  # not a group of verbs
        found, function = typer.Typer(add_completion=False), found
        found.command(name)(function)
    return get_command(found)


class Verbs(TyperGroup):
    """Holds the names and first lines of VERBS and of others(), and imports the verb that is used."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *(name for name in others() if name not in VERBS)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name in VERBS or cmd_name not in others():
            return super().get_command(ctx, cmd_name)
        made = typer.Typer(add_completion=False)
        made.command(cmd_name, help=others()[cmd_name][0])(lambda: None)
        return get_command(made)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, _, rest = super().resolve_command(ctx, args)
        return name, name and verb(name), rest


app = typer.Typer(
    name="redraft",
    cls=Verbs,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _name, _help in VERBS.items():
    app.command(_name, help=_help)(lambda: None)


def _version(given: bool) -> None:
    if given:
        typer.echo(f"redraft {__version__}")
        raise typer.Exit


@app.callback()
def redraft(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Run large language models faster, with the same text: draft, verify, keep."""


def run(arguments: Seq[str] | None = None) -> int:
    """The exit code of a command line (None: the process's own): 0; 1 an error; 2 a wrong request; 130 Ctrl-C."""
    typed = sys.argv[1:] if arguments is None else list(arguments)
    try:
        return app(typed, standalone_mode=False, prog_name="redraft") or 0
    except USAGE_ERROR as error:
        return _fail(_usage(error, typed), 2)
    except InvalidInput as error:
        from redraft.cli.options import as_flag

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
