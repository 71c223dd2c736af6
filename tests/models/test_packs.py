"""Packed weights that are kept on disk: the same bits, no file of another checkpoint, and no fault of the cache that a model notices."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import is_dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from redraft import LLM, registry
from redraft.errors import CheckpointError, InvalidInput
from redraft.models import loader, mapped, packs
from redraft.ops import library
from redraft.ops.backend import Weights
from redraft.ops.native import NativeOps, Packed
from tests import checkpoints
from tests.models.gguf import files

if why_not := library.why_not():
    pytest.skip(f"no native kernels: {why_not}", allow_module_level=True)

WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128}  # the weights take more than what Mapped.state hashes
AFTER = 60.0  # seconds; a file that was made now counts as settled


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the cache, for models of any size and age."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("REDRAFT_CACHE", raising=False)
    monkeypatch.delenv(packs.VARIABLE, raising=False)
    monkeypatch.setattr(packs, "LEAST", 0)
    monkeypatch.setattr(mapped, "SETTLED", -AFTER)
    return tmp_path / "cache" / "redraft" / "weights"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return checkpoints.tiny_llama(tmp_path / "model", **WIDE)


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The checkpoints that were read and packed since, not taken from the cache."""
    seen, parts = [], loader.parts

    def counted(checkpoint: loader.Checkpoint, *rest: Any) -> loader.Parts:
        seen.append(checkpoint.path)
        return parts(checkpoint, *rest)

    monkeypatch.setattr(loader, "parts", counted)
    return seen


def inspected(path: Path, quant: str | None = None, dtype: str = "bfloat16") -> loader.Checkpoint:
    return loader.inspect(path, dtype, quant=registry.create("quant", quant) if quant else None)


def read(path: Path, quant: str | None = "int8", room: int | None = None) -> Weights:
    checkpoint = inspected(path, quant)
    return packs.read(checkpoint, NativeOps(checkpoint.dtype), room)


def arrays(value: Any, at: str = "") -> dict[str, Any]:
    """All arrays of weights, and the numbers of packed ones, by their place."""
    if isinstance(value, np.ndarray):
        return {at: value}
    own = vars(value) if is_dataclass(value) else value._asdict() if hasattr(value, "_asdict") else value
    if isinstance(own, tuple):
        own = dict(enumerate(own))
    if not isinstance(own, dict):
        return {}
    found = {} if not isinstance(value, Packed) else {f"{at}.{name}": getattr(value.c, name) for name, *_ in value.c._fields_[-7:]}
    for name, part in own.items():
        found |= arrays(part, f"{at}.{name}")
    return found


def same(one: Weights, other: Weights) -> bool:
    ours, theirs = arrays(one), arrays(other)
    assert len(ours) > 20 and ours.keys() == theirs.keys()

    def bits(x: Any) -> Any:
        return (x.dtype, x.shape, x.tobytes()) if isinstance(x, np.ndarray) else x

    return all(bits(ours[name]) == bits(theirs[name]) for name in ours)


def the(cache: Path) -> Path:
    """The only file."""
    (found,) = cache.iterdir()
    return found


def edited(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes the header of a file, with a checksum that is right."""
    data = path.read_bytes()
    length = int.from_bytes(data[8:16], "little")
    begin = -(-(48 + length) // 64) * 64
    header = json.loads(data[48 : 48 + length])
    change(header)
    text = json.dumps(header).encode()
    whole = data[:8] + len(text).to_bytes(8, "little") + hashlib.sha256(text).digest() + text
    path.write_bytes(whole + bytes(-len(whole) % 64) + data[begin:])


# ---- the same weights

FORMS: dict[str, tuple[str, str | None, Kind | None]] = {  # family, quantization, and the type of a GGUF file
    "plain": ("llama2", None, None),
    "tied": ("qwen3", None, None),
    "biases, int8": ("qwen2", "int8", None),
    "outliers": ("llama2", "int8:outliers=3", None),
    "int4": ("llama2", "int4:head=int4", None),
    "large norms": ("gemma3", "int4:group=32", None),
    "experts": ("qwen3-moe", "int8", None),
    "sinks": ("gpt-oss", None, None),
    "GGUF, decoded": ("llama2", None, Kind.Q4_1),
    "GGUF, Q4_1": ("llama2", "stored", Kind.Q4_1),
    "GGUF, Q8_0": ("llama2", "stored", Kind.Q8_0),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_same_bits(form: str, tmp_path: Path, cache: Path, packed: list[Path]) -> None:
    family, quant, kind = FORMS[form]
    path = checkpoints.tiny_llama(tmp_path / "model", family=family, **WIDE)
    if kind is not None:
        path = files.write(path, tmp_path / "model.gguf", kind)
    first = read(path, quant)
    assert the(cache).suffix == ".weights" and packed == [path]
    again = read(path, quant)
    assert packed == [path], "the second time nothing is read"
    assert same(first, again)
    found = {name: array for name, array in arrays(again).items() if isinstance(array, np.ndarray)}
    assert not any(array.flags.writeable or array.ctypes.data % packs.LINE for array in found.values())


def test_columns_in_groups_that_no_kernel_reads_are_not_kept(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NativeOps, "kept", lambda self, weights: None)
    assert read(folder).bytes > 0
    assert not list(cache.iterdir())


@pytest.mark.parametrize("options", [{}, {"quant": "int4"}, {"quant": "int8", "draft": "draft-model"}], ids=str)
def test_the_same_texts(options: dict[str, Any], folder: Path, cache: Path, packed: list[Path]) -> None:
    own = {"draft": "token-recycling", "draft_model": str(folder), "cache_memory": 1 << 22, **options}

    def texts(**more: Any) -> list[list[int]]:
        llm = LLM(str(folder), **own, **more)
        outputs = llm.generate(["once upon a time", "def f(x):"], temperature=0.7, seed=3, max_tokens=24)
        return [one.outputs[0].token_ids for one in outputs]

    plain = texts(weight_cache=0)
    assert not cache.exists()
    packed.clear()
    assert texts() == plain and packed
    packed.clear()
    assert texts() == plain and not packed


def test_other_forms_have_other_files(folder: Path, cache: Path, packed: list[Path]) -> None:
    for quant in ("int8", "int4", "int4:group=32", None):
        read(folder, quant)
    packs.read(inspected(folder, dtype="float32"), NativeOps("float32"))
    assert len(list(cache.iterdir())) == len(packed) == 5
    forms = "bfloat16", "float32", "int4 bfloat16", "int4:group=32 bfloat16", "int8 bfloat16"
    isa = NativeOps("float32").layout
    assert sorted(one.form for one in packs.entries()) == sorted(f"{form}, {isa}" for form in forms)
    assert {one.model for one in packs.entries()} == {str(folder)}


def test_each_instruction_set_has_a_file(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read(folder)
    monkeypatch.setattr(NativeOps, "layout", "another")
    read(folder)
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("backend", ["torch", "numpy"])
def test_backends_that_pack_nothing_need_no_cache(backend: str, folder: Path, cache: Path) -> None:
    packs.read(inspected(folder), registry.backend(backend)("bfloat16"))
    assert not cache.exists()


# ---- another checkpoint


def change(file: Path) -> None:
    """A number in the middle of the file, which keeps its size and time."""
    status, data = file.stat(), bytearray(file.read_bytes())
    assert len(data) > 3 * mapped.ENDS
    data[len(data) // 8 * 4 + 3] ^= 1  # in the exponent of a float32 number
    file.write_bytes(data)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def swap(file: Path) -> None:
    """Another file in its place, of the same size and time."""
    other = file.with_name("other")
    shutil.copy(file, other)
    change(other)
    shutil.copystat(file, other)
    other.replace(file)


@pytest.mark.parametrize("how", [change, swap])
@pytest.mark.parametrize("form", ["folder", "file"])
def test_a_changed_checkpoint_is_packed_again(
    form: str, how: Callable[[Path], None], folder: Path, tmp_path: Path, cache: Path, packed: list[Path]
) -> None:
    path = files.write(folder, tmp_path / "model.gguf") if form == "file" else folder
    before = read(path)
    how(path if form == "file" else folder / "model.safetensors")
    after = read(path)
    assert len(packed) == 2 and not same(before, after)
    assert the(cache), "the file of the old one is replaced"
    assert same(after, read(path)) and len(packed) == 2


def test_a_checkpoint_that_changes_while_it_is_read_is_not_kept(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = loader.parts

    def slow(*given: Any) -> loader.Parts:
        found = parts(*given)
        change(folder / "model.safetensors")
        return found

    monkeypatch.setattr(loader, "parts", slow)
    read(folder)
    assert not list(cache.iterdir())


def test_a_checkpoint_that_just_changed_is_not_kept(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped, "SETTLED", AFTER)
    read(folder)
    assert not list(cache.iterdir())


def test_the_file_that_was_opened_decides(folder: Path, packed: list[Path]) -> None:
    before = read(folder)
    opened = inspected(folder, "int8")
    swap(folder / "model.safetensors")
    assert same(before, packs.read(opened, NativeOps(opened.dtype))), "the old file is still mapped"
    assert len(packed) == 1
    assert not same(before, read(folder)) and len(packed) == 2


@pytest.mark.parametrize("what", ["code", "kernels", "layout", "spec", "stored"])
def test_another_way_to_pack(what: str, folder: Path, monkeypatch: pytest.MonkeyPatch, packed: list[Path]) -> None:
    read(folder)
    if what == "code":
        monkeypatch.setattr(packs.identity, "code", lambda: "another")
    elif what == "kernels":
        monkeypatch.setattr(library, "fingerprint", lambda: "another")
    elif what == "layout":
        monkeypatch.setattr(NativeOps, "layout", "another")
    checkpoint = inspected(folder, "int8")
    if what == "spec":
        object.__setattr__(checkpoint.spec, "context", 3)
    elif what == "stored":
        object.__setattr__(checkpoint, "stored", {"group_size": 64})
    packs.read(checkpoint, NativeOps(checkpoint.dtype))
    assert len(packed) == 2


# ---- damaged and foreign files

LENGTHS = (0, 1, 7, 8, 15, 16, 47, 48, 49, 2000, -10_000, -65, -64, -1)


@pytest.mark.parametrize("length", LENGTHS)
def test_a_file_that_is_cut(length: int, folder: Path, cache: Path, packed: list[Path]) -> None:
    before = read(folder)
    whole = the(cache).read_bytes()
    the(cache).write_bytes(whole[:length])
    assert same(before, read(folder)) and len(packed) == 2
    assert the(cache).read_bytes() == whole, "it is written anew"
    assert same(before, read(folder)) and len(packed) == 2


@pytest.mark.parametrize("at", [0, 7, 8, 14, 16, 47, 48, 60, 3000])
def test_a_byte_of_the_header_is_flipped(at: int, folder: Path, cache: Path, packed: list[Path]) -> None:
    before = read(folder)
    whole = bytearray(the(cache).read_bytes())
    assert at < 48 + int.from_bytes(whole[8:16], "little")
    whole[at] ^= 1
    the(cache).write_bytes(whole)
    assert same(before, read(folder)) and len(packed) == 2


def longer(header: dict[str, Any]) -> None:
    header["bytes"] += 64


def key(header: dict[str, Any]) -> None:
    header["key"] = "0" * 64


def panels(header: dict[str, Any]) -> None:
    header["linears"]["head"]["numbers"]["outs"] += 64


def place(header: dict[str, Any]) -> None:
    header["linears"]["head"]["arrays"]["panels"][2] = header["bytes"] - 64


def kind(header: dict[str, Any]) -> None:
    header["tensors"]["final_norm.weight"][0] = "object"


def missing(header: dict[str, Any]) -> None:
    del header["tensors"]["final_norm.weight"]


def field(header: dict[str, Any]) -> None:
    del header["linears"]["head"]["numbers"]["per"]


def empty(header: dict[str, Any]) -> None:
    header.clear()


@pytest.mark.parametrize("change", [longer, key, panels, place, kind, missing, field, empty])
def test_a_header_that_does_not_fit(change: Callable[[dict[str, Any]], Any], folder: Path, cache: Path, packed: list[Path]) -> None:
    before = read(folder)
    edited(the(cache), lambda header: None)
    read(folder)
    assert len(packed) == 1, "the checksum is right"
    edited(the(cache), change)
    assert same(before, read(folder)) and len(packed) == 2


@pytest.mark.parametrize("what", ["folder", "link", "pipe", "text"])
def test_something_else_in_its_place(what: str, folder: Path, cache: Path, packed: list[Path]) -> None:
    before = read(folder)
    path = the(cache)
    moved = path.rename(cache.parent / "moved")
    make: dict[str, Callable[[], Any]] = {
        "folder": path.mkdir,
        "link": lambda: path.symlink_to(moved),
        "pipe": lambda: os.mkfifo(path),
        "text": lambda: path.write_text("not weights"),
    }
    make[what]()
    assert same(before, read(folder)) and len(packed) == 2
    assert len(packs.entries()) == 1
    assert same(before, read(folder)) and len(packed) == 2 + (what == "folder"), "a folder is not replaced"


def warned(caplog: pytest.LogCaptureFixture) -> int:
    return sum(record.levelno >= logging.WARNING for record in caplog.records)


def test_modes(folder: Path, cache: Path) -> None:
    before = os.umask(0)
    try:
        read(folder)
    finally:
        os.umask(before)
    assert the(cache).stat().st_mode & 0o777 == 0o600
    assert cache.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_may_write(mode: int, folder: Path, cache: Path, packed: list[Path], caplog: pytest.LogCaptureFixture) -> None:
    before = read(folder)
    the(cache).chmod(mode)
    assert same(before, read(folder)) and len(packed) == 2
    assert warned(caplog) == 1 and str(the(cache)) in caplog.text
    assert the(cache).stat().st_mode & 0o777 == 0o600, "it is written anew"


def test_a_file_of_another_user(
    folder: Path, cache: Path, packed: list[Path], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = read(folder)
    user = os.geteuid()
    monkeypatch.setattr(packs, "_folder", lambda **_: cache)
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    assert same(before, read(folder)) and len(packed) == 2
    assert warned(caplog) == 1 and "must be this user's" in caplog.text


@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_a_folder_that_others_may_write(mode: int, folder: Path, cache: Path, packed: list[Path], caplog: pytest.LogCaptureFixture) -> None:
    before = read(folder)
    cache.chmod(mode)
    assert same(before, read(folder)) and len(packed) == 2
    assert warned(caplog) == 1 and str(cache) in caplog.text


def test_a_folder_of_another_user(folder: Path, packed: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    before = read(folder)
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    assert same(before, read(folder)) and len(packed) == 2
    assert packs.entries() == []


# ---- no room, no folder


def test_no_cache(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read(folder, room=0)
    assert not cache.exists()
    monkeypatch.setenv(packs.VARIABLE, "0")
    read(folder)
    assert not cache.exists()
    monkeypatch.setenv(packs.VARIABLE, "1kb")
    read(folder)
    assert not list(cache.iterdir())
    monkeypatch.setenv(packs.VARIABLE, "1GiB")
    read(folder)
    assert the(cache)
    monkeypatch.setenv(packs.VARIABLE, "much")
    with pytest.raises(InvalidInput, match=r"REDRAFT_WEIGHT_CACHE = 'much': a whole number of bytes, or a size in KB.*"):
        read(folder)
    monkeypatch.setenv(packs.VARIABLE, "-1")
    with pytest.raises(InvalidInput, match=r"REDRAFT_WEIGHT_CACHE = '-1': "):
        read(folder)


def test_small_models_are_not_kept(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packs, "LEAST", 1 << 40)
    read(folder)
    assert not cache.exists()


def full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("what", ["tempfile.mkstemp", "os.replace", "shutil.disk_usage", "os.fdopen"])
def test_a_folder_that_cannot_be_written(what: str, folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, name = what.split(".")
    monkeypatch.setattr(getattr(packs, module), name, full)
    assert same(read(folder), read(folder, room=0))
    assert not list(cache.iterdir()), "nothing is left"


def test_an_interrupted_write_leaves_nothing(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        assert the(cache).suffix == ".part"
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        read(folder)
    assert not list(cache.iterdir())


def test_no_folder(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = read(folder, room=0)
    cache.parent.parent.write_text("a file is where the folder would be")
    assert same(plain, read(folder)) and packs.entries() == packs.clear() == []

    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", none)
    assert same(plain, read(folder)) and packs.entries() == packs.clear() == []


def test_a_disk_that_is_nearly_full(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read(folder)
    size = the(cache).stat().st_size
    the(cache).unlink()
    for free, kept in ((2 * size - 1, 0), (2 * size, 1)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        read(folder)
        assert len(list(cache.iterdir())) == kept


def test_the_files_used_longest_ago_make_room(tmp_path: Path, cache: Path, packed: list[Path]) -> None:
    paths = [checkpoints.tiny_llama(tmp_path / name, **WIDE) for name in "abc"]
    for i, path in enumerate(paths[:2]):
        read(path)
        os.utime(next(one.path for one in packs.entries() if one.model == str(path)), (1000 + i, 1000 + i))
    size = max(one.bytes for one in packs.entries())
    assert [one.model for one in packs.entries()] == [str(path) for path in paths[1::-1]]
    read(paths[0])  # so that b is the one that was used longest ago
    assert len(packed) == 2
    read(paths[2], room=2 * size)
    assert {one.model for one in packs.entries()} == {str(paths[0]), str(paths[2])}
    read(paths[1], room=size - 1)
    assert {one.model for one in packs.entries()} == {str(paths[0]), str(paths[2])}, "what does not fit removes nothing"
    read(paths[1], room=size)
    assert [one.model for one in packs.entries()] == [str(paths[1])]


def test_a_start_that_writes_nothing_keeps_within_the_limit_too(tmp_path: Path, cache: Path, packed: list[Path]) -> None:
    paths = [checkpoints.tiny_llama(tmp_path / name, **WIDE) for name in "ab"]
    for path in paths:
        read(path)
    size = max(one.bytes for one in packs.entries())
    read(paths[0], room=size)
    assert len(packed) == 2 and [one.model for one in packs.entries()] == [str(paths[0])]
    found = read(paths[0], room=size - 1)
    assert len(packed) == 2 and packs.entries() == [] and same(found, read(paths[0], room=0))


def test_nothing_makes_room_for_what_the_disk_cannot_hold(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [checkpoints.tiny_llama(tmp_path / name, **WIDE) for name in "ab"]
    read(paths[0])
    size = max(one.bytes for one in packs.entries())
    for free, kept in ((size - 1, paths[0]), (size, paths[1])):  # the file that goes leaves `size` bytes
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        read(paths[1], room=size)
        assert [one.model for one in packs.entries()] == [str(kept)]


def test_a_header_of_any_content_is_no_failure(folder: Path, cache: Path, packed: list[Path]) -> None:
    plain = read(folder)
    text = b"[" * 200_000
    the(cache).write_bytes(packs.MAGIC + len(text).to_bytes(8, "little") + hashlib.sha256(text).digest() + text)
    assert [one.form for one in packs.entries()] == [""]
    assert same(plain, read(folder)) and len(packed) == 2


def test_a_folder_that_cannot_be_listed_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.mkdir(parents=True, mode=0o700)

    def refused(_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(packs, "_files", refused)
    for call in (packs.entries, packs.clear):
        with pytest.raises(CheckpointError, match=r"weights: cannot be read: Permission denied$"):
            call()


def test_a_file_where_the_folder_would_be(folder: Path, cache: Path) -> None:
    cache.parent.mkdir(parents=True)
    cache.touch(0o600)
    assert packs.entries() == [] and same(read(folder), read(folder, room=0))


def test_a_file_that_is_written_anew_is_not_counted_twice(folder: Path, tmp_path: Path, cache: Path) -> None:
    other = checkpoints.tiny_llama(tmp_path / "other", **WIDE)
    read(other)
    read(folder)
    size = sum(one.bytes for one in packs.entries())
    change(folder / "model.safetensors")
    read(folder, room=size)
    assert len(packs.entries()) == 2


def test_parts_that_nobody_writes_are_removed(folder: Path, cache: Path) -> None:
    cache.mkdir(parents=True, mode=0o700)
    young, old = cache / "young.part", cache / "old.part"
    for path in (young, old):
        path.write_bytes(b"1234")
    os.utime(old, (1000, 1000))
    (cache / "not ours").touch()
    read(folder)
    assert {path.suffix for path in cache.iterdir()} == {".weights", ".part", ""} and not old.exists()
    assert len(packs.clear()) == 2
    assert [path.name for path in cache.iterdir()] == ["not ours"]


WRITER = """
import sys, time
from pathlib import Path
from redraft import registry
from redraft.models import loader, mapped, packs
from redraft.ops.native import NativeOps
packs.LEAST, mapped.SETTLED = 0, -60
replace = packs.os.replace
def together(*names):
    Path(sys.argv[2]).joinpath(sys.argv[3]).touch()
    until = time.monotonic() + 300
    while len(list(Path(sys.argv[2]).iterdir())) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    replace(*names)
packs.os.replace = together
checkpoint = loader.inspect(Path(sys.argv[1]), "bfloat16", quant=registry.create("quant", "int8"))
packs.read(checkpoint, NativeOps(checkpoint.dtype))
"""


def test_two_processes_write_at_once(folder: Path, tmp_path: Path, cache: Path, packed: list[Path]) -> None:
    ready = tmp_path / "ready"
    ready.mkdir()
    root = Path(__file__).parents[2]
    both = [subprocess.Popen([sys.executable, "-c", WRITER, str(folder), str(ready), name], cwd=root) for name in "ab"]
    assert [one.wait(600) for one in both] == [0, 0]
    assert len(list(ready.iterdir())) == 2, "both wrote"
    assert the(cache).suffix == ".weights"
    found = read(folder)
    assert not packed
    assert same(found, read(folder, room=0))


def test_a_file_in_use_may_be_removed(folder: Path, cache: Path, packed: list[Path]) -> None:
    read(folder)
    found = read(folder)
    assert len(packed) == 1
    (removed,) = packs.clear()
    assert removed.model == str(folder) and not list(cache.iterdir())
    assert same(found, read(folder, room=0))
