"""`redraft cache`: the packed weights that are kept on disk, and the prefixes of a folder."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from redraft.columns import width
from redraft.errors import InvalidInput, shown

if TYPE_CHECKING:
    from redraft.kv.disk.files import Form
    from redraft.models.packs import Entry

    Row = Entry | Form


def cache(
    action: Annotated[str | None, typer.Argument(help="clear: remove all of them.", metavar="[clear]", show_default=False)] = None,
    prefix_cache_dir: Annotated[
        Path | None, typer.Option(help="Prefixes that are kept in this folder, instead.", metavar="DIR", show_default=False)
    ] = None,
) -> None:
    """List the packed weights that are kept on disk, so that models start faster, or remove them.

    They lie in ~/.cache/redraft/weights (XDG_CACHE_HOME and REDRAFT_CACHE change that). --weight-cache 8GiB of other commands limits them,
    --weight-cache 0 uses none. With --prefix-cache-dir, list or remove what the option of that name of other commands has kept.
    """
    if action not in (None, "clear"):
        raise InvalidInput(f"cache {shown(action)}: 'clear' is allowed, or nothing")
    from redraft.models.memory import size

    if prefix_cache_dir is None:
        from redraft.models import packs

        packed = packs.entries() if action is None else packs.clear()
        found: Seq[Row] = packed
        count, noun = len(packed), "file"
    else:
        from redraft.kv.disk import files

        folder = prefix_cache_dir.expanduser()
        forms = files.forms(folder) if action is None else files.clear(folder)
        found, count, noun = forms, sum(one.pages for one in forms), "page"
    total = f"{count} {noun}{'s' * (count != 1)}, {size(sum(one.bytes for one in found))}"
    if action is not None:
        typer.echo(f"removed {total}")
        return
    for line in _table(found, width()):
        typer.echo(line)
    typer.echo(total)


def _table(found: Seq[Row], columns: int) -> list[str]:
    """A line for each file or form of a model, as wide as the terminal. Of a long path the end is shown."""
    from redraft.models.memory import size

    rows = [("last used", "size", "form", "model")] if found else []
    for one in found:
        used = datetime.fromtimestamp(one.used).strftime("%Y-%m-%d %H:%M")
        model = one.model or one.path.name
        rows.append(
            (
                used,
                size(one.bytes),
                one.form or ("unfinished" if one.path.suffix == ".part" else "damaged"),
                model if model.isprintable() else repr(model),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(3)] if rows else []
    left = columns - sum(widths) - 6
    lines = []
    for used, amount, form, model in rows:
        model = model if len(model) <= left else f"...{model[3 - left :]}"
        lines.append(f"{used:{widths[0]}}  {amount:>{widths[1]}}  {form:{widths[2]}}  {model}")
    return lines
