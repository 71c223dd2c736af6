"""What was measured or trained for one model: arrays with the hash of the model, which another model refuses."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from redraft import kept
from redraft.errors import CheckpointError, InvalidInput
from redraft.models import loader
from redraft.ops.arrays import Tensor, array, numpy_dtype

if TYPE_CHECKING:
    from redraft.models.runner import Runner

SAMPLE = 1 << 16  # bytes of each weight that enter the hash of the model
FILE = "trained.safetensors"  # in a folder


@dataclass(frozen=True, eq=False)
class Trained:
    """method: the registered name of the method that reads it; model: the hash of the model; about: what else a reader must know, values
    that JSON can hold; arrays: float32, float16, bfloat16 or integers, by name."""

    method: str
    model: str
    about: Mapping[str, Any]
    arrays: Mapping[str, NDArray[Any]]

    def save(self, path: Path) -> Path:
        """Writes a safetensors file, or FILE in `path` if that has no suffix; returns the path of the file. No reader ever sees a partial
        file."""
        from safetensors.numpy import save_file

        path = path if path.suffix else path / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"method": self.method, "model": self.model, **{name: json.dumps(value) for name, value in self.about.items()}}
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        save_file({name: np.ascontiguousarray(array) for name, array in self.arrays.items()}, partial, metadata)
        partial.replace(path)
        return path

    @classmethod
    def load(cls, path: Path, method: str) -> Trained:
        """Reads what `save` wrote, `path` as given there. CheckpointError if it is not a complete file of this method."""
        from safetensors import SafetensorError, safe_open

        path = path / FILE if path.is_dir() else path
        try:
            with safe_open(path, framework="np") as file:
                about = dict(file.metadata() or {})
                found = about.pop("method", "no method")
                if found != method:
                    raise CheckpointError(f"{path}: a file of {found}, not of {method}")
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dictionary
            return cls(method, about.pop("model"), {name: json.loads(value) for name, value in about.items()}, arrays)
        except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
            raise CheckpointError(f"{path}: not a complete file of {method}: {' '.join(str(error).split())}") from None

    @staticmethod
    def reader(path: Path) -> str:
        """The name of the method that reads this file. CheckpointError if it is none."""
        from safetensors import SafetensorError, safe_open

        path = path / FILE if path.is_dir() else path
        try:
            with safe_open(path, framework="np") as file:
                return str((file.metadata() or {})["method"])
        except (SafetensorError, OSError, KeyError) as error:
            raise CheckpointError(f"{path}: not a trained file: {' '.join(str(error).split())}") from None

    def check(self, runner: Runner, path: Path) -> None:
        """InvalidInput if it was made for another model than that of `runner`. path: where it is from."""
        if (model := model_hash(runner)) != self.model:
            raise InvalidInput(f"{self.method}: {path} was made for the model with hash {self.model}, this one has {model}")


def place(method: str, model: str) -> Path:
    """Where the file of a method is kept for a model if the user names no other place; see `kept`."""
    return kept.folder(method) / f"{model}.safetensors"


# ---- the hash of the model


def model_hash(runner: Runner) -> str:
    """The sha256 of the config and of the name, dtype, shape and first rows (64 KiB) of each stored tensor, in the order of names. A
    checkpoint of any size takes well under a second. The hash does not depend on sharding or on the dtype in which the model runs.
    For weights without a checkpoint it hashes the spec and the weights in memory."""
    if runner.source is not None:
        return hash_of(runner.source)
    return _hash(repr(runner.spec).encode(), _in_memory(runner.weights))


def hash_of(source: Path) -> str:
    """model_hash() of a checkpoint that need not be loaded."""
    return _hash(_config(source), _in_files(source))


def _hash(config: bytes, weights: Iterable[Weight]) -> str:
    digest = sha256(config)
    for name, shape, rows in weights:
        digest.update(f"{name} torch.{numpy_dtype(rows.dtype)} {shape}".encode())
        digest.update(array(rows).tobytes())
    return digest.hexdigest()


Weight = tuple[str, tuple[int, ...], "Tensor"]  # name, shape, first rows


def _config(source: Path) -> bytes:
    """config.json; for a GGUF file, which has none, the config that it gives."""
    return repr(loader.read_config(source)).encode() if source.is_file() else (source / loader.CONFIG).read_bytes()


def _in_files(source: Path) -> Iterator[Weight]:
    stored = loader.inspect(source).tensors
    for name, info in sorted(stored.tensors.items()):
        if info.shape:
            yield name, info.shape, stored.read(name, slice(0, _sampled(stored.read(name, slice(0, 1)))))


def _in_memory(value: Any, name: str = "weights") -> Iterator[Weight]:
    if hasattr(value, "nbytes"):  # an array or a tensor
        yield name, tuple(value.shape), _first_rows(value.to_dense() if getattr(value, "is_mkldnn", False) else value)
    elif isinstance(value, tuple):
        for i, part in enumerate(value):
            yield from _in_memory(part, f"{name}.{i}")
    elif is_dataclass(value):
        for field in fields(value):
            yield from _in_memory(getattr(value, field.name), f"{name}.{field.name}")


def _first_rows(stored: Tensor) -> Tensor:
    return stored[: _sampled(stored[:1])]


def _sampled(row: Tensor) -> int:
    """The number of rows of this size that enter the hash."""
    return max(1, SAMPLE // max(1, int(row.nbytes)))
