"""Weights of a linear layer as small whole numbers, and the exact product of a row with them.

The product of a row x [ins], a function of this row alone. Every operation is in float32 and rounded to nearest, ties to even,
unless it says otherwise; sums of codes are whole numbers and exact.

1. v = x in float32, 0 in the outlier columns. m = max |v|, s = m / 127, r = 127 / m (one division), or 0 where that is not finite.
2. The row's codes: rint(v * r), ties to even; they lie in -127..127. Where m is NaN or infinite, all outputs are NaN.
3. scale [outs]: y = float(sum of code * weight code) * (s * scale[o]). float() rounds the int32.
   scale [outs, groups]: total = 0, then for each group in order total = fma(float(sum in the group), float(scale[o, g]), total);
   y = total * s.
4. For each outlier column c in ascending order: y = y + x[c] * side[o, c], product and sum rounded one after the other.
5. y = y + bias (in float32), rounded to the dtype of x.

A fused multiply-add may replace the two of step 4 only where the product is exact, as with bfloat16 numbers; never those of 3 and 5.
Step 3 fuses in float64: every term is a multiple of 2^-24, and so is the total, so the sum is exact below 2^29 (see LARGEST).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the cards of methods are read without loading it
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

MOST = 127  # codes of rows, and of weights with one scale an output
LOW, HIGH = -8, 7  # codes of weights with a scale a group
LARGEST = 2.0**29  # of a total in step 3
LEAST = 32  # columns that PyTorch's product is asked for; with a single one its result is wrong
EXACT = 1024  # columns whose sum of products of 8-bit codes is below 2^24, exact in float32 in any order


@dataclass(frozen=True)
class Quantized:
    """weight[o, i] = code[o, i] * scale[o] or scale[o, i // group], and side[o, j] in column columns[j], where the code is 0.

    codes: int8 [outs, ins], or uint8 [outs, (ins + 1) / 2] where halved: column 2 i is the low half, 2 i + 1 the high half, each
    stored as code + 8. scale: float32 [outs], or float16 [outs, groups]; group: columns that share a scale, the last group may be
    shorter. columns: i64 [n] ascending, side: [outs, n] in the model's dtype.
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
        """One scale a group, codes of 4 bits; else one an output, codes of 8."""
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
        """Only these outputs."""
        bias, side = (None if part is None else part[keep] for part in (self.bias, self.side))
        return replace(self, codes=self.codes[keep], scale=self.scale[keep], bias=bias, side=side)

    def halved(self) -> Quantized:
        """Two codes a byte, where they have 4 bits."""
        import torch
        import torch.nn.functional as F

        if not self.grouped or self.is_halved:
            return self
        codes = (F.pad(self.codes, (0, self.ins % 2)) - LOW).to(torch.uint8)
        return replace(self, codes=codes[:, ::2] | codes[:, 1::2] << 4)

    def whole(self) -> Tensor:
        """int8 [outs, ins], whatever the form."""
        import torch

        if not self.is_halved:
            return self.codes
        both = torch.stack([self.codes & 15, self.codes >> 4], -1).flatten(1)[:, : self.ins]
        return both.to(torch.int8) + LOW

    def dense(self) -> Tensor:
        """float32 [outs, ins]: the matrix that the codes stand for."""
        scale = self.scale.float()
        scale = scale.repeat_interleave(self.group, 1)[:, : self.ins] if self.grouped else scale[:, None]
        found = self.whole().float() * scale
        if self.columns is not None and self.side is not None:
            found[:, self.columns] = self.side.float()
        return found


def row_codes(x: Tensor, columns: Tensor | None) -> tuple[Tensor, Tensor]:
    """Steps 1 and 2: int8 [T, ins] and s, float32 [T, 1]."""
    import torch

    v = x.float()
    if columns is not None:
        v = v.index_fill(1, columns, 0)
    m = v.abs().amax(1, keepdim=True)
    most = torch.full_like(m, MOST)  # by a number PyTorch may multiply with its inverse instead
    r = most / m
    r = torch.where(r.isfinite(), r, 0)
    return (v * r).round_().nan_to_num_(0).to(torch.int8), m / most


def product(x: Tensor, weights: Quantized) -> Tensor:
    """x [T, ins] -> [T, outs], as this module defines it."""
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
    if weights.is_halved:  # the halves' codes are 8 too large, which the row's sums make good
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
    """Exact: int8 [T, n] times int8 [outs, n] -> int32 [T, outs]."""
    import torch

    if x.device.type == "cpu" and x.shape[1] >= LEAST and _whole_numbers():
        return torch._int_mm(x, w.T)
    found = torch.zeros(len(x), len(w), dtype=torch.int32, device=x.device)
    for some, others in zip(x.split(EXACT, 1), w.split(EXACT, 1), strict=True):
        found += (some.float() @ others.float().T).to(torch.int32)
    return found


@cache
def _whole_numbers() -> bool:
    """Whether PyTorch multiplies int8 exactly here: instructions of some machines add pairs in 16 bits, and saturate."""
    import torch

    def right(rows: int, columns: int, sign: int) -> bool:
        x, w = (torch.full((n, columns), value, dtype=torch.int8) for n, value in ((rows, MOST), (48, sign * MOST)))
        return bool((torch._int_mm(x, w.T) == sign * MOST * MOST * columns).all())

    try:
        return all(right(rows, columns, sign) for rows in (1, 2, 17, 64) for columns in (32, 100, 2048) for sign in (1, -1))
    except RuntimeError:
        return False
