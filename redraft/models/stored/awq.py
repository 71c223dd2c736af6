"""AWQ: Lin et al., AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration, 2023, arXiv:2306.00978, as AutoAWQ
stores it."""

from __future__ import annotations

import numpy as np

from redraft.models.stored.source import Matrix, Stored, four_bits
from redraft.ops.arrays import Numbers
from redraft.ops.quantized import Quantized

ORDER = [0, 4, 1, 5, 2, 6, 3, 7]  # the place in a word of each of eight neighbouring outputs


class Awq(Stored):
    """`qweight` [ins, outs / 8] and `qzeros` [groups, outs / 8] hold eight outputs in a word, `scales` are [groups, outs]."""

    parts = "qweight", "qzeros", "scales"

    def setup(self) -> None:
        self.field("bits", None, 4)
        self.field("version", "gemm", "gemm", "GEMM")
        self.size = self.group()

    def matrix(self, name: str) -> Matrix | None:
        module, _, part = name.rpartition(".")
        if part != "qweight":
            return None
        ins, words = self.shape(name)
        return Matrix(module, 8 * words, ins)

    def weight(self, found: Matrix) -> Quantized | Numbers:
        size, groups = self.groups(found, self.size)
        codes = np.ascontiguousarray(self.words(found, "qweight")[..., ORDER].reshape(found.ins, found.outs).T)
        zeros = self.words(found, "qzeros", (groups, found.outs // 8))[..., ORDER].reshape(groups, found.outs).T
        return four_bits(codes, np.ascontiguousarray(self.tensor(found, "scales", (groups, found.outs)).T), zeros, size)
