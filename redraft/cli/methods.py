"""`redraft methods`: the registered methods, from their cards."""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
from itertools import groupby
from typing import Annotated, Any

import typer

from redraft import registry
from redraft.card import Card
from redraft.columns import fold, width

SEAMS = {
    "draft": "Drafters: what may come next?",
    "verify": "Verifiers: what is accepted?",
    "control": "Controls: what decides beside the model?",
    "keep": "Cache policies: what stays?",
    "codec": "Codecs: how is a page stored?",
    "read": "Sparse reads: what is read this step?",
    "reuse": "Reuse: which spans come from elsewhere?",
    "depth": "Depth: which layers run?",
    "steer": "Steering: what changes hidden states between layers?",
    "quant": "Weights: how are they stored?",
    "route": "Routers: which worker runs a request?",
    "sched": "Schedulers: which requests run, with how many rows?",
}

BAR = "\\|"  # in a Markdown table


@dataclasses.dataclass(frozen=True)
class Option:
    name: str
    type: str
    default: Any


@dataclasses.dataclass(frozen=True)
class Method:
    """A registered method, from its card and its class."""

    name: str
    seam: str
    guarantee: str
    needs: str
    paper: str
    title: str
    deviates: str
    summary: str
    options: list[Option]
    doc: str


def described(name: str | None = None) -> list[Method]:
    """All registered methods, or those called `name` in any seam. UnknownMethod suggests near names."""
    known = [(seam, one) for seam, methods in registry.METHODS.items() for one in methods]
    wanted = [(seam, one) for seam, one in known if name in (None, one)]
    if not wanted:
        raise registry.unknown("method", str(name), {one for _, one in known})
    return [_describe(seam, one) for seam, one in wanted]


def _describe(seam: str, name: str) -> Method:
    cls = registry.method(seam, name)
    card: Card = cls.card  # type: ignore[attr-defined]
    options = [Option(field.name, _type(field), _default(field)) for field in registry.options(cls).values()]
    doc = inspect.getdoc(sys.modules[cls.__module__]) or ""
    return Method(name, seam, card.guarantee.label, card.needs, card.paper, card.title, card.deviates, card.summary, options, doc)


def _type(field: dataclasses.Field[Any]) -> str:
    return field.type if isinstance(field.type, str) else field.type.__name__


def _default(field: dataclasses.Field[Any]) -> Any:
    """As JSON has it: what JSON lacks as text, a value that must be given as "required"."""
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    elif field.default is not dataclasses.MISSING:
        value = field.default
    else:
        return "required"
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)


def methods(
    name: Annotated[str | None, typer.Argument(help="One method: its options, guarantee, paper and algorithm.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A list of objects.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="The page docs/methods.md.")] = False,
) -> None:
    """List the methods: what each does and when to use it."""
    found = described(name)
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(method) for method in found], indent=2))
    elif as_markdown:
        typer.echo(markdown(found), nl=False)
    elif name is None:
        typer.echo(_list(found))
    else:
        for line in "\n\n".join(map(_page, found)).splitlines():
            typer.echo("\n".join(fold(line, width())))


def _list(found: list[Method]) -> str:
    """A line for each method, at most 80 columns."""
    column = max(len(method.name) for method in found)
    lines = []
    for seam, group in groupby(found, key=lambda method: method.seam):
        lines += [f"{seam}  {SEAMS.get(seam, '')}".rstrip()]
        lines += [f"  {method.name:{column}}  {method.summary}" for method in group] + [""]
    return "\n".join([*lines, "Options, guarantee and paper of one: redraft methods NAME"])


def _page(method: Method) -> str:
    lines = [f"{method.name} ({method.seam}): {method.title}", method.summary, ""]
    lines += [f"guarantee  {method.guarantee}", f"needs      {method.needs}"]
    lines += [f"deviates   {method.deviates}", f"paper      {method.paper or '-'}", ""]
    options = [f"  {method.name}:{option.name}=...  {option.type}, default {option.default}" for option in method.options]
    return "\n".join([*lines, *(options or ["  no options"]), "", method.doc])


def markdown(found: list[Method]) -> str:
    """docs/methods.md: a table for each seam, then each method's options and docstring."""
    lines = ["# Methods", "", "Made by `redraft methods --markdown > docs/methods.md`; the suite checks that it is current."]
    for seam in dict.fromkeys(method.seam for method in found):
        lines += ["", f"## {SEAMS.get(seam, seam)}", "", "| name | guarantee | needs | paper |", "| --- | --- | --- | --- |"]
        of_seam = [method for method in found if method.seam == seam]
        lines += [f"| [{m.name}](#{m.name}) | {m.guarantee} | {m.needs} | {m.paper or '-'} |" for m in of_seam]
        for method in of_seam:
            lines += ["", f"### {method.name}", "", f"{method.title}. Deviates from the paper: {method.deviates}.", ""]
            if method.options:
                lines += ["| option | type | default |", "| --- | --- | --- |"]
                lines += [f"| `{o.name}` | `{o.type.replace('|', BAR)}` | `{o.default}` |" for o in method.options]
                lines += [""]
            lines += ["```text", method.doc, "```"]
    return "\n".join(lines) + "\n"
