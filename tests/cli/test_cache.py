"""`redraft cache`: what is kept, in 80 columns, and what clear removes."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from redraft.kv.disk.pages import _end as at_exit
from redraft.models import packs
from tests.cli.conftest import Ran


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("REDRAFT_CACHE", raising=False)
    monkeypatch.delenv("COLUMNS")
    return tmp_path / "redraft" / "weights"


def keep(cache: Path, name: str, size: int, used: int, **header: str) -> None:
    """A file of the cache without arrays."""
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    text = json.dumps({"bytes": size, **header}).encode()
    whole = packs.MAGIC + len(text).to_bytes(8, "little") + hashlib.sha256(text).digest() + text
    path = cache / f"{name}.weights"
    path.write_bytes(whole + bytes(-len(whole) % packs.LINE + size))
    path.chmod(0o600)
    os.utime(path, (used, used))


def test_the_list(redraft: Callable[..., Ran], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    keep(cache, "a", 5 << 20, 86400, model="/models/first", form="int4 bfloat16")
    keep(cache, "b", 1 << 10, 2 * 86400, model=f"/models/{'long/' * 30}name", form="bfloat16")
    keep(cache, "c", 0, 0, model="/models/two\nlines", form="int8 bfloat16")
    (cache / "d.weights").write_bytes(b"cut")
    os.utime(cache / "d.weights", (3 * 86400, 3 * 86400))
    code, out, err = redraft("cache")
    assert (code, err) == (0, "")
    *lines, total = out.splitlines()
    assert lines[0].split() == ["last", "used", "size", "form", "model"]
    assert [line[:10] for line in lines[1:]] == ["1970-01-04", "1970-01-03", "1970-01-02", "1970-01-01"]
    assert lines[1].split()[4:] == ["damaged", "d.weights"]
    assert lines[2].split()[4] == "bfloat16" and lines[2].split()[5].startswith("...") and lines[2].endswith("/name")
    assert lines[3].split()[2:] == ["5.0", "MiB", "int4", "bfloat16", "/models/first"]
    assert lines[4].endswith("'/models/two\\nlines'")
    assert max(map(len, lines)) == 80
    assert total == "4 files, 5.0 MiB"


def test_clear(redraft: Callable[..., Ran], cache: Path) -> None:
    assert redraft("cache") == (0, "0 files, 0 KiB\n", "")
    assert not cache.exists()
    keep(cache, "a", 3 << 20, 1000, model="/models/first", form="int4 bfloat16")
    (cache / "other").touch()
    assert redraft("cache", "clear") == (0, "removed 1 file, 3.0 MiB\n", "")
    assert [path.name for path in cache.iterdir()] == ["other"]
    assert redraft("cache", "clear") == (0, "removed 0 files, 0 KiB\n", "")


def test_what_it_does_not_know(redraft: Callable[..., Ran], cache: Path) -> None:
    keep(cache, "a", 0, 1000, model="/models/first", form="int4 bfloat16")
    assert redraft("cache", "clean") == (2, "", "error: cache 'clean': 'clear' is allowed, or nothing\n")
    assert len(list(cache.iterdir())) == 1


def test_the_limit_is_checked(redraft: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, err = redraft("generate", "--weight-cache", "much")
    assert code == 2 and err.startswith("error: --weight-cache = 'much': a whole number of bytes, or a size in KB")
    monkeypatch.setenv("REDRAFT_WEIGHT_CACHE", "much")
    code, _, err = redraft("generate", "-p", "x", "--max-tokens", "1")
    assert code == 2 and err.startswith("error: REDRAFT_WEIGHT_CACHE = 'much': a whole number of bytes, or a size in KB")


# ---- prefixes in a folder


def test_prefixes_of_a_folder(redraft: Callable[..., Ran], tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    words = ("generate", "-p", "one two three " * 20, "--max-tokens", "20", "--temperature", "0", "--prefix-cache-dir", str(folder))
    assert redraft(*words)[0] == 0
    at_exit()
    code, out, err = redraft("cache", "--prefix-cache-dir", str(folder))
    assert (code, err) == (0, "")
    head, line, total = out.splitlines()
    assert head.split() == ["last", "used", "size", "form", "model"]
    assert "bfloat16, native" in line and line.endswith("redraft/embedded/target") and len(line) <= 80
    pages = int(total.split()[0])
    assert pages > 1 and total.split()[1] == "pages,"
    assert redraft("cache", "clear", "--prefix-cache-dir", str(folder))[1].startswith(f"removed {pages} pages, ")
    assert redraft("cache", "--prefix-cache-dir", str(folder)) == (0, "0 pages, 0 KiB\n", "")


def test_a_folder_of_prefixes_that_is_none(redraft: Callable[..., Ran], tmp_path: Path) -> None:
    assert redraft("cache", "--prefix-cache-dir", str(tmp_path / "none"))[0] == 1
    (tmp_path / "open").mkdir(mode=0o755)
    code, out, err = redraft("cache", "clear", "--prefix-cache-dir", str(tmp_path / "open"))
    assert (code, out) == (1, "") and "others may enter the folder" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prefix-cache-size", "1GB"], "error: CacheConfig: prefix_cache_size is that of a folder: it needs prefix_cache_dir\n"),
        (["--prefix-cache-dir", "x", "--no-prefix-sharing"], "error: CacheConfig: prefix_cache_dir keeps shared prefixes: it needs"),
        (["--prefix-cache-dir", "x", "--prefix-cache-size", "much"], "error: --prefix-cache-size = 'much': a whole number of bytes"),
    ],
)
def test_options_of_prefixes_are_checked(redraft: Callable[..., Ran], words: list[str], message: str) -> None:
    code, _, err = redraft("generate", *words)
    assert code == 2 and err.startswith(message)
