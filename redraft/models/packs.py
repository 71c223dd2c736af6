"""A cache of packed weights on disk. The second start of a model maps them, and neither reads nor packs anything.

There is one file for each checkpoint, form of its weights (quantization and dtype) and instruction set, for any number of threads. Its
header has a key of all that decides the arrays. A file with another key is not used but written anew. The key covers

- the content of the checkpoint, by the state of its files (see Mapped.state). A hash of all bytes would take as long as what the cache
  saves, so it is made only where times say nothing; a hash that is remembered for a state is no safer than the state. The state is taken
  from the open files, whose bytes are read. Packed weights are written only if the checkpoint was not changed meanwhile, nor shortly
  before. What is not noticed: a program that maps a checkpoint and writes to this memory while models start;
- what is made of it: the spec, the quantization and the dtype;
- what makes it: the compiled kernels, the modules that read, quantize and pack, and the versions of the libraries that decode.

A file is used only if it is this user's and nobody else can write it. It is checked by its length and by a checksum of its header, not by
one of all its bytes. It is written under another name and then renamed, so no process sees a part of it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import Any, NamedTuple

import numpy as np

from redraft import kept, registry
from redraft.config import ModelConfig
from redraft.errors import CheckpointError, InvalidInput
from redraft.models import identity, loader
from redraft.models.mapped import Mapped
from redraft.ops import library
from redraft.ops.arrays import BFLOAT16, Numbers
from redraft.ops.backend import Backend, Feature, Weights

log = logging.getLogger(__name__)

ROOM = 8 << 30  # bytes of all files, if nothing else is set
VARIABLE = "REDRAFT_WEIGHT_CACHE"
LEAST = 32 << 20  # bytes of weights; fewer are packed in less time than it takes to start
SUFFIX, PART = ".weights", ".part"
MAGIC = b"redraft1"  # the last character is the version of the format
LINE = 64  # bytes; arrays begin at a multiple of it
OLD = 3600  # seconds after which a file that is not whole is nobody's
OTHERS = 0o022  # permissions that let others write
DAMAGED = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)  # what files with any content may raise
START = len(MAGIC) + 8 + 32  # bytes before the header: magic, length, SHA-256
KINDS = {kind.name: kind for kind in [BFLOAT16, *map(np.dtype, ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4"))]}


class Entry(NamedTuple):
    """A file of the cache. used: when it was used last, in seconds since 1970; model, form: what its header says, empty if it is not
    readable."""

    path: Path
    bytes: int
    used: float
    model: str
    form: str


def read(checkpoint: loader.Checkpoint, backend: Backend, room: int | None = None) -> Weights:
    """The weights of a checkpoint, from the cache if it has them; else as `loader.read` gives them, and the cache gets them. Both have the
    same bits. room: the most bytes that the cache may take, 0 to use none; None: REDRAFT_WEIGHT_CACHE, else ROOM. InvalidInput if this
    variable is no size. Whatever is wrong with the cache, the weights are read without it."""
    room = _room() if room is None else room
    few = checkpoint.weight_bytes < LEAST
    if not room or few or Feature.KEPT not in backend.features or (folder := _folder()) is None:
        return loader.read(checkpoint, backend)
    model, form, key = str(checkpoint.path.resolve()), _form(checkpoint), _key(checkpoint, backend)
    path = folder / f"{_digest(model, form, backend.layout)[:32]}{SUFFIX}"
    if (found := _load(path, key, checkpoint, backend)) is not None:
        _keep_within(path, room)
        return found
    parts = loader.parts(checkpoint, backend)
    if all(file.settled() for file in checkpoint.tensors.mapped):
        _save(path, {"key": key, "model": model, "form": f"{form}, {backend.layout}"}, parts, backend, room)
    return loader.assemble(checkpoint.spec, parts)


def entries() -> list[Entry]:
    """The files of the cache, the last used first. CheckpointError if its folder cannot be read."""
    folder = _folder(make=False)
    try:
        found = [] if folder is None else [*_files(folder)]
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error.strerror}") from None
    return sorted((_entry(path, status) for path, status in found), key=lambda one: -one.used)


def clear() -> list[Entry]:
    """Removes all files. The result is those that were removed."""
    return [one for one in entries() if _removed(one.path)]


# ---- what a file is for


def _room() -> int:
    if not (given := os.environ.get(VARIABLE)):
        return ROOM
    try:
        found = ModelConfig(weight_cache=given).weight_cache
    except InvalidInput as error:
        raise InvalidInput(f"{VARIABLE} = {str(error).partition(' = ')[2]}") from None
    return ROOM if found is None else found


def _form(checkpoint: loader.Checkpoint) -> str:
    """How weights are stored, as an option names it, and their dtype."""
    quant = checkpoint.quant
    if quant is None:
        return str(checkpoint.dtype)
    name, given = registry.name_of(type(quant)), ((name, one.default) for name, one in registry.options(type(quant)).items())
    own = ",".join(f"{name}={getattr(quant, name)}" for name, default in given if getattr(quant, name) != default)
    return f"{name}{':' * bool(own)}{own} {checkpoint.dtype}"


def _key(checkpoint: loader.Checkpoint, backend: Backend) -> str:
    states = [file.state for file in checkpoint.tensors.mapped]
    what = checkpoint.spec, checkpoint.sources, checkpoint.stored, checkpoint.quant, checkpoint.dtype
    return _digest(states, *what, type(backend).__name__, backend.layout, library.fingerprint(), identity.code())


def _digest(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


# ---- files


def _folder(*, make: bool = True) -> Path | None:
    """The folder of the cache. None if there is none, or if others may write to it."""
    try:
        folder = kept.folder("weights")
        if make:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except (OSError, CheckpointError):
        return None
    if not S_ISDIR(status.st_mode):
        return None
    if status.st_uid != os.geteuid() or status.st_mode & OTHERS:
        log.warning("%s: packed weights are not kept there: it must be this user's, and others must not be able to write to it", folder)
        return None
    return folder


def _files(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for path in folder.iterdir():
        if path.suffix in (SUFFIX, PART):
            with suppress(OSError):  # another process removed it
                yield path, path.lstat()


def _entry(path: Path, status: os.stat_result) -> Entry:
    model = form = ""
    with suppress(*DAMAGED):
        header = _header(_opened(path))[0]
        model, form = str(header["model"]), str(header["form"])
    return Entry(path, status.st_size, status.st_mtime, model, form)


def _removed(path: Path) -> bool:
    try:
        path.unlink()
    except OSError:
        return False
    return True


def _opened(path: Path) -> Mapped:
    """OSError or ValueError if there is no file that may be used."""
    found = Mapped(path, os.O_NOFOLLOW | os.O_NONBLOCK)
    if not S_ISREG(found.status.st_mode) or found.status.st_uid != os.geteuid() or found.status.st_mode & OTHERS:
        log.warning("%s: these packed weights are not used: the file must be this user's, and others must not be able to write it", path)
        raise ValueError("not to be trusted")
    return found


def _header(file: Mapped) -> tuple[dict[str, Any], int]:
    """The header and the byte at which the arrays begin. ValueError if the file is cut or damaged."""
    data = file.data
    length = int.from_bytes(data[len(MAGIC) : len(MAGIC) + 8], "little")
    if data[: len(MAGIC)] != MAGIC or START + length > len(data):
        raise ValueError("no file of this cache")
    text = data[START : START + length]
    if hashlib.sha256(text).digest() != data[START - 32 : START]:
        raise ValueError("the checksum differs")
    header = json.loads(text)
    begin = _up(START + length)
    if begin + header["bytes"] != len(data):
        raise ValueError("the length differs")
    return header, begin


def _load(path: Path, key: str, checkpoint: loader.Checkpoint, backend: Backend) -> Weights | None:
    """The weights in a file. None if there is no file that is whole, trusted and has this key."""
    try:
        file = _opened(path)
        header, begin = _header(file)
        if header["key"] != key:
            return None

        def arrays(given: dict[str, Any]) -> dict[str, Numbers]:
            return {name: file.array(KINDS[kind], tuple(shape), begin + at) for name, (kind, shape, at) in given.items()}

        linears = {name: backend.restored(one["numbers"], arrays(one["arrays"])) for name, one in header["linears"].items()}
        found = loader.assemble(checkpoint.spec, loader.Parts(arrays(header["tensors"]), linears))
    except FileNotFoundError:
        return None
    except DAMAGED as error:
        log.info("%s: not used: %s", path, error)
        return None
    with suppress(OSError):
        os.utime(path)  # the files that were used last stay longest
    return found


def _save(path: Path, header: dict[str, Any], parts: loader.Parts, backend: Backend, room: int) -> None:
    """Writes a file. Nothing is written if a weight has a form that no file can hold, or if there is not enough room."""
    arrays: list[Numbers] = []
    end = 0

    def placed(given: dict[str, Numbers]) -> dict[str, Any]:
        nonlocal end
        found = {}
        for name, array in given.items():
            found[name] = array.dtype.name, array.shape, end
            arrays.append(array)
            end = _up(end + array.nbytes)
        return found

    tensors, linears = placed(parts.tensors), {}
    for name, linear in parts.linears.items():
        if (held := backend.kept(linear)) is None:
            return
        linears[name] = {"numbers": held[0], "arrays": placed(held[1])}
    text = json.dumps({**header, "bytes": end, "tensors": tensors, "linears": linears}).encode()
    size = _up(START + len(text)) + end
    if not KINDS.keys() >= {array.dtype.name for array in arrays} or size > room:
        return
    try:
        if not _make_room(path, room - size, 2 * size):
            return
        number, part = tempfile.mkstemp(PART, dir=path.parent)  # for this user only
        try:
            with os.fdopen(number, "wb") as file:
                file.write(MAGIC + len(text).to_bytes(8, "little") + hashlib.sha256(text).digest() + text)
                file.write(bytes(_up(file.tell()) - file.tell()))
                for array in arrays:
                    file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8))  # type: ignore[arg-type]
                    file.write(bytes(_up(array.nbytes) - array.nbytes))
                file.flush()
                os.fsync(file.fileno())  # after a power failure too, a file with its name is whole
            os.replace(part, path)
        except BaseException:
            _removed(Path(part))
            raise
    except OSError as error:
        log.info("%s: not written: %s", path, error)


def _keep_within(path: Path, room: int) -> None:
    """Removes files until all take at most `room` bytes; the one in use is the last to go, and its memory stays."""
    with suppress(OSError):
        size = path.stat().st_size
        _make_room(path, room - size, 0)
        if size > room:
            _removed(path)


def _make_room(path: Path, room: int, free: int) -> bool:
    """Removes what was used longest ago until the files beside `path` take at most `room` bytes. The result is false, and nothing is
    removed, if fewer than `free` bytes of the disk would be free then."""
    files = sorted((pair for pair in _files(path.parent) if pair[0] != path), key=lambda pair: pair[1].st_mtime)
    total, leaving = sum(status.st_size for _, status in files), []
    for one, status in files:
        abandoned = one.suffix == PART and status.st_mtime < time.time() - OLD
        if abandoned or (total > room and one.suffix == SUFFIX):
            leaving.append((one, status.st_size))
            total -= status.st_size
    if shutil.disk_usage(path.parent).free + sum(size for _, size in leaving) < free:
        return False
    for one, _ in leaving:
        _removed(one)
    return True


def _up(at: int) -> int:
    """The next multiple of LINE."""
    return math.ceil(at / LINE) * LINE
