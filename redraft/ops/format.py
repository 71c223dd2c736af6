"""Page formats. A format lists the arrays of a unit. A unit is the memory of 32 tokens of one layer and kv head.

A page has one unit for each layer and kv head of its lane: one for a PER_HEAD page, all of them for a SHARED page. The format of a
codec has arrays of codes and scales. A sparse attention method adds its side data to the format, so they are moved, copied and freed
with their page.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple, Protocol

from redraft.core.tree import I32
from redraft.ops.arrays import Tensor

PAGE = 32
ALIGN = 16  # bytes

Arrays = Mapping[str, Any]  # the arrays of units: name -> [..., *shape]


class Array(NamedTuple):
    """One array of a unit. shape[0] is PAGE, one entry for each slot, unless `whole`: then the array belongs to the whole page."""

    shape: tuple[int, ...]
    dtype: Any  # of the library of the backend's arrays
    whole: bool = False

    @property
    def bytes(self) -> int:
        size: int = prod(self.shape) * self.dtype.itemsize
        return -(-size // ALIGN) * ALIGN


INT8_VECTORS, THIN_KEYS = "int8 vectors", "thin keys"  # see PageCodec
CODE_BLOCKS = {2: "2-bit blocks", 4: "4-bit blocks"}


class PageCodec(Protocol):
    """Converts keys and values to the arrays of a unit, and computes attention over them. Units are stacked as [K, n], K kv heads;
    rows of queries as [K, R, D].

    The attribute `layout` tells compiled kernels that they can read the codes. INT8_VECTORS: the arrays are `keys` and `values`, int8
    [32, D], and `key_scales` and `value_scales`, float32 [32], as kv/quantization/int8.py makes them for single tokens. CODE_BLOCKS:
    the arrays are those of kv/quantization/kivi.py, with 2 or 4 bits, or of gear.py or mikv.py, for whole pages. THIN_KEYS: those of
    think.py. A bit-exact backend refuses a codec with an unknown layout."""

    def store(self, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        """The entries [m, ...] of every per-slot array of the codec, for keys and values [m, D] of m slots. Every read, also in the
        same step, uses the stored entries."""
        ...

    def pack(self, keys: Tensor, values: Tensor, lanes: I32 | None = None) -> dict[str, Tensor]:
        """All arrays [m, *shape] of m units, from their keys and values [m, 32, D]. lanes: layer * kv heads + head of each unit, None if
        that is not known, which most codecs need not know."""
        ...

    def scores(self, held: Arrays, q: Tensor) -> Tensor:
        """q [K, R, D] times the keys of held [K, n, ...] -> [K, R, 32 n]."""
        ...

    def mix(self, held: Arrays, weights: Tensor) -> Tensor:
        """weights [K, R, 32 n] times the values -> [K, R, D]."""
        ...

    def decode(self, held: Arrays) -> tuple[Tensor, Tensor]:
        """The keys and values [..., 32, D] of units [...], in their original dtype."""
        ...


@dataclass(frozen=True)
class Format:
    """name: the name by which it is requested; arrays: the arrays of a unit, in their order in memory; codec: None if `keys` and
    `values` (32, D) are stored unencoded; sides: opened methods that fill the other arrays (kv/sparse_attention/sparse_attention.py)."""

    name: str
    arrays: Mapping[str, Array]
    codec: PageCodec | None = None
    sides: tuple[Any, ...] = ()

    @property
    def bytes(self) -> int:
        return sum(array.bytes for array in self.arrays.values())

    def offsets(self) -> dict[str, int]:
        """The offset of each array in bytes from the start of a unit."""
        found, at = {}, 0
        for name, array in self.arrays.items():
            found[name] = at
            at += array.bytes
        return found


def plain(dtype: Any, head_dim: int) -> dict[str, Array]:
    """The arrays of unencoded keys and values."""
    return {name: Array((PAGE, head_dim), dtype) for name in ("keys", "values")}
