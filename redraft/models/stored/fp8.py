"""Matrices in 8-bit floating point with a scale for each block of 128 x 128 numbers, as DeepSeek-V3 and Qwen3's FP8 checkpoints store
them. DeepSeek-AI, DeepSeek-V3 Technical Report, 2024, arXiv:2412.19437. They are decoded."""

from __future__ import annotations

import numpy as np

from redraft.errors import CheckpointError, shown
from redraft.models.stored.source import Matrix, Stored
from redraft.ops.arrays import Numbers


class Fp8(Stored):
    """`weight` [outs, ins] in float8 (E4M3), `weight_scale_inv` [outs / rows, ins / columns], rounded up."""

    parts = "weight", "weight_scale_inv"

    def setup(self) -> None:
        self.field("fmt", "e4m3", "e4m3")
        block = self.fields.get("weight_block_size")
        if not isinstance(block, list) or len(block) != 2 or not all(type(one) is int and one > 0 for one in block):
            raise CheckpointError(f"{self.where}: quantization_config.weight_block_size = {shown(block)}: two positive integers are needed")
        self.block = block

    def matrix(self, name: str) -> Matrix | None:
        module, _, part = name.rpartition(".")
        info = self.raw.tensors[name]
        return Matrix(module, *info.shape) if part == "weight" and info.dtype == "F8_E4M3" and len(info.shape) == 2 else None

    def weight(self, found: Matrix) -> Numbers:
        rows, columns = self.block
        scales = self.tensor(found, "weight_scale_inv", (-(-found.outs // rows), -(-found.ins // columns))).astype(np.float32)
        wide = scales.repeat(rows, 0)[: found.outs].repeat(columns, 1)[:, : found.ins]
        decoded: Numbers = self.tensor(found, "weight", None, ("F8_E4M3",)).astype(np.float32) * wide
        return decoded
