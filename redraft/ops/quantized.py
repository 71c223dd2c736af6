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
from typing import TYPE_CHECKING, Any

import numpy as np
from array_api_compat import array_namespace
from numpy.typing import NDArray

if TYPE_CHECKING:  # weights are numpy arrays until a backend has them
    from torch import Tensor

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
        xp = array_namespace(self.codes)
        codes = xp.astype(self.codes + self.offset, xp.uint8)
        high = codes[:, 1::2]
        if self.ins % 2:  # the half of no column has code 0
            high = xp.concat([high, xp.full((self.outs, 1), self.offset, dtype=xp.uint8, device=codes.device)], axis=1)
        return replace(self, codes=codes[:, ::2] | high << 4)

    def whole(self) -> Any:
        """The codes as int8 [outs, ins], halved or not."""
        if not self.is_halved:
            return self.codes
        xp = array_namespace(self.codes)
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
    xp = array_namespace(x)
    return xp.astype(x, xp.float32)


def _repeated(x: Any, times: int) -> Any:
    """Each column so many times."""
    return array_namespace(x).repeat(x, times, axis=1)


@np.errstate(all="ignore")  # scales may be infinite
def is_exact(weights: Quantized) -> bool:
    """Whether the product is the one that this module defines, also where pairs are added in 16 bits and the fma is a float64 sum."""
    if (weights.wide or not weights.grouped) and int(weights.whole().min()) < -LARGEST_CODE:
        return False
    if not weights.grouped:
        return bool(array_namespace(weights.scale).isfinite(weights.scale).all())
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
    import torch

    v = x.float()
    if columns is not None:
        v = v.index_fill(1, columns, 0)
    m = v.abs().amax(1, keepdim=True)
    largest = torch.full_like(m, LARGEST_CODE)  # a tensor, because PyTorch may turn division by a number into a multiplication
    r = largest / m
    r = torch.where(r.isfinite(), r, 0)
    powers = None
    if group:
        powers = _powers(v, m, group)
        v = v * powers.repeat_interleave(group, 1)[:, : v.shape[1]]
    return (v * r).round_().nan_to_num_(0).to(torch.int8), m / largest, powers


def _powers(v: Tensor, m: Tensor, group: int) -> Tensor:
    import torch
    import torch.nn.functional as F

    most = F.pad(v.abs(), (0, -v.shape[1] % group)).unflatten(1, (-1, group)).amax(2)
    powers = torch.tensor(POWERS, device=v.device)
    fits = most[..., None] * powers <= m[..., None]
    return powers[(fits.sum(-1) - 1).clamp(min=0)]  # none fits NaN


def product(x: Tensor, weights: Quantized) -> Tensor:
    """x [T, ins] -> [T, outs]: the product that this module defines."""
    if not len(x):
        return x.new_empty(0, weights.shape[0])
    codes, s, powers = row_codes(x, weights.columns, weights.group if weights.grouped else 0)
    y = _sums(codes, weights.codes).float() * (s * weights.scale) if powers is None else _by_group(codes, powers, weights).mul_(s)
    if weights.columns is not None and weights.side is not None:  # 4.
        for column, side in zip(weights.columns.tolist(), weights.side.T.float(), strict=True):
            y += x[:, column, None].float() * side
    if weights.bias is not None:  # 5.
        y += weights.bias.float()
    return y.to(x.dtype)


def _by_group(codes: Tensor, powers: Tensor, weights: Quantized) -> Tensor:
    """The totals of step 3, float32 [T, outs]."""
    import torch
    import torch.nn.functional as F

    total = torch.zeros(len(codes), weights.shape[0], device=codes.device)
    scales, lows = weights.scales().T.double(), weights.lows()
    parts = [(codes, weights.codes)]
    if weights.is_halved:  # stored codes are 8 too large; the sums of the row correct that below
        codes = F.pad(codes, (0, weights.ins % 2))
        parts = [
            (codes[:, ::2].contiguous(), (weights.codes & 15).view(torch.int8)),
            (codes[:, 1::2].contiguous(), (weights.codes >> 4).view(torch.int8)),
        ]
    width = weights.group // len(parts)
    for g, scale in enumerate(scales):
        own = slice(g * width, (g + 1) * width)
        acc = torch.stack([_sums(x[:, own], w[:, own]) for x, w in parts]).sum(0, dtype=torch.int32)
        sums = codes[:, g * weights.group : (g + 1) * weights.group].sum(1, keepdim=True, dtype=torch.int32)
        if weights.is_halved:
            acc -= weights.offset * sums
        power = powers[:, g, None].double()
        total = (acc.double() / power * scale + total.double()).float()
        if lows is not None:
            total = (sums.double() / power * lows[:, g].double() + total.double()).float()
    return total


def _sums(x: Tensor, w: Tensor) -> Tensor:
    """The exact product of int8 [T, n] and int8 [outs, n]: int32 [T, outs]."""
    import torch

    if x.device.type == "cpu" and x.shape[1] >= MIN_COLUMNS and _integer_product_is_exact():
        return torch._int_mm(x, w.T)
    found = torch.zeros(len(x), len(w), dtype=torch.int32, device=x.device)
    for some, others in zip(x.split(EXACT_COLUMNS, 1), w.split(EXACT_COLUMNS, 1), strict=True):
        found += (some.float() @ others.float().T).to(torch.int32)
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
