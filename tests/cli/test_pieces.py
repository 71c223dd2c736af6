"""The folder of results of a batch on a cluster: what is there is whole, and a later run adds the rest."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from redraft.cli import rows
from redraft.cli.pieces import Pieces
from redraft.errors import InvalidInput

ABOUT = {"model": "a", "sampling": {"seed": 1}}


@pytest.fixture
def pieces(tmp_path: Path) -> Callable[..., Pieces]:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(f'"prompt {i}"\n' for i in range(10)))

    def open(at_once: int = 3, about: dict[str, Any] = ABOUT, overwrite: bool = False, folder: str = "out") -> Pieces:
        return Pieces(tmp_path / folder, rows.prompts(file, ()), about, at_once, overwrite=overwrite)

    return open


def found(start: int, count: int, error: str | None = None) -> list[dict[str, Any]]:
    return [{"index": start + i, "error": error} for i in range(count)]


def test_a_later_run_has_the_missing_pieces(pieces: Callable[..., Pieces]) -> None:
    first = pieces()
    assert (first.size, first.missing) == (4, [0, 4, 8])
    first.write(4, found(4, 4, error="no"))
    assert [path.name for path in sorted(first.folder.iterdir())] == ["_run.json", "part-00000001.jsonl"]
    later = pieces(at_once=100)  # of another size, if it began
    assert (later.size, later.missing, later.rows_before, later.errors_before) == (4, [0, 8], 4, 4)
    later.write(8, found(8, 2))
    later.write(0, found(0, 4))
    last = pieces()
    assert (last.missing, last.rows_before, last.errors_before) == ([], 10, 4)
    lines = [json.loads(line) for file in sorted(last.folder.glob("part-*")) for line in file.read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(10))


@pytest.mark.parametrize("damaged", ['{"index": 0, "error": null}\n' * 3, '{"index": 0, "error": null}\n' * 3 + '{"ind', "", "\xff"])
def test_a_file_without_all_its_rows_is_made_again(pieces: Callable[..., Pieces], damaged: str) -> None:
    first = pieces()
    first.write(0, found(0, 4))
    first.write(4, found(4, 4))
    (first.folder / "part-00000000.jsonl").write_text(damaged, encoding="latin-1")
    assert pieces().missing == [0, 8]


def test_results_of_something_else_are_kept(pieces: Callable[..., Pieces], tmp_path: Path) -> None:
    pieces().write(0, found(0, 4))
    with pytest.raises(InvalidInput, match="has results with other sampling; --overwrite"):
        pieces(about={**ABOUT, "sampling": {"seed": 2}})
    (tmp_path / "prompts.jsonl").write_text("".join(f'"prompt {i + 1}"\n' for i in range(10)))
    with pytest.raises(InvalidInput, match="has results with other prompts; --overwrite"):
        pieces()
    assert pieces(overwrite=True).missing == [0, 4, 8] and not list((tmp_path / "out").glob("part-*"))


def test_a_run_without_results_binds_nobody(pieces: Callable[..., Pieces]) -> None:
    pieces()
    assert pieces(about={"model": "b"}, at_once=1).size == 10


def test_only_a_folder_of_results_is_used(pieces: Callable[..., Pieces], tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "precious").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(InvalidInput, match="is a folder with other files"):
            pieces(folder="own", overwrite=overwrite)
        with pytest.raises(InvalidInput, match="a folder is needed"):
            pieces(folder="prompts.jsonl", overwrite=overwrite)
    with pytest.raises(InvalidInput, match="there is no folder"):
        pieces(folder="none/out")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "_run.json").write_text("{")
    with pytest.raises(InvalidInput, match=r"_run\.json cannot be read"):
        pieces(folder="damaged")
