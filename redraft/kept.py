"""Where Redraft keeps what later processes use: measured times, packed weights, profiles, downloaded models. And what only this user may
read: a folder, its files, a secret."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path
from stat import S_ISDIR, S_ISREG

from redraft.errors import CheckpointError

OTHERS = 0o077  # permissions that others have
SECRET, SECRET_BYTES = "secret", 32


def folder(name: str) -> Path:
    """The folder of this name in REDRAFT_CACHE, else in $XDG_CACHE_HOME/redraft, else in ~/.cache/redraft. CheckpointError for a user
    without a home."""
    try:
        if own := os.environ.get("REDRAFT_CACHE"):
            return Path(own).expanduser() / name
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "redraft" / name
    except RuntimeError:
        raise CheckpointError("this user has no home folder: REDRAFT_CACHE names another one for what is kept") from None


def private(path: Path) -> None:
    """Makes this folder if there is none. OSError, or ValueError if it is not this user's or if others may enter it."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    check_private(path)


def check_private(path: Path) -> None:
    """ValueError unless it is a folder of this user that others may not enter."""
    status = path.stat()
    if not S_ISDIR(status.st_mode):
        raise ValueError("it is no folder")
    if status.st_uid != os.geteuid():
        raise ValueError("the folder is another user's")
    if status.st_mode & OTHERS:
        raise ValueError("others may enter the folder; chmod 700 closes it")


def opened(path: Path | str) -> tuple[int, int]:
    """The number of an open file, to read, and its bytes. OSError, or ValueError unless it is a file of this user that others may not
    read."""
    number = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    status = os.fstat(number)
    if S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & OTHERS:
        return number, status.st_size
    os.close(number)
    raise ValueError("it must be a file of this user that others may not read")


def secret(path: Path) -> bytes:
    """The random bytes in the file `secret` of this folder, which the first process makes. OSError, or ValueError if the file is not
    whole or not this user's alone."""
    file = path / SECRET
    with suppress(FileNotFoundError):
        return _read(file)
    number, part = tempfile.mkstemp(".part", dir=path)  # for this user only
    try:
        with os.fdopen(number, "wb") as made:
            made.write(os.urandom(SECRET_BYTES))
            made.flush()
            os.fsync(made.fileno())
        with suppress(FileExistsError):  # another process was first
            os.link(part, file)
    finally:
        os.unlink(part)
    return _read(file)


def _read(file: Path) -> bytes:
    try:
        number, size = opened(file)
    except ValueError as error:
        raise ValueError(f"its file {file.name!r}: {error}") from None
    with os.fdopen(number, "rb") as made:
        found = made.read(SECRET_BYTES + 1)
    if size != SECRET_BYTES or len(found) != SECRET_BYTES:
        raise ValueError(f"its file {file.name!r} is not whole; without it, a new one is made, and what is kept there is not found again")
    return found
