"""How 32 tokens of one layer and kv head lie in memory: a format says which arrays a unit is made of.

A codec's format holds codes and scales; a method that reads sparsely adds its side data, so that what belongs to a page
moves, is copied and is freed with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:  # the cards of methods are read without loading it
    import torch
    from torch import Tensor

PAGE = 32
ALIGN = 16  # bytes

Arrays = Mapping[str, "Tensor"]  # of some units: name -> [..., *shape]


class Array(NamedTuple):
    """One array of a unit. shape[0] is PAGE, one entry a slot, unless `whole`: then it belongs to the page."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    whole: bool = False

    @property
    def bytes(self) -> int:
        size: int = prod(self.shape) * self.dtype.itemsize
        return -(-size // ALIGN) * ALIGN


INT8_VECTORS, INT4_BLOCKS = "int8 vectors", "int4 blocks"  # see Codec


class Codec(Protocol):
    """How keys and values become what a unit holds, and attention over it. Units are stacked as [K, n], K kv heads; rows of
    queries as [K, R, D].

    A codec may say in `layout` that compiled kernels can do all this for it. INT8_VECTORS: the arrays are `keys` and `values`, codes
    int8 [32, D], and `key_scales` and `value_scales`, float32 [32], as kv/quantization/int8.py makes them of single tokens. INT4_BLOCKS:
    the
    arrays are those that kv/quantization/int4.py makes of whole pages. A backend that promises bits refuses a codec of no known layout."""

    def store(self, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        """Entries [m, ...] of every per-slot array of the codec, for keys and values [m, D] of m slots. What a row reads, also in
        the same step, is what was stored."""
        ...

    def pack(self, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        """All arrays [m, *shape] of m units, for their keys and values [m, 32, D]."""
        ...

    def scores(self, held: Arrays, q: Tensor) -> Tensor:
        """q [K, R, D] times the keys of held [K, n, ...] -> [K, R, 32 n]."""
        ...

    def mix(self, held: Arrays, weights: Tensor) -> Tensor:
        """weights [K, R, 32 n] times the values -> [K, R, D]."""
        ...

    def decode(self, held: Arrays) -> tuple[Tensor, Tensor]:
        """Keys and values [..., 32, D] of units [...], in the dtype that they had."""
        ...


@dataclass(frozen=True)
class Format:
    """name: what it is asked for by; arrays: of a unit, in their order in memory; codec: None where `keys` and `values` (32, D)
    are stored as they are; sides: opened methods that fill the other arrays (kv/sparse_attention/sparse_attention.py)."""

    name: str
    arrays: Mapping[str, Array]
    codec: Codec | None = None
    sides: tuple[Any, ...] = ()

    @property
    def bytes(self) -> int:
        return sum(array.bytes for array in self.arrays.values())

    def offsets(self) -> dict[str, int]:
        """Bytes from the start of a unit."""
        found, at = {}, 0
        for name, array in self.arrays.items():
            found[name] = at
            at += array.bytes
        return found


def plain(dtype: torch.dtype, head_dim: int) -> dict[str, Array]:
    """Keys and values as they are."""
    return {name: Array((PAGE, head_dim), dtype) for name in ("keys", "values")}
