"""MXFP4: 4-bit floating point (E2M1) with a power of two (E8M0) for each 32 numbers. Rouhani et al., Microscaling Data Formats for Deep
Learning, 2023, arXiv:2310.10537, as GPT-OSS stores its experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from redraft.core.spec import WeightSource
from redraft.errors import CheckpointError
from redraft.models.checkpoint import FLOAT32, STORED, Safetensors, TensorInfo
from redraft.models.mapped import Mapped
from redraft.ops.arrays import DTYPES, Numbers
from redraft.ops.quantized import Quantized, is_exact

GROUP, BIAS, NO_NUMBER = 32, 127, 255  # numbers that share a scale; of its exponent; its code that is no number
DOUBLED = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)  # twice the numbers of E2M1
PAIRS = np.stack([np.tile(DOUBLED, 16), DOUBLED.repeat(16)], 1)  # of each byte


class Mxfp4:
    """A TensorSource. A tensor [matrices, ins, outs] is stored as `_blocks` u8 [matrices, outs, ins / 32, 16], the first of two numbers
    in the low half of a byte, and `_scales` u8 [matrices, outs, ins / 32]. Other tensors are as they are."""

    dtypes = STORED

    def __init__(self, raw: Safetensors, fields: dict[str, Any], where: Path) -> None:
        self.raw, self.index = raw, raw.index
        self.made = {name.removesuffix("_blocks"): self._info(name) for name in raw.tensors if name.endswith("_blocks")}
        used = {f"{name}_{part}" for name in self.made for part in ("blocks", "scales")}
        self.tensors = {name: info for name, info in raw.tensors.items() if name not in used} | self.made

    def _info(self, blocks: str) -> TensorInfo:
        file, shape, _ = self.raw.tensors[blocks]
        scales = f"{blocks.removesuffix('_blocks')}_scales"
        if len(shape) != 4 or shape[3] != GROUP // 2:
            raise CheckpointError(f"{file}: {blocks} has shape {list(shape)}, expected [matrices, outs, groups, {GROUP // 2}]")
        if scales not in self.raw.tensors:
            raise CheckpointError(f"{self.index}: missing tensor {scales}")
        if (found := self.raw.tensors[scales].shape) != shape[:3]:
            raise CheckpointError(f"{self.raw.tensors[scales].file}: {scales} has shape {list(found)}, expected {list(shape[:3])}")
        for name in (blocks, scales):
            if (dtype := self.raw.tensors[name].dtype) != "U8":
                raise CheckpointError(f"{self.raw.tensors[name].file}: {name} has dtype {dtype}, expected U8")
        return TensorInfo(file, (shape[0], shape[2] * GROUP, shape[1]), "F32")

    @property
    def files(self) -> list[Path]:
        return self.raw.files

    @property
    def mapped(self) -> list[Mapped]:
        return self.raw.mapped

    def read(self, name: str, part: int | slice | None = None, dtype: np.dtype[Any] = FLOAT32) -> Numbers:
        if name not in self.made:
            return self.raw.read(name, part, dtype)
        doubled, exponents = self._numbers(name, part)
        wide = FLOAT32 if dtype == np.float16 else dtype  # others hold all numbers that are below their largest
        with np.errstate(over="ignore"):
            numbers = doubled.astype(wide).reshape(*doubled.shape[:-1], -1, GROUP) * _power(exponents).astype(wide)[..., None]
        decoded: Numbers = numbers.reshape(doubled.shape).swapaxes(-1, -2)
        return decoded

    def packed_bytes(self, source: WeightSource) -> int | None:
        return None

    def packed(self, source: WeightSource, bias: Numbers | None) -> Quantized | None:
        """Codes of 8 bits with a scale for each group: the same numbers."""
        name = source.names[0]
        if name not in self.made or len(source.names) > 1 or source.place is None or not source.transposed:
            return None
        codes, exponents = self._numbers(name, source.place[0])
        with np.errstate(over="ignore"):
            scale = _power(exponents).astype(np.float16)
        if not np.array_equal(scale.astype(np.float32), _power(exponents)):
            return None
        found = Quantized(codes, scale, codes.shape[1], DTYPES["float32"], GROUP, bias, wide=True)
        if not is_exact(found):
            return None
        return found.reordered(source.order) if source.order else found

    def _numbers(self, name: str, part: int | slice | None) -> tuple[Numbers, Numbers]:
        """Twice the numbers, int8 [..., outs, ins], and the exponents of their scales, halved, int32 [..., outs, ins / 32]."""
        blocks, scales = self.raw.read(f"{name}_blocks", part), self.raw.read(f"{name}_scales", part)
        if (scales == NO_NUMBER).any():
            raise CheckpointError(f"{self.made[name].file}: {name}_scales: a scale of {NO_NUMBER} is no number")
        return PAIRS[blocks].reshape(*blocks.shape[:-2], -1), scales.astype(np.int32) - BIAS - 1


def _power(exponents: Numbers) -> Numbers:
    """2 to the exponents, float32, exact."""
    return np.ldexp(np.float32(1), exponents)
