"""Weights of a linear layer as small integers, and the exact product of a row with them.

The product of a row x [ins] depends on this row only. Unless stated otherwise, every operation is in float32 and rounds to nearest,
ties to even. Sums of codes are integers and exact.

1. v = x in float32, with 0 in the outlier columns. m = max |v|, s = m / 127, r = 127 / m (one division), or 0 if that is not finite.
2. The codes of the row are rint(v * r), ties to even, in -127..127. If m is NaN or infinite, all outputs are NaN.
   scale [outs, groups]: rint((v * p) * r), where p is the power of a group of the row: the largest of 1, 2, 4, 8, 16 for which no
   |v| * p of the group is above m. So a group of small numbers has codes as fine as those of the largest.
3. scale [outs]: y = float(sum of code * weight code) * (s * scale[o]). float() rounds the int32.
   scale [outs, groups]: total = 0, then for each group in order total = fma(float(sum in the group) / p, scale(o, g), total) and, with
   lows, total = fma(float(sum of the row's codes in the group) / p, low(o, g), total); y = total * s. scale(o, g) is scale[o, g], times
   top[o, g // per] with tops, which is exact; low(o, g) likewise. Division by p is exact.
4. For each outlier column c in ascending order: y = y + x[c] * side[o, c], with the product and then the sum rounded.
5. y = y + bias (in float32), rounded to the dtype of x.

A fused multiply-add may replace product and sum in step 4 only if the product is exact, as with bfloat16 numbers; never in steps 3 and
5. The fma of step 3 may be computed in float64: every term and the total are multiples of 2^-28, so the sum is exact below 2^25 (see
LARGEST_TOTAL).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from redraft.ops.arrays import Tensor, cast, device, dots, namespace

LARGEST_CODE = 127  # of rows, and of weights with one scale for each output
LOW, HIGH = -8, 7  # the range of 4-bit codes with one scale for each group, without lows
HIGHEST = HIGH - LOW  # with lows they are 0 to this
POWERS = (1.0, 2.0, 4.0, 8.0, 16.0)  # of a group of a row
LARGEST_TOTAL = 2.0**25  # of step 3
MIN_COLUMNS = 32  # for the integer product of PyTorch; with a single column its result is wrong
EXACT_COLUMNS = 1024  # a sum of this many products of 8-bit codes is below 2^24, so float32 is exact in any order


@dataclass(frozen=True)
class Quantized:
    """weight[o, i] = code[o, i] * scale[o], or code[o, i] * scale(o, g) + low(o, g) with g = i // group. In column columns[j] it is
    side[o, j], and the code is 0.

    codes: int8 [outs, ins], or uint8 [outs, (ins + 1) / 2] if halved: the low half of a byte is column 2 i, the high half 2 i + 1, each
    stored as code + 8, with lows as it is; scale: float32 [outs], or float16 [outs, groups]; group: the number of columns that share a
    scale (the last group may be shorter); columns: i64 [n], ascending; side: [outs, n] in the dtype of the model; wide: codes of groups
    have 8 bits, not 4; low: as scale, None for 0. Arrays of numpy, or of a backend; dtype: that of the model.

    top, bottom: float16 [outs, groups / per], shared by `per` groups. Then scale and low are int8, factors of them.
    """

    codes: Any
    scale: Any
    ins: int
    dtype: Any
    group: int = 0
    bias: Any = None
    columns: Any = None
    side: Any = None
    wide: bool = False
    low: Any = None
    top: Any = None
    bottom: Any = None
    per: int = 1

    @property
    def outs(self) -> int:
        return len(self.codes)

    @property
    def shape(self) -> tuple[int, int]:
        return self.outs, self.ins

    @property
    def grouped(self) -> bool:
        """Whether each group has a scale, not each output."""
        return bool(self.scale.ndim == 2)

    @property
    def offset(self) -> int:
        """What halved codes have added."""
        return -LOW if self.low is None else 0

    def scales(self) -> Any:
        """scale(o, g), float32 [outs, groups]."""
        return self._times(self.scale, self.top)

    def lows(self) -> Any:
        """low(o, g), float32 [outs, groups]."""
        return None if self.low is None else self._times(self.low, self.bottom)

    def _times(self, factor: Any, of: Any) -> Any:
        return _float32(factor) if of is None else _float32(factor) * _repeated(_float32(of), self.per)[:, : factor.shape[1]]

    @property
    def is_halved(self) -> bool:
        return str(self.codes.dtype).endswith("uint8")

    @property
    def meta(self) -> bool:
        return bool(getattr(self.codes, "is_meta", False))

    @property
    def arrays(self) -> dict[str, Any]:
        every = {name: getattr(self, name) for name in ("codes", "scale", "bias", "columns", "side", "low", "top", "bottom")}
        return {name: array for name, array in every.items() if array is not None}

    @property
    def bytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())

    def rows(self, keep: NDArray[Any]) -> Quantized:
        """The layer with these outputs only."""
        own = {name: getattr(self, name) for name in ("bias", "side", "low", "top", "bottom")}
        some: dict[str, Any] = {name: None if part is None else part[keep] for name, part in own.items()}
        return replace(self, codes=self.codes[keep], scale=self.scale[keep], **some)

    def reordered(self, order: tuple[int, ...]) -> Quantized:
        """The outputs in another order; the bias has it already."""
        return replace(self.rows(np.asarray(order)), bias=self.bias)

    def halved(self) -> Quantized:
        """The layer with two codes in a byte, if codes have 4 bits."""
        if not self.grouped or self.wide or self.is_halved:
            return self
        xp = namespace(self.codes)
        codes = xp.astype(self.codes + self.offset, xp.uint8)
        high = codes[:, 1::2]
        if self.ins % 2:  # the half of no column has code 0
            high = xp.concat([high, xp.full((self.outs, 1), self.offset, dtype=xp.uint8, device=codes.device)], axis=1)
        return replace(self, codes=codes[:, ::2] | high << 4)

    def whole(self) -> Any:
        """The codes as int8 [outs, ins], halved or not."""
        if not self.is_halved:
            return self.codes
        xp = namespace(self.codes)
        both = xp.reshape(xp.stack([self.codes & 15, self.codes >> 4], axis=-1), (self.outs, -1))[:, : self.ins]
        return xp.astype(both, xp.int8) - self.offset

    def dense(self) -> Any:
        """The decoded matrix, float32 [outs, ins]."""

        def spread(numbers: Any) -> Any:
            return _repeated(numbers, self.group)[:, : self.ins] if self.grouped else numbers[:, None]

        found = _float32(self.whole()) * spread(self.scales())
        if (lows := self.lows()) is not None:
            found += spread(lows)
        if self.columns is not None and self.side is not None:
            found[:, self.columns] = _float32(self.side)
        return found


def _float32(x: Any) -> Any:
    return cast(x, namespace(x).float32)


def _repeated(x: Any, times: int) -> Any:
    """Each column so many times."""
    return namespace(x).repeat(x, times, axis=1)


@np.errstate(all="ignore")  # scales may be infinite
def is_exact(weights: Quantized) -> bool:
    """Whether the product is the one that this module defines, also where pairs are added in 16 bits and the fma is a float64 sum."""
    if (weights.wide or not weights.grouped) and int(weights.whole().min()) < -LARGEST_CODE:
        return False
    if not weights.grouped:
        return bool(namespace(weights.scale).isfinite(weights.scale).all())
    total = abs(weights.scales()).sum(1) * weights.group
    lows = weights.lows()
    beside = 0 if lows is None else abs(lows).sum(1) * weights.group
    if float((total * (LARGEST_CODE if weights.wide else HIGHEST) + beside).max()) * LARGEST_CODE < LARGEST_TOTAL:
        return True  # whatever the codes are
    total = abs(replace(weights, columns=None, low=None).dense()).sum(1)
    return float((total + beside).max()) * LARGEST_CODE < LARGEST_TOTAL


def joined(parts: list[Quantized], bias: Any) -> Quantized | None:
    """The outputs of several weights as one; None if their forms differ."""
    first = parts[0]

    def forms(one: Quantized) -> tuple[Any, ...]:
        return one.grouped, one.group, one.wide, one.per, one.ins, one.top is None, one.low is None, one.bottom is None

    if any(forms(one) != forms(first) for one in parts):
        return None
    names = [name for name in ("codes", "scale", "low", "top", "bottom") if getattr(first, name) is not None]
    whole: dict[str, Any] = {name: np.concatenate([getattr(one, name) for one in parts]) for name in names}
    return replace(first, bias=bias, **whole)


def row_codes(x: Tensor, columns: Tensor | None, group: int = 0) -> tuple[Tensor, Tensor, Tensor | None]:
    """Steps 1 and 2: the codes int8 [T, ins], s, float32 [T, 1], and with groups their powers, float32 [T, groups]."""
    xp = namespace(x)
    v: Any = xp.astype(x, xp.float32, copy=columns is not None)
    if columns is not None:
        v[:, columns] = 0
    m = xp.max(xp.abs(v), axis=1, keepdims=True)
    largest = xp.full_like(m, LARGEST_CODE)  # an array, because PyTorch may turn division by a number into a multiplication
    r = largest / m
    r = xp.where(xp.isfinite(r), r, xp.zeros_like(r))
    powers = None
    if group:
        powers = _powers(v, m, group)
        v = v * xp.repeat(powers, group, axis=1)[:, : v.shape[1]]
    codes = xp.nan_to_num(xp.round(v * r), nan=0.0)
    return cast(codes, xp.int8), m / largest, powers


def _powers(v: Any, m: Any, group: int) -> Any:
    xp = namespace(v)
    padding = xp.zeros((len(v), -v.shape[1] % group), dtype=v.dtype, device=device(v))
    most = xp.max(xp.concat([xp.abs(v), padding], axis=1).reshape(len(v), -1, group), axis=2)
    powers = xp.asarray(POWERS, dtype=xp.float32, device=device(v))
    fits = most[..., None] * powers <= m[..., None]
    return powers[xp.clip(fits.sum(-1) - 1, min=0)]  # none fits NaN


def product(x: Tensor, weights: Quantized) -> Tensor:
    """x [T, ins] -> [T, outs]: the product that this module defines."""
    xp = namespace(x)
    if not len(x):
        return xp.zeros((0, weights.outs), dtype=x.dtype, device=device(x))
    codes, s, powers = row_codes(x, weights.columns, weights.group if weights.grouped else 0)
    whole = powers is None
    y: Any = cast(_sums(codes, weights.codes), xp.float32) * (s * weights.scale) if whole else _by_group(codes, powers, weights) * s
    if weights.columns is not None and weights.side is not None:  # 4.
        for column, side in zip(weights.columns.tolist(), cast(weights.side.T, xp.float32), strict=True):
            y += cast(x[:, column, None], xp.float32) * side
    if weights.bias is not None:  # 5.
        y += cast(weights.bias, xp.float32)
    found: Tensor = cast(y, x.dtype)
    return found


def _by_group(codes: Any, powers: Any, weights: Quantized) -> Any:
    """The totals of step 3, float32 [T, outs]."""
    xp = namespace(codes)
    total = xp.zeros((len(codes), weights.outs), dtype=xp.float32, device=device(codes))
    scales, lows = cast(weights.scales(), xp.float64), weights.lows()
    if lows is not None:
        lows = cast(lows, xp.float64)
    parts = [(codes, weights.codes)]
    if weights.is_halved:  # stored codes are 8 too large; the sums of the row correct that below
        if weights.ins % 2:
            codes = xp.concat([codes, xp.zeros_like(codes[:, :1])], axis=1)
        parts = [(codes[:, ::2], cast(weights.codes & 15, xp.int8)), (codes[:, 1::2], cast(weights.codes >> 4, xp.int8))]
    width = weights.group // len(parts)
    for g in range(scales.shape[1]):
        own = slice(g * width, (g + 1) * width)
        acc = sum(_sums(x[:, own], w[:, own]) for x, w in parts)
        sums = xp.sum(codes[:, g * weights.group : (g + 1) * weights.group], axis=1, keepdims=True, dtype=xp.int32)
        if weights.is_halved:
            acc -= weights.offset * sums
        power = cast(powers[:, g, None], xp.float64)
        total = cast(cast(acc, xp.float64) / power * scales[:, g] + cast(total, xp.float64), xp.float32)
        if lows is not None:
            total = cast(cast(sums, xp.float64) / power * lows[:, g] + cast(total, xp.float64), xp.float32)
    return total


def _sums(x: Any, w: Any) -> Any:
    """The exact product of int8 [T, n] and int8 [outs, n]: int32 [T, outs]."""
    xp = namespace(x)
    if xp.__name__.endswith("torch") and x.device.type == "cpu" and x.shape[1] >= MIN_COLUMNS and _integer_product_is_exact():
        import torch

        return torch._int_mm(x.contiguous(), w.T)
    found = xp.zeros((len(x), len(w)), dtype=xp.int32, device=device(x))
    for at in range(0, x.shape[1], EXACT_COLUMNS):
        own = slice(at, at + EXACT_COLUMNS)
        found += cast(dots(cast(x[:, own], xp.float32), cast(w[:, own], xp.float32)), xp.int32)
    return found


@cache
def _integer_product_is_exact() -> bool:
    """Whether PyTorch multiplies int8 exactly on this machine. Instructions of some machines add pairs in 16 bits and saturate."""
    import torch

    def right(rows: int, columns: int, sign: int) -> bool:
        x, w = (torch.full((n, columns), value, dtype=torch.int8) for n, value in ((rows, LARGEST_CODE), (48, sign * LARGEST_CODE)))
        return bool((torch._int_mm(x, w.T) == sign * LARGEST_CODE * LARGEST_CODE * columns).all())

    try:
        return all(right(rows, columns, sign) for rows in (1, 2, 17, 64) for columns in (32, 100, 2048) for sign in (1, -1))
    except RuntimeError:
        return False
