"""Weights and activation rows as 8-bit codes, with one scale per output and one per row. A few outlier columns are not quantized.

Tim Dettmers, Mike Lewis, Younes Belkada, Luke Zettlemoyer: LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale, 2022,
arXiv 2208.07339.

1. The outlier columns of a weight after a norm are the `outliers` inputs with the largest gain of that norm, ties by column.
2. Each output's scale is max |w| / 127 over the other columns. Its codes are rint(w / scale).
3. The outlier columns stay in the model's dtype, [outs, n]. Their codes are 0.
4. A row is quantized in the same way, with max |x| / 127 over the other columns. The result is the product of the codes, times both
   scales, plus the product of the outlier columns.

Differs: the paper finds outlier columns in each batch, so the result for a row depends on the other rows. Here they are fixed at load by
the gains of the preceding norm (|weight| + |bias|). Weights without a preceding norm (`out`, `down`) have none. The weights of the
outlier columns are exact, not computed from codes. The head is quantized unless head=none. Rows are rounded by one division, 127 / max.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from redraft.card import Card, Guarantee
from redraft.errors import InvalidInput
from redraft.ops.arrays import Numbers
from redraft.weights.quant import Role, by_output, by_output_bytes, check_head

if TYPE_CHECKING:
    from redraft.ops.backend import Linear
    from redraft.ops.quantized import Quantized


@dataclass(frozen=True)
class LLMInt8:
    """outliers: columns that are not quantized, in each weight after a norm; head: int8, or none (not quantized)."""

    outliers: int = 0
    head: str = "int8"

    card: ClassVar[Card] = Card(
        "LLM.int8()",
        "Dettmers, Lewis, Belkada, Zettlemoyer, LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale, 2022, arXiv 2208.07339",
        Guarantee.LOSSY,
        deviates="outlier columns are fixed at load by the gains of the preceding norm, none by default; the head is quantized",
        summary="8 bits a weight; half the memory, a small loss",
    )

    def __post_init__(self) -> None:
        if self.outliers < 0:
            raise InvalidInput(f"int8:outliers={self.outliers}: must be 0 or more")
        check_head("int8", self.head, "int8", "none")

    def quantize(self, weights: Linear, role: Role, gains: Numbers | None = None) -> Linear | Quantized:
        if role == "head" and self.head == "none":
            return weights
        columns = None
        if self.outliers and gains is not None:
            columns = np.sort(np.argsort(-gains.astype(np.float32), kind="stable")[: self.outliers])  # 1.
        return by_output(weights, columns)  # 2. 3.

    def bytes(self, outs: int, ins: int, dtype: np.dtype[Any], role: Role) -> int:
        if role == "head" and self.head == "none":
            return outs * ins * dtype.itemsize
        return by_output_bytes(outs, ins) + min(self.outliers, ins) * (outs * dtype.itemsize + 8)
