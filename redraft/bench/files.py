"""Result files. Paths are checked before anything is measured; files are written whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from redraft.errors import InvalidInput


def check_writable(path: Path, option: str = "json") -> None:
    """Raises InvalidInput if `write` could not write its file."""
    if path.is_dir():
        raise InvalidInput(f"{option} = {path}: is a folder; a file's name is needed")
    if not path.parent.is_dir():
        raise InvalidInput(f"{option} = {path}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise InvalidInput(f"{option} = {path}: the folder {path.parent} cannot be written to")


def write(path: Path, content: dict[str, Any]) -> None:
    """A JSON document."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, content: str) -> None:
    """Writes the file whole or not at all: to a temporary name in the same folder, then renamed."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", suffix=".part", delete=False, encoding="utf-8") as file:
        try:
            file.write(content)
            file.flush()
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
