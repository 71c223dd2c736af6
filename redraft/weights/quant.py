"""The interface of weight quantizers: how the weights of a linear layer are stored. Their type is Quantized in ops/quantized.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import numpy as np

from redraft.card import Card
from redraft.errors import InvalidInput, Unsupported
from redraft.ops.arrays import Numbers
from redraft.ops.quantized import LARGEST_CODE, Quantized

if TYPE_CHECKING:
    from redraft.ops.backend import Linear

Role = Literal["layer", "head"]
ROOM = 1 << 18  # the most float32 numbers at once, so that they stay in the processor's caches


class Quantizer(Protocol):
    """A frozen dataclass. Its card's guarantee compares the quantized model with the original model. All other guarantees of a
    configuration compare with plain decoding of the quantized model. keeps: whether matrices that the file stores quantized stay so."""

    card: ClassVar[Card]
    keeps: ClassVar[bool] = False

    def quantize(self, weights: Linear, role: Role, gains: Numbers | None = None) -> Linear | Quantized:
        """The weight [outs, ins] as it is stored; unchanged if the method does not quantize it. The result depends only on the
        arguments. gains: [ins], the gain of the preceding norm for each input, None without a preceding norm. Raises Unsupported for
        weights that have no codes."""
        ...

    def bytes(self, outs: int, ins: int, dtype: np.dtype[Any], role: Role) -> int:
        """The most bytes that a stored weight of this shape takes, without its bias. Known before the weight is read."""
        ...


def by_output(weights: Linear, columns: Numbers | None = None) -> Quantized:
    """8-bit codes with one scale per output: scale = max |w| / 127 in float32, code = rint(w / scale). Outlier `columns` are excluded
    from both and stored unquantized. An output of zeros, or with a scale too small for float32, has scale 0 and codes 0."""
    weight, bias = weights
    outs, ins = weight.shape
    codes, scale = np.empty((outs, ins), np.int8), np.empty(outs, np.float32)
    for rows, w in parts(weight):
        if columns is not None:
            w[:, columns] = 0
        scale[rows] = np.abs(w).max(1) / np.float32(LARGEST_CODE)
        codes[rows] = rounded(w, scale[rows, None], -LARGEST_CODE, LARGEST_CODE)
    side = None if columns is None else weight[:, columns].copy()
    return Quantized(codes, scale, ins, weight.dtype, bias=bias, columns=columns, side=side)


def by_output_bytes(outs: int, ins: int) -> int:
    return outs * ins + 4 * outs


def parts(weight: Numbers) -> Iterator[tuple[slice, Numbers]]:
    """The weight in slices of rows, as float32 copies. Raises Unsupported for a number that is not finite."""
    step = max(1, ROOM // weight.shape[1])
    for first in range(0, len(weight), step):
        rows = slice(first, first + step)
        w = weight[rows].astype(np.float32)
        if not np.isfinite(w).all():
            raise Unsupported("a number that is not finite in float32 has no code")
        yield rows, w


def rounded(w: Numbers, scale: Numbers, low: int, high: int) -> Numbers:
    """w / scale as int8, ties to even; a division by 0 gives 0."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        steps = w / scale
    np.nan_to_num(steps, copy=False, nan=0, posinf=0, neginf=0)
    return np.rint(steps, out=steps).clip(low, high, out=steps).astype(np.int8)


def check_head(name: str, head: str, *allowed: str) -> None:
    if head not in allowed:
        raise InvalidInput(f"{name}:head={head}: must be {', '.join(allowed[:-1])} or {allowed[-1]}")
