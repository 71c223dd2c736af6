"""Weights as their file stores them: quantized matrices are multiplied without being decoded.

Rows of activations become 8-bit codes, as ops/quantized.py defines. Matrices in a form that no kernel multiplies are decoded, as without
this method. It is the default for such files on native kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from redraft.card import Card, Guarantee
from redraft.weights.quant import Role

if TYPE_CHECKING:
    import numpy as np

    from redraft.ops.arrays import Numbers
    from redraft.ops.backend import Linear


@dataclass(frozen=True)
class AsStored:
    keeps: ClassVar[bool] = True
    card: ClassVar[Card] = Card(
        "As stored",
        "Gerganov and others, GGUF, 2023; Frantar et al., GPTQ, 2022, arXiv 2210.17323; Lin et al., AWQ, 2023, arXiv 2306.00978",
        Guarantee.LOSSY,
        needs="a file with quantized matrices",
        deviates="activation rows are 8-bit codes; scales of groups are the row's by 1, 2, 4, 8 or 16; llama.cpp's are free",
        summary="quantized files as they are; their default on a CPU",
    )

    def quantize(self, weights: Linear, role: Role, gains: Numbers | None = None) -> Linear:
        return weights

    def bytes(self, outs: int, ins: int, dtype: np.dtype[Any], role: Role) -> int:
        return outs * ins * dtype.itemsize
