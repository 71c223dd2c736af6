"""Where files are kept between processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from redraft.errors import CheckpointError
from redraft.kept import folder


def test_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("REDRAFT_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "common"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert folder("cost") == tmp_path / "own" / "cost"
    monkeypatch.setenv("REDRAFT_CACHE", "~/other")
    assert folder("cost") == tmp_path / "other" / "cost"
    monkeypatch.delenv("REDRAFT_CACHE")
    assert folder("cost") == tmp_path / "common" / "redraft" / "cost"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert folder("cost") == tmp_path / ".cache" / "redraft" / "cost"


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("REDRAFT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", none)
    with pytest.raises(CheckpointError, match="this user has no home folder: REDRAFT_CACHE names another one"):
        folder("cost")
