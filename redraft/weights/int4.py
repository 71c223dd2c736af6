"""Weights as 4-bit codes with one scale per group of columns. Groups have a fixed size, or a size adapted to each weight.

Young Jin Kim, Rawn Henry, Raffy Fahim, Hany Hassan Awadalla: FineQuant: Unlocking Efficiency with Fine-Grained Weight-Only Quantization
for LLMs, 2023, arXiv 2308.09723.

1. A group is `group` neighbouring columns of one output. Its scale is w / -8, stored in float16, where w is the weight with the largest
   magnitude (the first of equal ones). So w has code -8, and a scale can be negative.
2. Codes are rint(w / stored scale), in -8..7.
3. group=adaptive: start with one group per output. Halve the groups while the mean of max |w| over all groups falls at least by the
   factor `alpha`, down to 64 columns.

Differs: activation rows are 8-bit codes (ops/quantized.py); the paper multiplies 16-bit rows. The head has 8-bit codes unless
`head` is set. The paper's symmetric rounding, codes -7..7 with max |w| / 7, gave 17 to 31 % more divergence from the float32 model in
each of 8 measurements (two models, two kinds of text, groups of 32 and 64). Adaptive group sizes are 64 times a power of two, so the
last group can be shorter; the paper uses divisors. The size is chosen for queries, keys and values together, and for gate and up
together. The paper's alpha is unknown: at 2 no weight of the tested models is split; at 1.05 most are, the wide ones down to 64 columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from redraft.card import Card, Guarantee
from redraft.errors import InvalidInput, Unsupported
from redraft.ops.arrays import Numbers
from redraft.ops.quantized import HIGH, LOW, Quantized, is_exact
from redraft.weights.quant import Role, by_output, by_output_bytes, check_head, parts, rounded

if TYPE_CHECKING:
    from redraft.ops.backend import Linear

SIZES = ("32", "64", "128")
ADAPTIVE = "adaptive"
MIN_GROUP = 64  # the fewest columns of an adaptive group


@dataclass(frozen=True)
class FineQuant:
    """group: columns that share a scale, 32, 64, 128 or adaptive; alpha: for adaptive groups, the factor by which halving must reduce the
    mean of the groups' largest weights; head: int8, int4, or none (not quantized)."""

    group: str = "64"
    alpha: float = 1.05
    head: str = "int8"

    card: ClassVar[Card] = Card(
        "FineQuant",
        "Kim, Henry, Fahim, Hassan Awadalla, FineQuant: Unlocking Efficiency with Fine-Grained Weight-Only Quantization for LLMs, 2023, "
        "arXiv 2308.09723",
        Guarantee.LOSSY,
        deviates="activation rows are 8-bit codes; the head has 8-bit codes; adaptive group sizes are 64 times a power of two",
        summary="4 bits a weight; when memory or bandwidth is short",
    )

    def __post_init__(self) -> None:
        if self.group not in (*SIZES, ADAPTIVE):
            raise InvalidInput(f"int4:group={self.group}: must be {', '.join(SIZES)} or {ADAPTIVE}")
        if not self.alpha > 0:
            raise InvalidInput(f"int4:alpha={self.alpha}: must be above 0")
        check_head("int4", self.head, "int8", "int4", "none")

    def quantize(self, weights: Linear, role: Role, gains: Numbers | None = None) -> Linear | Quantized:
        if role == "head" and self.head == "none":
            return weights
        if role == "head" and self.head == "int8":
            return by_output(weights)
        return by_group(weights, self.size(weights.weight))

    def bytes(self, outs: int, ins: int, dtype: np.dtype[Any], role: Role) -> int:
        if role == "head" and self.head == "none":
            return outs * ins * dtype.itemsize
        if role == "head" and self.head == "int8":
            return by_output_bytes(outs, ins)
        smallest = MIN_GROUP if self.group == ADAPTIVE else int(self.group)
        return outs * (-(-ins // 2) + 2 * -(-ins // smallest))

    def size(self, weight: Numbers) -> int:
        """The columns of a group of this weight."""
        return adapted(weight, self.alpha) if self.group == ADAPTIVE else int(self.group)


def by_group(weights: Linear, group: int) -> Quantized:
    weight, bias = weights
    outs, ins = weight.shape
    groups = -(-ins // group)
    codes, scale = np.empty((outs, ins), np.int8), np.empty((outs, groups), np.float16)
    for rows, w in parts(weight):
        cut = _padded(w, groups * group).reshape(len(w), groups, group)
        largest = np.take_along_axis(cut, np.abs(cut).argmax(2, keepdims=True), 2)
        with np.errstate(over="ignore"):
            scale[rows] = (largest / np.float32(LOW))[:, :, 0]  # 1.
        codes[rows] = rounded(cut, scale[rows, :, None].astype(np.float32), LOW, HIGH).reshape(len(w), -1)[:, :ins]  # 2.
    made = Quantized(codes, scale, ins, weight.dtype, group, bias)
    if not is_exact(made):
        raise Unsupported("the weights are too large: a group's scale, or a row's product with them, leaves the range of 4-bit codes")
    return made


def _padded(w: Numbers, columns: int) -> Numbers:
    """With columns of zeros at the end."""
    return np.pad(w, ((0, 0), (0, columns - w.shape[1]))) if columns > w.shape[1] else w


def adapted(weight: Numbers, alpha: float) -> int:
    """3. The columns of an adaptive group."""
    wide = -(-weight.shape[1] // MIN_GROUP) * MIN_GROUP
    finest = [np.abs(_padded(w, wide)).reshape(len(w), -1, MIN_GROUP).max(2) for _, w in parts(weight)]
    ranges = [np.concatenate(finest)]  # of groups of 64, 128 ... columns: float32 [outs, groups]
    while (groups := ranges[-1].shape[1]) > 1:
        ranges.append(_padded(ranges[-1], groups + groups % 2).reshape(len(ranges[-1]), -1, 2).max(2))
    size = MIN_GROUP << len(ranges) - 1
    for child, parent in zip(ranges[-2::-1], ranges[:0:-1], strict=True):
        if not child.mean(dtype=np.float64) * alpha <= parent.mean(dtype=np.float64):
            break
        size //= 2
    return size
