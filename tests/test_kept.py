"""Where files are kept between processes, and what only this user may read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from redraft import kept
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


# ---- a private folder and its secret


def test_a_private_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "a" / "b"
    kept.private(place)
    kept.private(place)
    assert place.stat().st_mode & 0o777 == 0o700
    for mode in (0o750, 0o705, 0o710, 0o755):
        place.chmod(mode)
        with pytest.raises(ValueError, match="others may enter the folder"):
            kept.private(place)
    place.chmod(0o700)
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        kept.private(tmp_path / "file")
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(ValueError, match="another user's"):
        kept.private(place)


def test_the_secret_is_made_once(tmp_path: Path) -> None:
    """Also by several processes that begin at once."""
    code = "import sys; from pathlib import Path; from redraft.kept import secret; print(secret(Path(sys.argv[1])).hex())"
    some = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    found = {one.communicate()[0].strip() for one in some}
    assert found == {kept.secret(tmp_path).hex()} and len(found.pop()) == 64
    assert [(path.name, path.stat().st_mode & 0o777) for path in tmp_path.iterdir()] == [("secret", 0o600)]


def test_a_secret_that_others_may_know_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = kept.secret(tmp_path)
    file = tmp_path / "secret"
    for damage, reason in (
        (lambda: file.chmod(0o640), "its file 'secret': it must be a file of this user"),
        (lambda: (file.chmod(0o600), os.truncate(file, 31)), "its file 'secret' is not whole"),
        (lambda: file.write_bytes(before + b"x"), "its file 'secret' is not whole"),
        (lambda: (file.unlink(), file.symlink_to("/dev/zero")), "symbolic links"),
    ):
        damage()
        with pytest.raises((OSError, ValueError), match=reason):
            kept.secret(tmp_path)
    file.unlink()
    assert kept.secret(tmp_path) != before
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(ValueError, match="must be a file of this user"):
        kept.secret(tmp_path)
