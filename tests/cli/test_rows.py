"""Files of prompts in JSON lines, read in pieces."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import pytest

import redraft.cli
from redraft.cli import rows
from redraft.errors import InvalidInput, Unsupported


@pytest.mark.parametrize("content", [b'"a"\n"b"\n"c"\n', b'"a"\n\n\xff\xfe\n"no end"', b"", b"\n"])
def test_pieces_are_the_lines(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes(content)
    found = pickle.loads(pickle.dumps(rows.prompts(file, ())))
    lines = content.splitlines(keepends=True)
    assert found.count == len(lines)
    for start in range(len(lines) + 1):
        for stop in range(start, len(lines) + 2):
            assert found.lines(start, stop) == lines[start:stop]


def test_other_content_has_another_digest(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes(b'"a"\n')
    before = rows.prompts(file, ()).digest()
    assert rows.prompts(file, ()).digest() == before
    file.write_bytes(b'"b"\n')
    assert rows.prompts(file, ()).digest() != before


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"--prompts = .*/none: No such file"):
        rows.prompts(tmp_path / "none", ())


def test_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "redraft.cli.parquet", None)
    monkeypatch.delattr(redraft.cli, "parquet", raising=False)
    (tmp_path / "x.parquet").touch()
    with pytest.raises(Unsupported, match=r"redraft\[cluster\]"):
        rows.prompts(tmp_path / "x.parquet", ())
    with pytest.raises(Unsupported, match=r"redraft\[cluster\]"):
        rows.results(tmp_path / "y.parquet")
