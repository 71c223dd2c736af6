"""Files of pages: what is written is read back or refused, and the folder keeps its bound."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from redraft.errors import CheckpointError
from redraft.kv.disk import files
from redraft.kv.disk.files import HEAD, ROOT, Entry, Files, Link

SIZE = 1000
FORM = "f" * 32
ABOUT = {"model": "/models/own", "form": "float32, native"}


def link(name: int, parent: int | None = None) -> Link:
    return Link(f"{name:032x}", ROOT if parent is None else f"{parent:032x}")


def content(seed: int) -> list[memoryview]:
    return [memoryview(bytes([seed]) * (SIZE - 1)), memoryview(b"x")]


def blank() -> list[memoryview]:
    return [memoryview(bytearray(SIZE - 1)), memoryview(bytearray(1))]


def of(folder: Path, pages: int = 100, form: str = FORM) -> Files:
    folder.mkdir(mode=0o700, exist_ok=True)
    return Files(folder, form, SIZE, pages * (HEAD + SIZE), b"secret", ABOUT)


def names(made: Files) -> set[int]:
    return {int(one.link.name, 16) for one in files._entries(made.place)}


@pytest.fixture
def made(tmp_path: Path) -> Files:
    return of(tmp_path / "kept")


def test_what_is_written_is_read(made: Files, tmp_path: Path) -> None:
    made.write(link(1), content(7))
    again = of(tmp_path / "kept")  # another process
    into = blank()
    again.read(link(1), into)
    assert into == content(7) and again.has(link(1)) and again.touch(link(1))
    assert not again.has(link(2)) and not again.touch(link(2)) and not again.has(link(1, 5))
    with pytest.raises(FileNotFoundError):
        again.read(link(2), blank())


def test_nobody_else_may_read_them(made: Files) -> None:
    made.write(link(1), content(1))
    modes = {path: path.stat().st_mode & 0o777 for path in [made.place, *made.place.rglob("*")]}
    assert len(modes) == 4
    assert {mode for path, mode in modes.items() if path.is_dir()} == {0o700}
    assert {mode for path, mode in modes.items() if path.is_file()} == {0o600}


def change(at: int) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[at] ^= 1
        path.write_bytes(data)

    return change


def replaced(path: Path) -> None:
    path.rename(path.with_suffix(".moved"))
    path.symlink_to(path.with_suffix(".moved"))


DAMAGES: dict[str, Callable[[Path], None]] = {
    "another format": change(0),
    "another checksum": change(20),
    "first byte": change(HEAD),
    "last byte": change(-1),
    "cut": lambda path: os.truncate(path, HEAD + SIZE - 1),
    "cut in its head": lambda path: os.truncate(path, 20),
    "empty": lambda path: os.truncate(path, 0),
    "longer": lambda path: os.truncate(path, HEAD + SIZE + 1),
    "others may read it": lambda path: path.chmod(0o644),
    "others may write it": lambda path: path.chmod(0o620),
    "a link": replaced,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused_and_leaves(made: Files, damage: str) -> None:
    made.write(link(1), content(1))
    DAMAGES[damage](Path(made._path(link(1))))
    with pytest.raises((OSError, ValueError)) as error:
        made.read(link(1), blank())
    assert not isinstance(error.value, FileNotFoundError)
    made.drop(link(1))
    assert not made.has(link(1))
    made.write(link(1), content(1))
    made.read(link(1), blank())


def test_a_file_of_another_user_is_refused_and_stays(made: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    made.write(link(1), content(1))
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(ValueError, match="must be a file of this user"):
        made.read(link(1), blank())
    made.drop(link(1))
    assert made.has(link(1))


def test_a_file_under_another_name_or_with_another_secret_is_refused(made: Files, tmp_path: Path) -> None:
    made.write(link(1), content(1))
    path = Path(made._path(link(1)))
    path.rename(made._path(link(1, 9)))
    with pytest.raises(ValueError, match="the checksum differs"):
        made.read(link(1, 9), blank())
    made.write(link(1), content(1))
    foreign = Files(tmp_path / "kept", FORM, SIZE, 10**6, b"another", ABOUT)
    with pytest.raises(ValueError, match="the checksum differs"):
        foreign.read(link(1), blank())


# ---- the bound


def stamp(made: Files, at: Link, when: float) -> None:
    os.utime(made._path(at), (when, when))


def test_what_was_used_longest_ago_leaves(tmp_path: Path) -> None:
    made = of(tmp_path / "kept", pages=10)
    for i in range(10):
        made.write(link(i), content(i))
        stamp(made, link(i), 1000 + i)
    stamp(made, link(0), 2000)
    made.write(link(10), content(10))
    assert names(made) == {0, 10, *range(3, 10)}  # two pages less, so that not each page looks for room
    for i in range(20, 60):
        made.write(link(i), content(1))
        assert sum(one.bytes for one in files._entries(made.place)) <= made.room


def test_a_page_leaves_before_the_page_in_front_of_it(tmp_path: Path) -> None:
    """Only that can be found without the other."""
    made = of(tmp_path / "kept", pages=10)
    for i in range(10):
        made.write(link(i, i - 1 if i % 5 else None), content(i))  # two texts of five pages
        stamp(made, link(i, i - 1 if i % 5 else None), 1000 - i)
    stamp(made, link(4, 3), 5000)  # the first text was used last, down to its last page
    made.write(link(10), content(10))
    assert names(made) == {*range(8), 10}


def test_the_order_of_leaving() -> None:
    def entry(name: int, parent: int | None, used: float) -> Entry:
        return Entry(Path(str(name)), link(name, parent), 1, used)

    some = [entry(1, None, 1), entry(2, 1, 2), entry(3, 2, 9), entry(4, 1, 5), entry(5, None, 7), entry(6, 99, 100), entry(7, 6, 101)]
    assert [int(one.link.name, 16) for one in files.by_use(some)] == [1, 2, 3, 5, 4, 6, 7]  # nobody finds 6 and 7


def test_forms_and_processes_share_the_room(tmp_path: Path) -> None:
    made = [of(tmp_path / "kept", pages=40, form=form * 32) for form in "ab"]
    for i in range(200):
        made[i % 2].write(link(i), content(1))
        assert sum(len(names(one)) for one in made) <= 43  # a twentieth more and a page, that one does not know of the other
    assert min(len(names(one)) for one in made) > 10


def test_what_a_process_left_unfinished_is_removed_when_it_is_old(made: Files) -> None:
    made.write(link(1), content(1))
    parts = [Path(made._path(link(1))).with_name(name) for name in ("old.part", "new.part")]
    for path, age in zip(parts, (files.OLD + 60, 60), strict=True):
        path.write_bytes(b"begun")
        os.utime(path, (time.time() - age,) * 2)
    made.look()
    assert [path.exists() for path in parts] == [False, True] and made.total == HEAD + SIZE


def test_folders_that_were_removed_are_made_again(made: Files) -> None:
    made.write(link(1), content(1))
    files.clear(made.folder)
    assert not made.has(link(1)) and not made.place.exists()
    made.write(link(1), content(1))
    made.read(link(1), blank())
    assert files.forms(made.folder)[0].model == ABOUT["model"]


def test_the_list_of_a_folder(made: Files, tmp_path: Path) -> None:
    assert [(one.pages, one.bytes) for one in files.forms(made.folder)] == [(0, 0)]
    for i in range(3):
        made.write(link(i), content(i))
        stamp(made, link(i), 100 + i)
    (made.folder / "other").mkdir()
    (found,) = files.forms(made.folder)
    assert found[1:] == ("/models/own", "float32, native", 3, 3 * (HEAD + SIZE), 102)
    assert [one.pages for one in files.clear(made.folder)] == [3] and files.forms(made.folder) == []
    assert (made.folder / "other").exists()
    (tmp_path / "open").mkdir(mode=0o755)
    for place, reason in ((tmp_path / "open", "others may enter"), (tmp_path / "none", "No such file")):
        with pytest.raises(CheckpointError, match=reason):
            files.forms(place)


# ---- processes that end or write at the same time

WRITER = """
import sys
from pathlib import Path
from redraft.kv.disk.files import Files, Link
folder, (first, count, size, room) = Path(sys.argv[1]), map(int, sys.argv[2:])
made = Files(folder, "f" * 32, size, room, b"secret", {})
sys.stdout.write("begun\\n"); sys.stdout.flush()
for i in range(first, first + count):
    made.write(Link(f"{i:032x}", "0" * 32), [memoryview(bytes([i % 251]) * (size // 100))] * 100)
"""


def writer(folder: Path, *numbers: int) -> subprocess.Popen[str]:
    """numbers: the first page, how many, the bytes of each, the room."""
    command = [sys.executable, "-c", WRITER, str(folder), *map(str, numbers)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def whole(folder: Path, size: int) -> list[int]:
    """The pages of the folder, all of which must be readable."""
    made = Files(folder, FORM, size, 10**9, b"secret", {})
    found = [one.link for one in files._entries(made.place)]
    for one in found:
        into = [memoryview(bytearray(size))]
        made.read(one, into)
        assert set(into[0]) == {int(one.name, 16) % 251}
    return sorted(int(one.name, 16) for one in found)


def test_a_writer_that_is_killed_leaves_whole_pages(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    folder.mkdir(mode=0o700)
    before = 0
    for turn in range(3):
        running = writer(folder, 1000 * turn, 300, 1_000_000, 10**9)
        assert running.stdout is not None and running.stdout.readline() == "begun\n"
        while len(list(files._entries(folder / FORM))) <= before:
            time.sleep(0.001)
        running.kill()
        running.wait()
        running.stdout.close()
        found = whole(folder, 1_000_000)
        assert len(found) > before
        before = len(found)


def test_two_processes_write_to_one_folder(tmp_path: Path) -> None:
    """The same pages, and with a bound that both reach."""
    folder = tmp_path / "kept"
    folder.mkdir(mode=0o700)
    for room, fewest in ((10**9, 60), (20 * 100_048, 10)):
        running = [writer(folder, first, 40, 100_000, room) for first in (0, 20)]
        for one in running:
            one.communicate()
        assert [one.returncode for one in running] == [0, 0]
        found = whole(folder, 100_000)
        assert len(found) >= fewest and (room == 10**9 or len(found) <= 23)
