"""The files of a checkpoint folder: JSON, and tensors through one protocol. Nothing from a checkpoint is executed."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from redraft.core.spec import WeightSource
from redraft.errors import CheckpointError, Unsupported
from redraft.models.config import first_line, read_json
from redraft.models.mapped import Mapped
from redraft.ops.arrays import DTYPES, Numbers
from redraft.ops.quantized import Quantized

STORED = {"F64": DTYPES["float64"], "F32": DTYPES["float32"], "F16": DTYPES["float16"], "BF16": DTYPES["bfloat16"]}
NUMPY: dict[str, np.dtype[Any]] = STORED | {
    "I64": np.dtype(np.int64), "I32": np.dtype(np.int32), "I16": np.dtype(np.int16), "I8": np.dtype(np.int8), "U8": np.dtype(np.uint8),
    "U16": np.dtype(np.uint16), "U32": np.dtype(np.uint32), "U64": np.dtype(np.uint64), "BOOL": np.dtype(np.bool_),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}  # fmt: skip
FLOAT32 = DTYPES["float32"]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")


class TensorInfo(NamedTuple):
    """What a header says about a tensor. dtype: as the file names it; STORED lists the supported ones."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


class TensorSource(Protocol):
    """Named tensors in one or several files of any format."""

    @property
    def index(self) -> Path:
        """The file that lists all tensors."""
        ...

    @property
    def dtypes(self) -> Collection[str]:
        """The names of the dtypes that can be read."""
        ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All names, with shapes and dtypes."""
        ...

    @property
    def files(self) -> Iterable[Path]:
        """The files of the tensors, sorted."""
        ...

    @property
    def mapped(self) -> Collection[Mapped]:
        """These files as they were opened."""
        ...

    def read(self, name: str, part: int | slice | None = None, dtype: np.dtype[Any] = FLOAT32) -> Numbers:
        """A tensor, or a part of it along the first dimension, as stored; numbers that are stored in no type of numpy or ml_dtypes are
        decoded to `dtype`. CheckpointError names file and tensor."""
        ...

    def packed(self, source: WeightSource, bias: Numbers | None) -> Quantized | None:
        """The weight of these tensors as it is stored, if it is quantized in a form that kernels multiply; else None."""
        ...

    def packed_bytes(self, source: WeightSource) -> int | None:
        """At most what `packed` takes, without reading it. None: unknown, or it is decoded."""
        ...


class TensorFile:
    """A safetensors file, mapped and open. CheckpointError if it is damaged."""

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            with safe_open(file, framework="np"):  # checks the header and the size
                pass
            self.mapped = Mapped(file)
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{file}: not a whole safetensors file: {first_line(error)}") from None
        begin = 8 + int.from_bytes(self.mapped.data[:8], "little")
        header = json.loads(self.mapped.data[8:begin])
        header.pop("__metadata__", None)
        self.tensors = {name: TensorInfo(file, tuple(one["shape"]), one["dtype"]) for name, one in header.items()}
        self._at = {name: begin + one["data_offsets"][0] for name, one in header.items()}

    def read(self, name: str, part: int | slice | None = None) -> Numbers:
        info = self.tensors[name]
        if info.dtype not in NUMPY:
            raise CheckpointError(f"{self.file}: {name} has dtype {info.dtype}; known: {', '.join(NUMPY)}")
        whole = self.mapped.array(NUMPY[info.dtype], info.shape, self._at[name])
        found = np.array(whole if part is None else whole[part])
        self.mapped.forget()
        return found


class Safetensors:
    """The safetensors files of a folder: model.safetensors, or the shards that the index names. CheckpointError or Unsupported says what
    is missing or damaged."""

    dtypes: Collection[str] = STORED

    def __init__(self, folder: Path) -> None:
        self.index = folder / (SINGLE if (folder / SINGLE).exists() else INDEX)
        self._files = {file: TensorFile(file) for file in _files(folder)}
        self.tensors: dict[str, TensorInfo] = {}
        for opened in self._files.values():
            self.tensors |= opened.tensors

    @property
    def files(self) -> list[Path]:
        return sorted({info.file for info in self.tensors.values()})

    @property
    def mapped(self) -> list[Mapped]:
        return [one.mapped for one in self._files.values()]

    def read(self, name: str, part: int | slice | None = None, dtype: np.dtype[Any] = FLOAT32) -> Numbers:
        return self._files[self.tensors[name].file].read(name, part)

    def packed(self, source: WeightSource, bias: Numbers | None) -> Quantized | None:
        return None

    def packed_bytes(self, source: WeightSource) -> int | None:
        return None


def _files(folder: Path) -> list[Path]:
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    if not (folder / INDEX).exists():
        raise _no_weights(folder)
    index = read_json(folder / INDEX).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
        raise CheckpointError(f"{folder / INDEX}: no weight_map of tensor and file names")
    files = [folder / name for name in sorted(set(index.values()))]
    for file in files:
        if file.parent != folder:
            raise CheckpointError(f"{folder / INDEX}: names a file outside the folder: {file.name}")
        if not file.exists():
            raise CheckpointError(f"{folder}: missing shard {file.name}, named in {INDEX}")
    return files


def _no_weights(folder: Path) -> CheckpointError | Unsupported:
    for file in sorted(folder.iterdir()):
        if file.suffix == ".gguf":
            return Unsupported(f"{folder}: config.json beside GGUF weights; to read these, name the file: {file.name}")
        if file.suffix in _PICKLED:
            return Unsupported(f"{folder}: holds pickled weights only ({file.name}), which could run code; convert them to safetensors")
    return CheckpointError(f"{folder}: no weights: neither {SINGLE} nor {INDEX}")


def refuse_adapter(folder: Path) -> None:
    """Unsupported if the folder holds an adapter, because transformers would apply it to the weights in the folder."""
    file = folder / "adapter_config.json"
    if not file.exists():
        return
    raw = read_json(file)
    kind, base = raw.get("peft_type") or "LoRA/PEFT", raw.get("base_model_name_or_path")
    of = f" of {' '.join(str(base).split())}" if base else ""
    how = "merge it into the weights, or remove adapter_config.json to run the weights without the adapter"
    raise Unsupported(f"{folder}: holds a {kind} adapter{of} (adapter_config.json), which is not applied; {how}")
