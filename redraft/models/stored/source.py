"""The tensors of a quantized folder as a TensorSource: matrices have their shapes, and are decoded when they are read."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from redraft.core.spec import WeightSource
from redraft.errors import CheckpointError, Unsupported, shown
from redraft.models.checkpoint import FLOAT32, STORED, Safetensors, TensorInfo
from redraft.models.mapped import Mapped
from redraft.ops.arrays import DTYPES, Numbers
from redraft.ops.quantized import Quantized, is_exact, joined


class Matrix(NamedTuple):
    """A matrix that is stored in several tensors. module: its name without ".weight"; outs, ins: its shape."""

    module: str
    outs: int
    ins: int


class Stored:
    """A way to store matrices. A subclass finds them in the files, and reads one."""

    dtypes: Collection[str] = STORED

    def __init__(self, raw: Safetensors, fields: dict[str, Any], where: Path) -> None:
        """fields: `quantization_config`; where: the file that has it, for errors."""
        self.raw, self.fields, self.where, self.index = raw, fields, where, raw.index
        self.setup()
        self.matrices: dict[str, Matrix] = {}
        made: dict[str, TensorInfo] = {}
        used: set[str] = set()
        for name, info in raw.tensors.items():
            if found := self.matrix(name):
                weight = f"{found.module}.weight"
                self.matrices[weight], made[weight] = found, TensorInfo(info.file, (found.outs, found.ins), "F32")
                used |= {f"{found.module}.{part}" for part in self.parts}
        self.tensors = {name: info for name, info in raw.tensors.items() if name not in used} | made

    parts: tuple[str, ...] = ()  # the tensors of a matrix: names after its module

    def setup(self) -> None:
        """Checks the fields. CheckpointError or Unsupported names one."""
        raise NotImplementedError

    def matrix(self, name: str) -> Matrix | None:
        """The matrix whose codes are in this tensor."""
        raise NotImplementedError

    def weight(self, found: Matrix) -> Quantized | Numbers:
        """The matrix [outs, ins] as it is stored, or float32 numbers if no kernel multiplies this form."""
        raise NotImplementedError

    @property
    def files(self) -> list[Path]:
        return self.raw.files

    @property
    def mapped(self) -> list[Mapped]:
        return self.raw.mapped

    def read(self, name: str, part: int | slice | None = None, dtype: np.dtype[Any] = FLOAT32) -> Numbers:
        found = self.matrices.get(name)
        if found is None:
            return self.raw.read(name, part, dtype)
        weight = self.weight(found)
        dense = weight.dense() if isinstance(weight, Quantized) else weight
        return dense if part is None else dense[part]

    def packed(self, source: WeightSource, bias: Numbers | None) -> Quantized | None:
        if source.place or source.transposed or any(source.paired) or any(name not in self.matrices for name in source.names):
            return None
        found = [self.weight(self.matrices[name]) for name in source.names]
        parts = [one for one in found if isinstance(one, Quantized) and is_exact(one)]
        whole = joined(parts, bias) if len(parts) == len(found) else None
        return whole.reordered(source.order) if whole is not None and source.order else whole

    def packed_bytes(self, source: WeightSource) -> int | None:
        return None

    # ---- for subclasses

    def tensor(self, found: Matrix, part: str, shape: tuple[int, ...] | None = None, dtypes: Collection[str] = STORED) -> Numbers:
        """A tensor of a matrix. CheckpointError if it is missing or has another shape or dtype."""
        name = f"{found.module}.{part}"
        if name not in self.raw.tensors:
            raise CheckpointError(f"{self.index}: missing tensor {name}")
        info = self.raw.tensors[name]
        if shape is not None and info.shape != shape:
            raise CheckpointError(f"{info.file}: {name} has shape {list(info.shape)}, expected {list(shape)}")
        if info.dtype not in dtypes:
            raise CheckpointError(f"{info.file}: {name} has dtype {info.dtype}, expected {' or '.join(dtypes)}")
        return self.raw.read(name)

    def words(self, found: Matrix, part: str, shape: tuple[int, ...] | None = None) -> Numbers:
        """The 4-bit numbers [..., 8] in a tensor of int32."""
        return nibbles(self.tensor(found, part, shape, ("I32",)))

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor in the files; (0, 0) unless it is a matrix."""
        shape = self.raw.tensors[name].shape
        return shape if len(shape) == 2 else (0, 0)

    def has(self, found: Matrix, part: str) -> bool:
        return f"{found.module}.{part}" in self.raw.tensors

    def field(self, name: str, default: Any, *allowed: Any) -> Any:
        """A field of the config. Unsupported unless it is one of `allowed`, if there are any."""
        value = self.fields.get(name, default)
        if allowed and value not in allowed:
            raise Unsupported(f"{self.where}: quantization_config.{name} = {shown(value)}: only {', '.join(map(str, allowed))}")
        return value

    def group(self, name: str = "group_size") -> int:
        """The number of columns that share a scale; -1 for all."""
        value = self.fields.get(name)
        if type(value) is not int or not (value == -1 or 0 < value < 1 << 20):
            raise CheckpointError(f"{self.where}: quantization_config.{name} = {shown(value)}: must be -1 or a positive integer")
        return value

    def groups(self, found: Matrix, group: int) -> tuple[int, int]:
        """(columns of a group, number of groups). CheckpointError if groups do not fill the columns."""
        size = found.ins if group == -1 else group
        if found.ins % size:
            raise CheckpointError(f"{self.index}: {found.module}: groups of {size} do not fill {found.ins} columns")
        return size, found.ins // size


def nibbles(words: Numbers) -> Numbers:
    """int32 [..., n] -> int8 [..., n, 8]: the eight 4-bit numbers of each word, the lowest first."""
    return (words[..., None] >> np.arange(0, 32, 4, dtype=np.int32) & 15).astype(np.int8)


def four_bits(codes: Numbers, scale: Numbers, zeros: Numbers, group: int) -> Quantized | Numbers:
    """The weight (code - zero) * scale: codes int8 [outs, ins] of 0 to 15, scale and zeros [outs, groups]."""
    whole = scale.astype(np.float32)
    with np.errstate(over="ignore"):
        half = whole.astype(np.float16)
    if not np.array_equal(half.astype(np.float32), whole):  # a scale in bfloat16 may be outside of float16
        decoded: Numbers = (codes.astype(np.float32) - zeros.astype(np.float32).repeat(group, 1)) * whole.repeat(group, 1)
        return decoded
    ins = codes.shape[1]
    if (zeros == 8).all():
        return Quantized(codes - 8, half, ins, DTYPES["float32"], group)
    return Quantized(codes, half, ins, DTYPES["float32"], group, low=-zeros.astype(np.int8), bottom=half)
