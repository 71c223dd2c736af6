"""The pool of the NumPy backend: one array in the memory layout of the PyTorch backend's, and views of it for every page format."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import prod
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from redraft.core.sequence import Lanes, Space
from redraft.core.spec import ModelSpec
from redraft.core.tree import I32, I64
from redraft.errors import Unsupported
from redraft.ops import arrays
from redraft.ops.arrays import dots, mixed
from redraft.ops.format import Arrays, Format, PageCodec

LINE = 64  # bytes of a line of a cache


def aligned(size: int, grain: int) -> NDArray[np.uint8]:
    """Memory of `size` bytes that begins at a multiple of `grain`; untouched memory costs nothing."""
    memory = np.empty(size + grain, np.uint8)
    start = -memory.__array_interface__["data"][0] % grain
    return memory[start : start + size]


def lines(shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    """An array without values that begins with a line of a cache: a vector of NumPy's own arrays often lies in two lines."""
    kind = np.dtype(dtype)
    found: NDArray[Any] = aligned(prod(shape) * kind.itemsize, LINE).view(kind).reshape(shape)
    return found


class Exact:
    """Unencoded keys and values, with the methods of a codec. products: a [K, R, D] times b [K, n, D] -> [K, R, n], element by element in
    one order, as `dots`, which is slower than kernels."""

    def __init__(self, products: Callable[[Any, Any], Any] = dots) -> None:
        self.products = products

    def store(self, keys: Any, values: Any) -> dict[str, Any]:
        return {"keys": keys, "values": values}

    def pack(self, keys: Any, values: Any, lanes: I32 | None = None) -> dict[str, Any]:
        return self.store(keys, values)

    def scores(self, held: Arrays, q: Any) -> Any:
        return self.products(q, _slots(held["keys"], q.dtype))

    def mix(self, held: Arrays, weights: Any) -> Any:
        values = _slots(held["values"], weights.dtype)
        return mixed(weights, values) if self.products is dots else self.products(weights, values.swapaxes(1, 2))

    def decode(self, held: Arrays) -> tuple[Any, Any]:
        return held["keys"], held["values"]


def _slots(x: Any, dtype: Any) -> Any:
    """[K, n, 32, D] -> [K, 32 n, D]"""
    return arrays.cast(x, dtype).reshape(len(x), -1, x.shape[-1])


class FormatStore:
    """The units of one format, as views of the memory of the pool. Unit u has index u % per_block in block u // per_block.

    arrays: name -> [blocks, per_block, *shape]; codes: the names of the codec's arrays, all others are side data; bytes: u8[blocks,
    per_block, bytes of a unit].
    """

    def __init__(self, data: NDArray[Any], fmt: Format) -> None:
        memory, count = data.reshape(-1).view(np.uint8), len(data)
        block_bytes = len(memory) // count
        self.format, self.codec, self.exact = fmt, fmt.codec or cast(PageCodec, Exact()), fmt.codec is None
        self.per_block = block_bytes // fmt.bytes
        if not self.per_block:
            raise Unsupported(f"format {fmt.name!r}: a unit takes {fmt.bytes} bytes, more than the {block_bytes} of a block")
        sides = {name for side in fmt.sides for name in side.arrays(data.shape[-1], data.dtype)}
        self.codes = [name for name in fmt.arrays if name not in sides]
        units = count, self.per_block
        self.bytes: NDArray[np.uint8] = np.ndarray((*units, fmt.bytes), np.uint8, memory.data, 0, (block_bytes, fmt.bytes, 1))
        self.arrays: dict[str, NDArray[Any]] = {}
        for name, at in fmt.offsets().items():
            shape, dtype, _ = fmt.arrays[name]
            inner = np.empty(shape, dtype).strides
            self.arrays[name] = np.ndarray((*units, *shape), dtype, memory.data, at, (block_bytes, fmt.bytes, *inner))

    def at(self, units: I64) -> tuple[I64, I64]:
        return units // self.per_block, units % self.per_block

    def take(self, names: Iterable[str], units: I64) -> dict[str, NDArray[Any]]:
        """The arrays [*units.shape, *shape] of these units."""
        at = self.at(units)
        return {name: self.arrays[name][at] for name in names}

    def put(self, given: Arrays, units: I64) -> None:
        at = self.at(units)
        for name, value in given.items():
            self.arrays[name][at] = value


@dataclass
class NumpyPool:
    """data: [blocks, layers, kv heads, 2 (key, value), 32, D] in the backend's dtype; formats: name of a format -> its units in the same
    memory."""

    data: NDArray[Any]
    spec: ModelSpec
    formats: dict[str, FormatStore] = field(default_factory=dict)

    def units(self, space: Space, pages: I32) -> I64:
        """i64[pages, units of a page]: the units of these pages."""
        layers, heads = self.data.shape[1:3]
        count = {Lanes.SHARED: layers * heads, Lanes.PER_LAYER: heads, Lanes.PER_HEAD: 1}[space.lanes]
        found: I64 = pages.astype(np.int64)[:, None] * count + np.arange(count)
        return found
