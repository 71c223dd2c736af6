"""The folder of results of a batch on a cluster: a file for each piece of the prompts, whole or absent, so that a run that was stopped
continues with the pieces that are missing."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from redraft.bench import files
from redraft.cli import rows
from redraft.cli.rows import PARQUET, Prompts
from redraft.errors import InvalidInput

PIECE = 256  # rows of a file of results
ABOUT = "_run.json"  # readers of folders with tables leave out names that begin so


class Pieces:
    """rows_before, errors_before: in the files of an earlier run."""

    def __init__(self, folder: Path, prompts: Prompts, about: Mapping[str, Any], at_once: int, *, overwrite: bool) -> None:
        """about: what the results depend on besides the prompts; at_once: pieces that are computed at the same time.

        InvalidInput if the folder has other files, or results that depend on something else, unless `overwrite`.
        """
        self.folder, self.prompts = folder, prompts
        about = {"prompts": prompts.digest(), "rows": prompts.count, **about}
        known = self._known()
        if known is not None and not overwrite and any(folder.glob("part-*")):
            self.size = known.pop("rows_per_file")
            if other := [name for name in about if known.get(name) != about[name]]:
                raise InvalidInput(f"--output = {folder}: has results with other {', '.join(other)}; --overwrite replaces them")
        else:
            self.size = max(1, min(PIECE, math.ceil(prompts.count / at_once)))
            self._begin({**about, "rows_per_file": self.size})
        self.missing: list[int] = []  # the first rows of pieces
        self.rows_before = self.errors_before = 0
        for start in range(0, prompts.count, self.size):
            found = rows.complete(self._file(start))
            if found is None or found[0] != min(self.size, prompts.count - start):
                self.missing.append(start)
            else:
                self.rows_before, self.errors_before = self.rows_before + found[0], self.errors_before + found[1]

    def write(self, start: int, found: list[dict[str, Any]]) -> None:
        """The piece that begins with row `start`."""
        assert len(found) == min(self.size, self.prompts.count - start)
        file = self._file(start)
        part = file.with_name(f".{file.name}")  # the end of the name is the form
        with closing(rows.results(part, self.prompts.ids)) as target:
            for row in found:
                target.write(row)
        with rows.written():
            os.replace(part, file)

    def _file(self, start: int) -> Path:
        form = PARQUET if self.folder.suffix == PARQUET else ".jsonl"
        return self.folder / f"part-{start // self.size:08}{form}"

    def _known(self) -> dict[str, Any] | None:
        """What an earlier run says of itself; None if there was none."""
        if not self.folder.exists():
            files.check_writable(self.folder, "--output")
            return None
        if not self.folder.is_dir():
            raise InvalidInput(f"--output = {self.folder}: a folder is needed; on a cluster there are several files of results")
        try:
            return dict(json.loads((self.folder / ABOUT).read_text()))
        except FileNotFoundError:
            if any(self.folder.iterdir()):
                raise InvalidInput(f"--output = {self.folder}: is a folder with other files") from None
            return None
        except (OSError, ValueError):
            raise InvalidInput(f"--output = {self.folder}: {ABOUT} cannot be read") from None

    def _begin(self, about: dict[str, Any]) -> None:
        with rows.written():
            self.folder.mkdir(exist_ok=True)
            for file in self.folder.glob("part-*"):
                file.unlink()
            files.write(self.folder / ABOUT, about)
