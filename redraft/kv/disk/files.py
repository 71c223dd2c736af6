"""The files of pages: written whole or not at all, checked when they are read, and bounded.

    folder / form / first two digits of the name / name-parent.page

form: a digest of what decides the bits of a page but its text; several models can share a folder. parent: the name of the page before, of
zeros for the first of a text. A file is

    magic | HMAC-SHA256 of magic, name, parent and content | content

The secret of the HMAC lies in the folder (see kept.py), so a file that is cut, damaged, renamed or from elsewhere is not used. A file
is written under another name and then renamed: no process sees a part of it, and several may write to one folder.
"""

from __future__ import annotations

import errno
import hmac
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import suppress
from pathlib import Path
from stat import S_ISREG
from typing import NamedTuple

from redraft import kept
from redraft.errors import CheckpointError

log = logging.getLogger(__name__)

MAGIC = b"redraft page 1\n\n"
HEAD = len(MAGIC) + 32
ROOT = "0" * 32  # the parent of the first page of a text
SUFFIX, PART, ABOUT = ".page", ".part", "about.json"
FORM = re.compile(r"[0-9a-f]{32}")
NAME = re.compile(r"([0-9a-f]{32})-([0-9a-f]{32})\.page")
OLD = 3600  # seconds after which a file that is not whole is nobody's
LOW = 0.9  # of the room: what is left when files had to leave
FRESH = 0.05  # of the room: what this process may write before it looks again at what others wrote


class Link(NamedTuple):
    """A page of a text: its name and that of the page before, each of 32 hexadecimal digits."""

    name: str
    parent: str


class Entry(NamedTuple):
    """A file of a page. used: when it was written or read last, in seconds since 1970."""

    path: Path
    link: Link
    bytes: int
    used: float


class Form(NamedTuple):
    """What a folder has of one form of one model, as its `about.json` describes it."""

    path: Path
    model: str
    form: str
    pages: int
    bytes: int
    used: float


class Files:
    """The files of one form, in `folder`, which must be this user's alone. size: bytes of the content of each; room: the most bytes of the
    files of all forms; about: what a list of the folder says of the form."""

    def __init__(self, folder: Path, form: str, size: int, room: int, secret: bytes, about: dict[str, str]) -> None:
        self.folder, self.place, self.size, self.room, self._secret = folder, folder / form, size, room, secret
        self.total: int | None = None  # bytes of all files, None while nobody has looked
        self._fresh = 0  # bytes written since then
        self._about, self._made = json.dumps(about).encode(), set[str]()
        self._make()

    @property
    def file_size(self) -> int:
        return HEAD + self.size

    def has(self, link: Link) -> bool:
        return os.path.exists(self._path(link))

    def touch(self, link: Link) -> bool:
        """Whether there is such a file, which counts as used now."""
        try:
            os.utime(self._path(link))
        except FileNotFoundError:
            return False
        except OSError as error:
            log.debug("%s: %s", self._path(link), error)
        return True

    def read(self, link: Link, into: Seq[memoryview]) -> None:
        """Fills `into`, of `size` bytes together. OSError or ValueError if there is no such file, or none that may be used."""
        number, size = kept.opened(self._path(link))
        with os.fdopen(number, "rb", buffering=0) as file:
            if size != self.file_size:
                raise ValueError(f"{size} bytes instead of {self.file_size}")
            head = file.read(HEAD)
            for part in into:
                at = 0
                while at < len(part):
                    if not (got := file.readinto(part[at:])):
                        raise ValueError("it ends too soon")
                    at += got
        if not hmac.compare_digest(head, MAGIC + self._sum(link, into)):
            raise ValueError("the checksum differs")

    def write(self, link: Link, parts: Seq[memoryview]) -> None:
        """Writes a file; others leave if it has no room. OSError if the disk has none."""
        size = self.file_size
        if self.total is None or self._fresh > FRESH * self.room or self.total + size > self.room:
            self.look(size)
        assert self.total is not None
        if self.total + size > self.room:
            raise OSError(errno.ENOSPC, "the files that are there cannot be removed")
        path = Path(self._path(link))
        content: list[bytes | memoryview] = [MAGIC, self._sum(link, parts), *parts]
        try:
            self._make(path.parent.name)
            _write(path, content)
        except FileNotFoundError:  # the folders were removed
            self._made.clear()
            self._make()
            self._make(path.parent.name)
            _write(path, content)
        self.total, self._fresh = self.total + size, self._fresh + size

    def drop(self, link: Link) -> None:
        """Removes a file of this user that is damaged."""
        with suppress(OSError):
            path = Path(self._path(link))
            if path.lstat().st_uid == os.geteuid():
                path.unlink()

    def clear(self) -> None:
        """Removes all files of this form."""
        for one in _entries(self.place):
            _removed(one.path)
        self.total = None

    def look(self, wanted: int = 0) -> None:
        """Counts the files of all forms, and removes those that were used longest ago if there is no room for `wanted` more bytes."""
        found = [entry for form in _forms(self.folder) for entry in _entries(form)]
        total = sum(one.bytes for one in found)
        if total + wanted > self.room:
            for one in reversed(by_use(found)):
                if total + wanted <= LOW * self.room:
                    break
                if _removed(one.path):
                    total -= one.bytes
        self.total, self._fresh = total, 0

    def _make(self, part: str = "") -> None:
        """Makes the folder of the form, or a part of it."""
        if part not in self._made:
            (self.place / part).mkdir(mode=0o700, exist_ok=True)
            if not part:
                _write(self.place / ABOUT, [self._about])
            self._made.add(part)

    def _path(self, link: Link) -> str:
        return f"{self.place}/{link.name[:2]}/{link.name}-{link.parent}{SUFFIX}"

    def _sum(self, link: Link, parts: Seq[memoryview]) -> bytes:
        found = hmac.new(self._secret, MAGIC + link.name.encode() + link.parent.encode(), "sha256")
        for part in parts:
            found.update(part)
        return found.digest()


def by_use(entries: Seq[Entry]) -> list[Entry]:
    """The pages used last first, each behind the pages before it in its text, as these were used at least as recently. Pages without the
    page before come last, because nobody can find them."""
    known, placed, reached = {one.link.name: one for one in entries}, set[str](), {ROOT}
    found: list[Entry] = []
    lost: list[Entry] = []
    for entry in sorted(entries, key=lambda one: -one.used):
        chain: list[Entry] = []
        at: Entry | None = entry
        while at is not None and at.link.name not in placed:
            placed.add(at.link.name)
            chain.append(at)
            at = known.get(at.link.parent)
        if chain and chain[-1].link.parent in reached:
            found += reversed(chain)
            reached |= {one.link.name for one in chain}
        else:
            lost += reversed(chain)
    return found + lost


# ---- a folder as a whole


def forms(folder: Path) -> list[Form]:
    """What a folder has, the form used last first. CheckpointError if it cannot be read, or if others may enter it."""
    try:
        kept.check_private(folder)
        found = [_form(place) for place in _forms(folder)]
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: {error.strerror if isinstance(error, OSError) else error}") from None
    return sorted(found, key=lambda one: -one.used)


def clear(folder: Path) -> list[Form]:
    """Removes all pages, of all forms; returns what there was. The secret stays, because running processes know it."""
    found = forms(folder)
    for one in found:
        shutil.rmtree(one.path, ignore_errors=True)
    return found


def _forms(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if FORM.fullmatch(path.name) and path.is_dir() and not path.is_symlink()]


def _form(place: Path) -> Form:
    about = {}
    with suppress(OSError, ValueError):
        about = dict(json.loads((place / ABOUT).read_bytes()))
    pages = list(_entries(place))
    used = max((one.used for one in pages), default=0.0)
    return Form(place, str(about.get("model", "")), str(about.get("form", "")), len(pages), sum(one.bytes for one in pages), used)


def _entries(place: Path) -> Iterator[Entry]:
    """The files of pages. Removes what a process left unfinished long ago."""
    for part in place.iterdir():
        if len(part.name) != 2 or part.is_symlink():
            continue
        with suppress(OSError), os.scandir(part) as files:  # another process removed it
            for file in files:
                with suppress(OSError):
                    status = file.stat(follow_symlinks=False)
                    if (named := NAME.fullmatch(file.name)) and S_ISREG(status.st_mode):
                        yield Entry(Path(file.path), Link(named[1], named[2]), status.st_size, status.st_mtime)
                    elif file.name.endswith(PART) and status.st_mtime < time.time() - OLD:
                        _removed(Path(file.path))


def _write(path: Path, parts: Seq[bytes | memoryview]) -> None:
    number, part = tempfile.mkstemp(PART, dir=path.parent)  # for this user only
    try:
        with os.fdopen(number, "wb") as file:
            file.writelines(parts)
        os.replace(part, path)
    except BaseException:
        _removed(Path(part))
        raise


def _removed(path: Path) -> bool:
    """Whether it is gone; another process may have removed it."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return False
    return True
