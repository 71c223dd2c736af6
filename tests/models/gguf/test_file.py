"""Every tensor type bit-equal to `gguf.quants.dequantize`; damaged files give one line each, at once and without memory."""

from __future__ import annotations

import struct
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from redraft.errors import CheckpointError, RedraftError, Unsupported
from redraft.models import loader
from redraft.models.gguf import file
from redraft.models.gguf.weights import Gguf
from redraft.models.tokenizer import Tokenizer
from redraft.ops.arrays import BFLOAT16
from redraft.ops.torch_arrays import as_tensor
from tests import checkpoints
from tests.models.gguf import files

NAMED = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "MXFP4"]


def blocks(kind: Kind, rows: int, width: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Random bytes, so codes and scales of every kind, infinities and NaN among them."""
    numbers, size = gguf.GGML_QUANT_SIZES[kind]
    return np.random.default_rng(kind.value).integers(0, 256, (rows, width // numbers * size), dtype=np.uint8)


def bits(numbers: object) -> bytes:
    return np.ascontiguousarray(numbers, np.float32).tobytes()


def test_the_types_that_files_have_are_known() -> None:
    assert set(NAMED) <= set(file.kinds())


@pytest.mark.parametrize("name", file.kinds())
@pytest.mark.parametrize("shape", [(7, 256), (3, 2048), (1, 768)], ids=str)
def test_every_type_is_decoded_as_the_package_does(name: str, shape: tuple[int, int], tmp_path: Path) -> None:
    kind = Kind[name]
    data = blocks(kind, *shape)
    out = files.tensors(tmp_path / "m.gguf", ("a", data.view(np.float32) if kind == Kind.F32 else data, kind))
    found = Gguf(file.read(out))
    with np.errstate(all="ignore"):
        want = gguf.quants.dequantize(data, kind)
    assert found.tensors["a"].shape == shape and found.tensors["a"].dtype == name
    assert bits(found.read("a")) == bits(want)
    assert bits(found.read("a", slice(0, 1))) == bits(want[:1])
    assert bits(found.read("a", shape[0] - 1)) == bits(want[-1])
    rounded = as_tensor(found.read("a", dtype=BFLOAT16)).nan_to_num()
    assert torch.equal(rounded, torch.from_numpy(want).bfloat16().nan_to_num())


def test_long_tensors_are_decoded_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = blocks(Kind.Q4_1, 50, 64)
    found = Gguf(file.read(files.tensors(tmp_path / "m.gguf", ("a", data, Kind.Q4_1))))
    monkeypatch.setattr(file, "_CHUNK", 64 * 7)
    pieces = list(file.decode(found.records["a"], 3, 50))
    assert [(rows.start, rows.stop) for rows, _ in pieces] == [(3, 10), (10, 17), (17, 24), (24, 31), (31, 38), (38, 45), (45, 50)]
    with np.errstate(all="ignore"):
        want = gguf.quants.dequantize(data, Kind.Q4_1)
    assert bits(np.concatenate([numbers for _, numbers in pieces])) == bits(want[3:])
    assert bits(found.read("a", slice(10, 30))) == bits(want[10:30])


def test_a_stack_of_matrices(tmp_path: Path) -> None:
    data = np.random.default_rng(0).normal(size=(4, 3, 32)).astype(np.float32)
    found = Gguf(file.read(files.tensors(tmp_path / "m.gguf", ("a", data, Kind.F32), ("b", data[0, 0], Kind.F32))))
    assert np.array_equal(found.read("a"), data)
    assert np.array_equal(found.read("a", 2), data[2])
    assert np.array_equal(found.read("a", slice(1, 3)), data[1:3])
    assert np.array_equal(found.read("b"), data[0, 0]) and np.array_equal(found.read("b", slice(2, 5)), data[0, 0, 2:5])


def test_reading_needs_little_memory(tmp_path: Path) -> None:
    """One piece of numbers beside the result: the numbers of 16 MiB take less than twice as much at any time."""
    data = blocks(Kind.Q8_0, 4096, 2048)
    found = Gguf(file.read(files.tensors(tmp_path / "m.gguf", ("a", data, Kind.Q8_0))))
    del data
    tracemalloc.start()
    try:
        found.read("a", dtype=BFLOAT16)
        assert tracemalloc.get_traced_memory()[1] < 2 * 4096 * 2048 + 4 * 4 * file._CHUNK
    finally:
        tracemalloc.stop()


def test_a_header_in_use_is_read_once_and_again_after_a_change(tmp_path: Path) -> None:
    path = files.tensors(tmp_path / "m.gguf", ("a", np.zeros((2, 32), np.float32), Kind.F32))
    first = file.read(path)
    assert file.read(path) is first
    files.tensors(path, ("b", np.zeros((3, 32), np.float32), Kind.F32))
    assert list(file.read(path).records) == ["b"] and list(first.records) == ["a"]
    del first
    assert not [kept for kept in file._KEPT.values() if kept.path == path], "nobody uses it any more"


# ---- damaged files


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("whole")
    return files.write(checkpoints.tiny_llama(folder / "model"), folder / "m.gguf").read_bytes()


def opened(path: Path) -> None:
    loader.read(loader.inspect(path))


def refused(path: Path, data: bytes, error: type[RedraftError] = RedraftError) -> str:
    """The one line about a file, which comes at once and without much memory."""
    path.write_bytes(data)
    tracemalloc.start()
    begun = time.process_time()
    try:
        with pytest.raises(error) as caught:
            file.read(path)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    assert time.process_time() - begun < 30  # a loop over an absurd count would take hours
    text = str(caught.value)
    assert "\n" not in text and path.name in text and len(text) < 600
    return text


@pytest.mark.parametrize("tenth", range(10))
def test_files_that_are_cut(tenth: int, whole: bytes, tmp_path: Path) -> None:
    text = refused(tmp_path / "m.gguf", whole[: len(whole) * tenth // 10], CheckpointError)
    assert "ends within" in text or "is not whole" in text or "cannot hold" in text or "is empty" in text


def header(version: int = 3, tensors: int = 0, metadata: int = 0, rest: bytes = b"", magic: bytes = b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, metadata) + rest


def text(value: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if length is None else length) + value


def pair(key: bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: bytes = b"a", shape: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


PAD = bytes(4096)
HUGE = (1 << 64) - 1
DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "magic": (header(magic=b"GGML"), "is not a GGUF file: it begins with b'GGML', not b'GGUF'"),
    "version 1": (header(1), "GGUF version 1; known: 2, 3"),
    "version 4": (header(4), "GGUF version 4; known: 2, 3"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "a big-endian GGUF file"),
    "tensors": (header(tensors=HUGE), f"the number of tensors = {HUGE}: a file of 24 bytes cannot hold so many"),
    "metadata": (header(metadata=1 << 40), f"the number of metadata = {1 << 40}: a file of 24 bytes cannot hold"),
    "a long key": (header(metadata=1, rest=text(b"", HUGE) + PAD), f"key of {HUGE} bytes: at most 65535 are allowed"),
    "a long string": (header(metadata=1, rest=pair(b"k", 8, text(b"x", HUGE)) + PAD), "ends within 'k': 4"),
    "a key of no text": (header(metadata=1, rest=pair(b"\xff\xfe", 4, PAD)), "key at byte 32 is not UTF-8 text"),
    "a value of no type": (header(metadata=1, rest=pair(b"k", 13, PAD)), "metadata 'k' has type 13: 0 to 12 are known"),
    "an array of arrays": (header(metadata=1, rest=pair(b"k", 9, struct.pack("<IQ", 9, 1) + PAD)), "'k' is an array of arrays"),
    "an array of no type": (header(metadata=1, rest=pair(b"k", 9, struct.pack("<IQ", 99, 1) + PAD)), "'k' is an array of type 99"),
    "many numbers": (header(metadata=1, rest=pair(b"k", 9, struct.pack("<IQ", 0, HUGE) + PAD)), "ends within 'k'"),
    "many strings": (header(metadata=1, rest=pair(b"k", 9, struct.pack("<IQ", 8, HUGE) + PAD)), f"'k' has {HUGE} strings: at most"),
    "more strings": (header(metadata=1, rest=pair(b"k", 9, struct.pack("<IQ", 8, 4000) + PAD)), "ends within 'k', in string 512 of 4000"),
    "a string of no text": (header(metadata=1, rest=pair(b"k", 9, struct.pack("<IQ", 8, 1) + text(b"\xff")) + PAD), "string 0 is not"),
    "a key twice": (header(metadata=2, rest=pair(b"k", 0, b"1") * 2 + PAD), "metadata 'k' is there twice"),
    "a tensor twice": (header(tensors=2, rest=tensor() * 2 + PAD), "tensor 'a' is there twice"),
    "a long name": (header(tensors=1, rest=text(b"x" * 2000) + PAD), "a tensor name of 2000 bytes: at most 1024"),
    "no dimensions": (header(tensors=1, rest=tensor(shape=()) + PAD), "'a' has 0 dimensions: 1 to 4"),
    "many dimensions": (header(tensors=1, rest=text(b"a") + struct.pack("<I", 1 << 31) + PAD), f"'a' has {1 << 31} dimensions"),
    "a dimension of 0": (header(tensors=1, rest=tensor(shape=(32, 0)) + PAD), r"'a' has shape [0, 32]: 0 is not allowed"),
    "half a block": (header(tensors=1, rest=tensor(shape=(40, 2), kind=2) + PAD), "[2, 40]: a row of Q4_0 needs a multiple of 32"),
    "a huge tensor": (header(tensors=1, rest=tensor(shape=(1 << 62, 1 << 62, 32)) + PAD), "tensor 'a' is not whole: bytes"),
    "a far tensor": (header(tensors=1, rest=tensor(offset=1 << 63) + PAD), "tensor 'a' is not whole: bytes"),
    "a crooked tensor": (header(tensors=1, rest=tensor(offset=8) + PAD), "'a' has offset 8: a multiple of 32 is needed"),
    "tensors that overlap": (
        header(tensors=2, rest=tensor(shape=(64,)) + tensor(b"b", (8,), offset=32) + PAD), "tensors 'a' and 'b' overlap"
    ),
    "no type": (header(tensors=1, rest=tensor(kind=77) + PAD), "tensor 'a' has type number 77; known: F32, F16, Q4_0"),
    "a type of the past": (header(tensors=1, rest=tensor(kind=4) + PAD), "tensor 'a' has type number 4"),
    "a type that is not decoded": (header(tensors=1, rest=tensor(kind=9) + PAD), "tensor 'a' has type Q8_1; known"),
    "alignment 0": (header(metadata=1, rest=pair(b"general.alignment", 4, bytes(4)) + PAD), "general.alignment = 0: a power of two"),
    "alignment 3": (header(metadata=1, rest=pair(b"general.alignment", 4, b"\3\0\0\0") + PAD), "general.alignment = 3: a power"),
    "alignment x": (header(metadata=1, rest=pair(b"general.alignment", 8, text(b"x")) + PAD), "general.alignment = 'x': a power"),
    "a part of a set": (header(metadata=1, rest=pair(b"split.count", 2, b"\3\0") + PAD), "is a part of 3 files, but its name"),
    "a part of what": (header(metadata=1, rest=pair(b"split.count", 8, text(b"x")) + PAD), "split.count = 'x': must be an integer"),
    "no architecture": (header(rest=PAD), ""),
}  # fmt: skip


@pytest.mark.parametrize("what", [what for what in DAMAGED if what != "no architecture"])
def test_damaged_headers(what: str, tmp_path: Path) -> None:
    data, named = DAMAGED[what]
    assert named in refused(tmp_path / "m.gguf", data, Unsupported if "known: " in named or "endian" in named else RedraftError)


def test_a_header_without_an_architecture(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(DAMAGED["no architecture"][0])
    with pytest.raises(Unsupported, match="unknown architecture None; known: llama"):
        loader.inspect(tmp_path / "m.gguf")


def test_the_tensors_of_the_last_version_are_read(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(header(2, tensors=1, rest=tensor(shape=(8, 4)) + PAD))
    assert file.read(path).records["a"].shape == (4, 8)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_header_crashes(data: st.DataObject, whole: bytes, tmp_path: Path) -> None:
    """Some bytes of a whole file's header replaced, most often by counts and lengths that are absurd."""
    changed = bytearray(whole)
    end = len(whole) // 4
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, end))
        new = data.draw(st.one_of(st.binary(min_size=1, max_size=9), st.sampled_from([b"\xff" * 8, struct.pack("<Q", 1 << 40), bytes(8)])))
        changed[at : at + len(new)] = new
    del changed[data.draw(st.integers(len(whole) // 8, len(whole))) :]
    path = tmp_path / "m.gguf"
    path.write_bytes(changed)
    _one_line(lambda: opened(path))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rest=st.binary(max_size=300), tensors=st.integers(0, 12), metadata=st.integers(0, 20))
def test_no_bytes_crash(rest: bytes, tensors: int, metadata: int, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(header(3, tensors, metadata, rest + bytes(200)))
    _one_line(lambda: file.read(path))


WRONG_VALUES = ["x", "", -1, 0, 1 << 60, float("nan"), True, [], ["a", "b"], np.zeros(3, np.int32), np.zeros(0, np.float32)]


@pytest.mark.parametrize("value", WRONG_VALUES, ids=repr)
def test_no_value_of_metadata_crashes(value: object, whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(whole)
    found = file.read(path)
    extra = ["split.count", "general.sampling.temp", "general.sampling.mirostat", "llama.attention.causal", "llama.expert_count"]
    more = ["tokenizer.ggml.scores", "tokenizer.ggml.add_space_prefix", "llama.rope.scaling.type", "llama.rope.scaling.factor"]
    for key in [*found.fields, *extra, *more]:
        changed = replace(found, fields={**found.fields, key: value})
        monkeypatch.setattr(file, "read", lambda path, changed=changed: changed)
        _one_line(lambda: loader.inspect(path).defaults)
        _one_line(lambda: Tokenizer(path))


def _one_line(call: Callable[[], object]) -> None:
    line = ""
    try:
        call()
    except RedraftError as error:
        line = str(error)
    assert "\n" not in line
