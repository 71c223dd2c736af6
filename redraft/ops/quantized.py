"""Weights of a linear layer as small integers, and the exact product of a row with them.

The product of a row x [ins] depends on this row only. Unless stated otherwise, every operation is in float32 and rounds to nearest,
ties to even. Sums of codes are integers and exact.

1. v = x in float32, with 0 in the outlier columns. m = max |v|, s = m / 127, r = 127 / m (one division), or 0 if that is not finite.
2. The codes of the row are rint(v * r), ties to even, in -127..127. If m is NaN or infinite, all outputs are NaN.
3. scale [outs]: y = float(sum of code * weight code) * (s * scale[o]). float() rounds the int32.
   scale [outs, groups]: total = 0, then for each group in order total = fma(float(sum in the group), float(scale[o, g]), total);
   y = total * s.
4. For each outlier column c in ascending order: y = y + x[c] * side[o, c], with the product and then the sum rounded.
5. y = y + bias (in float32), rounded to the dtype of x.

A fused multiply-add may replace product and sum in step 4 only if the product is exact, as with bfloat16 numbers; never in steps 3 and
5. The fma of step 3 may be computed in float64: every term and the total are multiples of 2^-24, so the sum is exact below 2^29 (see
LARGEST_TOTAL).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the cards of methods are read without loading it
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

LARGEST_CODE = 127  # of rows, and of weights with one scale for each output
LOW, HIGH = -8, 7  # the range of weight codes with one scale for each group
LARGEST_TOTAL = 2.0**29  # of step 3
MIN_COLUMNS = 32  # for the integer product of PyTorch; with a single column its result is wrong
EXACT_COLUMNS = 1024  # a sum of this many products of 8-bit codes is below 2^24, so float32 is exact in any order


@dataclass(frozen=True)
class Quantized:
    """weight[o, i] = code[o, i] * scale[o] or code[o, i] * scale[o, i // group]. In column columns[j] it is side[o, j], and the code is 0.

    codes: int8 [outs, ins], or uint8 [outs, (ins + 1) / 2] if halved: the low half of a byte is column 2 i, the high half 2 i + 1, each
    stored as code + 8; scale: float32 [outs], or float16 [outs, groups]; group: the number of columns that share a scale (the last
    group may be shorter); columns: i64 [n], ascending; side: [outs, n] in the dtype of the model.
    """

    codes: Tensor
    scale: Tensor
    ins: int
    dtype: torch.dtype
    group: int = 0
    bias: Tensor | None = None
    columns: Tensor | None = None
    side: Tensor | None = None

    @property
    def outs(self) -> int:
        return len(self.codes)

    @property
    def shape(self) -> tuple[int, int]:
        return self.outs, self.ins

    @property
    def grouped(self) -> bool:
        """Whether each group has a scale, with 4-bit codes. Otherwise each output has one, with 8-bit codes."""
        return self.scale.ndim == 2

    @property
    def is_halved(self) -> bool:
        return not self.codes.dtype.is_signed

    @property
    def meta(self) -> bool:
        return self.codes.is_meta

    @property
    def tensors(self) -> list[Tensor]:
        every = (self.codes, self.scale, self.bias, self.columns, self.side)
        return [tensor for tensor in every if tensor is not None]

    @property
    def bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)

    def rows(self, keep: NDArray[Any]) -> Quantized:
        """The layer with these outputs only."""
        bias, side = (None if part is None else part[keep] for part in (self.bias, self.side))
        return replace(self, codes=self.codes[keep], scale=self.scale[keep], bias=bias, side=side)

    def halved(self) -> Quantized:
        """The layer with two codes in a byte, if codes have 4 bits."""
        import torch
        import torch.nn.functional as F

        if not self.grouped or self.is_halved:
            return self
        codes = (F.pad(self.codes, (0, self.ins % 2)) - LOW).to(torch.uint8)
        return replace(self, codes=codes[:, ::2] | codes[:, 1::2] << 4)

    def whole(self) -> Tensor:
        """The codes as int8 [outs, ins], halved or not."""
        import torch

        if not self.is_halved:
            return self.codes
        both = torch.stack([self.codes & 15, self.codes >> 4], -1).flatten(1)[:, : self.ins]
        return both.to(torch.int8) + LOW

    def dense(self) -> Tensor:
        """The decoded matrix, float32 [outs, ins]."""
        scale = self.scale.float()
        scale = scale.repeat_interleave(self.group, 1)[:, : self.ins] if self.grouped else scale[:, None]
        found = self.whole().float() * scale
        if self.columns is not None and self.side is not None:
            found[:, self.columns] = self.side.float()
        return found


def row_codes(x: Tensor, columns: Tensor | None) -> tuple[Tensor, Tensor]:
    """Steps 1 and 2: the codes int8 [T, ins] and s, float32 [T, 1]."""
    import torch

    v = x.float()
    if columns is not None:
        v = v.index_fill(1, columns, 0)
    m = v.abs().amax(1, keepdim=True)
    largest = torch.full_like(m, LARGEST_CODE)  # a tensor, because PyTorch may turn division by a number into a multiplication
    r = largest / m
    r = torch.where(r.isfinite(), r, 0)
    return (v * r).round_().nan_to_num_(0).to(torch.int8), m / largest


def product(x: Tensor, weights: Quantized) -> Tensor:
    """x [T, ins] -> [T, outs]: the product that this module defines."""
    if not len(x):
        return x.new_empty(0, weights.shape[0])
    codes, s = row_codes(x, weights.columns)
    y = _by_group(codes, weights).mul_(s) if weights.grouped else _sums(codes, weights.codes).float() * (s * weights.scale)
    if weights.columns is not None and weights.side is not None:  # 4.
        for column, side in zip(weights.columns.tolist(), weights.side.T.float(), strict=True):
            y += x[:, column, None].float() * side
    if weights.bias is not None:  # 5.
        y += weights.bias.float()
    return y.to(x.dtype)


def _by_group(codes: Tensor, weights: Quantized) -> Tensor:
    """The totals of step 3, float32 [T, outs]."""
    import torch
    import torch.nn.functional as F

    total = torch.zeros(len(codes), weights.shape[0], device=codes.device)
    scales = weights.scale.T.double()
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
        if weights.is_halved:
            acc += LOW * codes[:, 2 * g * width : 2 * (g + 1) * width].sum(1, keepdim=True, dtype=torch.int32)
        total = (acc.double() * scale + total.double()).float()
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
