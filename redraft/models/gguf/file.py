"""The GGUF format: metadata and tensor records of a file or of a split set, and the numbers of a tensor.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.

The package `gguf` gives the tensor types, the sizes of their blocks and their decoding. Its `GGUFReader` is not used: it makes numpy
objects for every string of the vocabulary (seconds and 150 MiB for 49,000 tokens), takes memory without end if an array claims 2^40
numbers, and accepts strings that are cut. The header is read here instead: every count, length and offset is checked against the file.
"""

from __future__ import annotations

import glob
import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from redraft.errors import CheckpointError, Unsupported, shown
from redraft.models.mapped import Mapped

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType as Kind

MAGIC, VERSIONS = b"GGUF", (2, 3)
SUFFIX = ".gguf"
_SPLIT = re.compile(r"(?P<stem>.*)-(?P<no>\d{5})-of-(?P<count>\d{5})\.gguf")

# the types of metadata: number in the file -> its format
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_ARRAYS = {kind: np.dtype(form) for kind, form in _SCALARS.items()}
_STRING, _ARRAY = 8, 9
_LEAST = {"metadata": 13, "tensors": 24}  # bytes of the smallest entry of each table
_LONGEST = {"key": 65_535, "tensor name": 1024}  # bytes
_STRINGS = 1 << 22  # strings in an array, at most: the largest vocabularies have 2^18 tokens and 2^19 merges
_DIMENSIONS = 4
_CHUNK = 1 << 21  # numbers decoded at once: 8 MiB in float32
_BLOCKS = 32  # blocks side by side in a row, which is how the package decodes fastest


class Record(NamedTuple):
    """A tensor of a file. shape: as in PyTorch, so the last dimension is contiguous; kind: its type; data: u8[rows, bytes of a row],
    mapped from the file, where rows is the product of all dimensions but the last."""

    file: Path
    name: str
    shape: tuple[int, ...]
    kind: Kind
    data: NDArray[np.uint8]


@dataclass(frozen=True)
class Contents:
    """What the headers of a file, or of a split set, say. path: the file, or the first of the set. fields: metadata by key, arrays of
    numbers as numpy arrays, others as lists. mapped: the files."""

    path: Path
    fields: dict[str, Any]
    records: dict[str, Record]
    mapped: tuple[Mapped, ...]

    def forget(self) -> None:
        """See Mapped."""
        for file in self.mapped:
            file.forget()


def first(path: Path) -> Path:
    """The first file of the split set that `path` belongs to, or `path` itself."""
    split = _SPLIT.fullmatch(path.name)
    return path.with_name(f"{split['stem']}-00001-of-{split['count']}{SUFFIX}") if split else path


def only(folder: Path) -> Path | None:
    """The GGUF file of a folder, or the first of its split set; None without one. CheckpointError if there are several."""
    found = sorted({first(file) for file in folder.glob(f"*{SUFFIX}")})
    if len(found) > 1:
        raise CheckpointError(f"{folder}: holds {len(found)} GGUF models: name one of them, such as {found[0].name}")
    return found[0] if found else None


def read(path: Path) -> Contents:
    """The headers of a file or of the split set that it belongs to. CheckpointError or Unsupported, one line each, names the file and
    what is wrong."""
    path = first(path)
    key = _state(path)
    if (found := _KEPT.get(key)) is None:
        found = _KEPT[key] = _whole(path)
    return found


_KEPT: WeakValueDictionary[Any, Contents] = WeakValueDictionary()  # what was read and is still in use, by the states of its files


def _state(path: Path) -> tuple[Any, ...]:
    """Path, inode, size and time of change of a file or of all files of a set."""
    split = _SPLIT.fullmatch(path.name)
    files = sorted(path.parent.glob(f"{glob.escape(split['stem'])}-*-of-{split['count']}{SUFFIX}")) if split else [path]
    try:
        return tuple((file, now.st_ino, now.st_size, now.st_mtime_ns) for file in files for now in [file.stat()])
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None


def _whole(path: Path) -> Contents:
    fields, records, one = _read(path)
    mapped = [one]
    split = _SPLIT.fullmatch(path.name)
    count = fields.get("split.count", 0)
    if type(count) is not int:
        raise CheckpointError(f"{path}: split.count = {shown(count)}: must be an integer")
    if count not in (0, 1) and split is None:
        raise CheckpointError(f"{path}: is a part of {count} files, but its name does not end in -00001-of-{count:05}{SUFFIX}")
    if split is None:
        return Contents(path, fields, records, tuple(mapped))
    if int(split["count"]) != count or fields.get("split.no") != 0:
        where = f"split.no = {shown(fields.get('split.no'))}, split.count = {shown(count)}"
        raise CheckpointError(f"{path}: {where}: 0 and {int(split['count'])} are expected by its name")
    for no in range(1, count):
        part = path.with_name(f"{split['stem']}-{no + 1:05}-of-{split['count']}{SUFFIX}")
        if not part.exists():
            raise CheckpointError(f"{path}: missing part {part.name}")
        own, more, one = _read(part)
        mapped.append(one)
        if own.get("split.no") != no:
            raise CheckpointError(f"{part}: split.no = {shown(own.get('split.no'))}: {no} is expected by its name")
        if both := sorted(set(records) & set(more)):
            raise CheckpointError(f"{part}: tensor {shown(both[0])} is in another part as well")
        records |= more
    if (total := fields.get("split.tensors.count", len(records))) != len(records):
        raise CheckpointError(f"{path}: split.tensors.count = {shown(total)}, but the parts hold {len(records)} tensors")
    return Contents(path, fields, records, tuple(mapped))


def decode(record: Record, begin: int = 0, end: int | None = None) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """The numbers of the rows from `begin` to `end`, piece by piece: (the rows of a piece, f32[rows, width]). They are those of
    `gguf.quants.dequantize`, bit for bit."""
    from gguf.quants import dequantize

    width, (_, size) = record.shape[-1], _block(record.kind)
    end = len(record.data) if end is None else end
    step = max(1, _CHUNK // width)
    for at in range(begin, end, step):
        rows = slice(at, min(at + step, end))
        packed = record.data[rows]
        blocks = packed.size // size
        # blocks are independent, so any number of them may form a row
        wide = math.gcd(blocks, _BLOCKS)
        with np.errstate(all="ignore"):  # a damaged file may hold any scale
            numbers = dequantize(np.ascontiguousarray(packed).reshape(-1, wide * size), record.kind)
        yield rows, np.require(numbers, np.float32, ["C", "W"]).reshape(-1, width)


@cache
def _block(kind: Kind) -> tuple[int, int]:
    """(numbers, bytes) of a block."""
    from gguf import GGML_QUANT_SIZES

    return GGML_QUANT_SIZES[kind]


@cache
def _kind(number: int) -> Kind | str:
    """The tensor type of a number, or its name if it cannot be decoded."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        return f"number {number}"
    try:
        with np.errstate(all="ignore"):
            dequantize(np.zeros((1, _block(kind)[1]), np.uint8), kind)
    except (KeyError, NotImplementedError):
        return kind.name
    return kind


def kinds() -> list[str]:
    """The names of the tensor types that can be read."""
    from gguf import GGMLQuantizationType

    return [one.name for one in GGMLQuantizationType if not isinstance(_kind(one.value), str)]


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Record], Mapped]:
    try:
        if not path.stat().st_size:
            raise CheckpointError(f"{path}: is empty")
        mapped = Mapped(path)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    return *_Header(path, mapped).read(), mapped


class _Header:
    """Reads the header of one file, from the beginning on."""

    def __init__(self, path: Path, mapped: Mapped) -> None:
        self.path, self.mapped, self.data, self.at = path, mapped, mapped.data, 0

    def read(self) -> tuple[dict[str, Any], dict[str, Record]]:
        if self._bytes(4, "the magic") != MAGIC:
            raise CheckpointError(f"{self.path}: is not a GGUF file: it begins with {bytes(self.data[:4])!r}, not {MAGIC!r}")
        version = self._number("<I", "the version")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            if swapped in VERSIONS:
                raise Unsupported(f"{self.path}: a big-endian GGUF file; only little-endian ones are read")
            raise Unsupported(f"{self.path}: GGUF version {version}; known: {', '.join(map(str, VERSIONS))}")
        tensors, pairs = self._count("tensors", "the number of tensors"), self._count("metadata", "the number of metadata")
        fields: dict[str, Any] = {}
        for _ in range(pairs):
            key = self._string("key", longest=_LONGEST["key"])
            if key in fields:
                raise CheckpointError(f"{self.path}: metadata {shown(key)} is there twice")
            fields[key] = self._value(key)
        found = [self._tensor() for _ in range(tensors)]
        return fields, self._records(found, self._alignment(fields))

    def _bytes(self, count: int, what: str) -> bytes:
        if count > len(self.data) - self.at:
            raise CheckpointError(f"{self.path}: ends within {what}: {len(self.data)} bytes, {self.at + count} are needed")
        self.at += count
        return self.data[self.at - count : self.at]

    def _number(self, form: str, what: str) -> Any:
        return struct.unpack(form, self._bytes(struct.calcsize(form), what))[0]

    def _count(self, table: str, what: str) -> int:
        count: int = self._number("<Q", what)
        if count * _LEAST[table] > len(self.data):
            raise CheckpointError(f"{self.path}: {what} = {count}: a file of {len(self.data)} bytes cannot hold so many")
        return count

    def _string(self, what: str, longest: int | None = None) -> str:
        length: int = self._number("<Q", what)
        if longest is not None and length > longest:
            raise CheckpointError(f"{self.path}: {what} of {length} bytes: at most {longest} are allowed")
        try:
            return self._bytes(length, what).decode("utf-8")
        except UnicodeDecodeError:
            raise CheckpointError(f"{self.path}: {what} at byte {self.at - length} is not UTF-8 text") from None

    def _value(self, key: str) -> Any:
        kind: int = self._number("<I", shown(key))
        if kind == _STRING:
            return self._string(shown(key))
        if kind == _ARRAY:
            return self._array(key)
        if kind not in _SCALARS:
            raise CheckpointError(f"{self.path}: metadata {shown(key)} has type {kind}: 0 to 12 are known")
        return self._number(_SCALARS[kind], shown(key))

    def _array(self, key: str) -> Any:
        kind, count = self._number("<I", shown(key)), self._number("<Q", shown(key))
        if kind == _STRING:
            if count > _STRINGS:
                raise CheckpointError(f"{self.path}: {shown(key)} has {count} strings: at most {_STRINGS} are allowed")
            return self._strings(shown(key), count)
        if kind not in _ARRAYS:
            what = "arrays" if kind == _ARRAY else f"type {kind}"
            raise CheckpointError(f"{self.path}: {shown(key)} is an array of {what}: strings, numbers and booleans are known")
        return np.frombuffer(self._bytes(count * _ARRAYS[kind].itemsize, shown(key)), _ARRAYS[kind])

    def _strings(self, what: str, count: int) -> list[str]:
        """As `_string` does, for the hundreds of thousands of strings of a vocabulary."""
        data, at, found, length = self.data, self.at, [], struct.Struct("<Q").unpack_from
        try:
            for _ in range(count):
                end = at + 8 + length(data, at)[0]
                if end > len(data):
                    raise struct.error
                found.append(data[at + 8 : end].decode("utf-8"))
                at = end
        except struct.error:
            raise CheckpointError(f"{self.path}: ends within {what}, in string {len(found)} of {count}") from None
        except UnicodeDecodeError:
            raise CheckpointError(f"{self.path}: {what}: string {len(found)} is not UTF-8 text") from None
        self.at = at
        return found

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """(name, dimensions with the contiguous one first, type, offset)"""
        name = self._string("a tensor name", longest=_LONGEST["tensor name"])
        count: int = self._number("<I", shown(name))
        if not 1 <= count <= _DIMENSIONS:
            raise CheckpointError(f"{self.path}: tensor {shown(name)} has {count} dimensions: 1 to {_DIMENSIONS} are allowed")
        dimensions = struct.unpack(f"<{count}Q", self._bytes(8 * count, shown(name)))
        return name, dimensions, self._number("<I", shown(name)), self._number("<Q", shown(name))

    def _alignment(self, fields: dict[str, Any]) -> int:
        alignment = fields.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1) or alignment > 1 << 20:
            raise CheckpointError(f"{self.path}: general.alignment = {shown(alignment)}: a power of two up to {1 << 20} is needed")
        return alignment

    def _records(self, found: list[tuple[str, tuple[int, ...], int, int]], alignment: int) -> dict[str, Record]:
        start = -(-self.at // alignment) * alignment
        records: dict[str, Record] = {}
        spans: list[tuple[int, int, str]] = []
        for name, dimensions, number, offset in found:
            if name in records:
                raise CheckpointError(f"{self.path}: tensor {shown(name)} is there twice")
            kind = _kind(number)
            if isinstance(kind, str):
                raise Unsupported(f"{self.path}: tensor {shown(name)} has type {kind}; known: {', '.join(kinds())}")
            (numbers, size), width, rows = _block(kind), dimensions[0], math.prod(dimensions[1:])
            shape = tuple(reversed(dimensions))
            if not all(dimensions) or width % numbers:
                needed = f"a row of {kind.name} needs a multiple of {numbers} numbers" if all(dimensions) else "0 is not allowed"
                raise CheckpointError(f"{self.path}: tensor {shown(name)} has shape {list(shape)}: {needed}")
            length, begin = rows * (width // numbers) * size, start + offset
            if offset % alignment:
                raise CheckpointError(f"{self.path}: tensor {shown(name)} has offset {offset}: a multiple of {alignment} is needed")
            if begin + length > len(self.data):
                where = f"bytes {begin} to {begin + length} of a file of {len(self.data)}"
                raise CheckpointError(f"{self.path}: tensor {shown(name)} is not whole: {where}")
            data = self.mapped.array(np.uint8, (rows, length // rows), begin)
            records[name] = Record(self.path, name, shape, kind, data)
            spans.append((begin, begin + length, name))
        spans.sort()
        for (_, end, name), (begin, _, other) in pairwise(spans):
            if begin < end:
                raise CheckpointError(f"{self.path}: tensors {shown(name)} and {shown(other)} overlap")
        return records
