"""GPTQ: Frantar et al., GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers, 2022, arXiv:2210.17323, as
AutoGPTQ and GPTQModel store it."""

from __future__ import annotations

import numpy as np

from redraft.errors import CheckpointError, shown
from redraft.models.stored.source import Matrix, Stored, four_bits
from redraft.ops.arrays import Numbers
from redraft.ops.quantized import Quantized


class Gptq(Stored):
    """`qweight` [ins / 8, outs] and `qzeros` [groups, outs / 8] hold eight numbers in a word, `scales` are [groups, outs], `g_idx` [ins]
    is the group of each column. Files of the first version store zeros less 1."""

    parts = "qweight", "qzeros", "scales", "g_idx"

    def setup(self) -> None:
        self.field("bits", None, 4)
        self.size = self.group()
        self.plus = 0 if self.field("checkpoint_format", "gptq", "gptq", "gptq_v2") == "gptq_v2" else 1

    def matrix(self, name: str) -> Matrix | None:
        module, _, part = name.rpartition(".")
        if part != "qweight":
            return None
        rows, outs = self.shape(name)
        return Matrix(module, outs, 8 * rows)

    def weight(self, found: Matrix) -> Quantized | Numbers:
        size, groups = self.groups(found, self.size)
        codes = np.ascontiguousarray(self.words(found, "qweight").swapaxes(1, 2).reshape(found.ins, found.outs).T)
        zeros = self.words(found, "qzeros", (groups, found.outs // 8)).reshape(groups, found.outs).T + self.plus
        scales = np.ascontiguousarray(self.tensor(found, "scales", (groups, found.outs)).T)
        of = np.arange(found.ins) // size
        if self.has(found, "g_idx"):
            given = self.tensor(found, "g_idx", (found.ins,), ("I32", "I64")).astype(np.int64)
            if not ((given >= 0) & (given < groups)).all():
                raise CheckpointError(f"{self.index}: {found.module}.g_idx = {shown(given.tolist())}: groups 0 to {groups - 1} are allowed")
            if not np.array_equal(given, of):  # columns in the order of their importance: decoded
                return (codes.astype(np.float32) - zeros.astype(np.float32)[:, given]) * scales.astype(np.float32)[:, given]
        return four_bits(codes, scales, zeros, size)
