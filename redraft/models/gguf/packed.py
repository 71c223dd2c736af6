"""Quantized tensors of GGUF files as `Quantized`, without decoding them.

Layouts of the blocks: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h. Q4_0, Q5_0 and Q8_0 have a scale for 32 columns,
Q4_1 also a low; blocks of Q4_K and Q6_K hold 256 columns, whose groups of 32 and 16 have integer factors of the block's scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from redraft.core.spec import WeightSource
from redraft.models.gguf.file import Record
from redraft.ops.arrays import DTYPES, Numbers
from redraft.ops.quantized import Quantized, is_exact

U8 = NDArray[np.uint8]
_NAMES = "scale", "low", "top", "bottom"


class Part(NamedTuple):
    """Rows of a tensor; the arrays as in Quantized, [rows, ...]."""

    codes: NDArray[Any]
    scale: NDArray[Any]
    low: NDArray[Any] | None = None
    top: NDArray[Any] | None = None
    bottom: NDArray[Any] | None = None


def _half(blocks: U8, at: int) -> NDArray[np.float16]:
    """A float16 of each block [rows, blocks, bytes]."""
    return np.ascontiguousarray(blocks[..., at : at + 2]).view(np.float16)[..., 0]


def _nibbles(packed: U8) -> U8:
    """[..., n] -> [..., 2 n]: the low halves, then the high halves."""
    return np.concatenate([packed & 15, packed >> 4], -1)


def _q4_0(blocks: U8) -> Part:
    return Part(_nibbles(blocks[..., 2:]).astype(np.int8) - 8, _half(blocks, 0))


def _q4_1(blocks: U8) -> Part:
    return Part(_nibbles(blocks[..., 4:]).astype(np.int8), _half(blocks, 0), _half(blocks, 2))


def _q5_0(blocks: U8) -> Part:
    fifth = np.unpackbits(blocks[..., 2:6], axis=-1, bitorder="little")
    return Part((_nibbles(blocks[..., 6:]) | fifth << 4).astype(np.int8) - 16, _half(blocks, 0))


def _q8_0(blocks: U8) -> Part:
    return Part(blocks[..., 2:].view(np.int8), _half(blocks, 0))


def _q4_k(blocks: U8) -> Part:
    """Eight groups. Factors of scales and of lows have 6 bits: those of the first four groups lie in one byte each, those of the others
    in a half byte and the two highest bits of the first four."""
    first, second, rest = blocks[..., 4:8], blocks[..., 8:12], blocks[..., 12:16]
    scale = np.concatenate([first & 63, (rest & 15) | (first >> 6) << 4], -1)
    low = np.concatenate([second & 63, rest >> 4 | (second >> 6) << 4], -1)
    codes = _nibbles(blocks[..., 16:].reshape(*blocks.shape[:-1], 4, 32))
    return Part(codes.astype(np.int8), scale.astype(np.int8), low.astype(np.int8), _half(blocks, 0), -_half(blocks, 2))


def _q6_k(blocks: U8) -> Part:
    """Sixteen groups; of each half block, 64 bytes hold the low halves of four times 32 codes, 32 bytes their two high bits."""
    shape = blocks.shape[:-1]
    low, high = blocks[..., :128].reshape(*shape, 2, 2, 32), blocks[..., 128:192].reshape(*shape, 2, 32)
    halves = np.concatenate([low & 15, low >> 4], -2)
    tops = np.stack([high & 3, high >> 2 & 3, high >> 4 & 3, high >> 6], -2)
    return Part((halves | tops << 4).astype(np.int8) - 32, blocks[..., 192:208].view(np.int8), top=_half(blocks, 208))


class Form(NamedTuple):
    """lows: whether groups have a low; per: groups of a top, 0 without tops."""

    read: Callable[[U8], Part]
    bytes: int  # of a block
    group: int
    wide: bool
    lows: bool = False
    per: int = 0


FORMS = {
    "Q4_0": Form(_q4_0, 18, 32, False),
    "Q4_1": Form(_q4_1, 20, 32, False, True),
    "Q5_0": Form(_q5_0, 22, 32, True),
    "Q8_0": Form(_q8_0, 34, 32, True),
    "Q4_K": Form(_q4_k, 144, 32, False, True, 8),
    "Q6_K": Form(_q6_k, 210, 16, True, False, 16),
}
_SIMPLE = {"Q4_0", "Q5_0", "Q8_0"}  # all fit into wide codes with a scale for 32 columns
_BLOCKS = {"Q4_K", "Q6_K"}  # both fit into wide codes with factors of a scale and a low for 16 columns


def _form(records: list[Record], source: WeightSource) -> Form | None:
    """The form that all these tensors fit into."""
    kinds = {record.kind.name for record in records}
    if not kinds <= FORMS.keys() or source.transposed:
        return None
    if len(kinds) == 1:
        return FORMS[kinds.pop()]
    return FORMS["Q8_0"] if kinds <= _SIMPLE else FORMS["Q6_K"]._replace(lows=True) if kinds <= _BLOCKS else None


def quantized(records: list[Record], source: WeightSource, bias: Numbers | None) -> Quantized | None:
    """The weight of these tensors; None if they have no common form, or one that the kernels do not multiply exactly. The rows are those
    of `source`."""
    form = _form(records, source)
    if form is None:
        return None
    parts = []
    for record, heads in zip(records, source.paired or [0] * len(records), strict=True):
        data = record.data
        if source.place is not None:
            data = data.reshape(source.place[1], -1, data.shape[-1])[source.place[0]]
        own = FORMS[record.kind.name]
        part = own.read(np.ascontiguousarray(data[source.skip :]).reshape(len(data) - source.skip, -1, own.bytes))
        parts.append(_flat(_fitted(part, own, form), _unpaired(len(part.codes), heads)))
    whole = Part(*(None if arrays[0] is None else np.concatenate(arrays) for arrays in zip(*parts, strict=True)))  # type: ignore[arg-type]
    if source.order:
        whole = Part(*(None if array is None else array[list(source.order)] for array in whole))  # type: ignore[arg-type]
    codes, dtype, rest = whole.codes, DTYPES["float32"], _arrays(whole)
    made = Quantized(codes, ins=codes.shape[1], dtype=dtype, group=form.group, bias=bias, wide=form.wide, per=form.per or 1, **rest)
    return made if is_exact(made) else None


def packed_bytes(records: list[Record], source: WeightSource) -> int | None:
    """What `quantized` takes."""
    form = _form(records, source)
    if form is None:
        return None
    outs = sum(math.prod(record.shape[:-1]) // (source.place[1] if source.place else 1) - source.skip for record in records)
    ins, both = records[0].shape[-1], 1 + form.lows
    groups = ins // form.group
    scales = both * (groups + 2 * (groups // form.per) if form.per else 2 * groups)
    return outs * ((ins if form.wide else ins // 2) + scales)


def _fitted(part: Part, own: Form, form: Form) -> Part:
    """In a form with smaller groups, or with lows."""
    if (times := own.group // form.group) > 1:
        part = part._replace(scale=part.scale.repeat(times, -1), low=None if part.low is None else part.low.repeat(times, -1))
    if form.lows and part.low is None:
        part = part._replace(low=np.zeros_like(part.scale), bottom=None if part.top is None else np.zeros_like(part.top))
    return part


def _arrays(part: Part) -> dict[str, Any]:
    arrays = {name: getattr(part, name) for name in _NAMES}
    return {name: None if array is None else np.ascontiguousarray(array) for name, array in arrays.items()}


def _unpaired(rows: int, heads: int) -> NDArray[np.int64] | slice:
    """The stored row of each row, where the halves of a head are stored interleaved."""
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).ravel() if heads else slice(None)


def _flat(part: Part, order: NDArray[np.int64] | slice) -> Part:
    return Part(*(None if array is None else array.reshape(len(array), -1)[order] for array in part))  # type: ignore[arg-type]
