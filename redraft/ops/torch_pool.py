"""The pool of the PyTorch backend: one tensor, and views of it for every page format."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import gcd, prod
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from redraft.core.sequence import Lanes, Space
from redraft.core.spec import ModelSpec
from redraft.core.tree import I32
from redraft.errors import Unsupported
from redraft.ops.format import Arrays, Format, PageCodec


class Exact:
    """Unencoded keys and values, with the methods of a codec."""

    def store(self, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        return {"keys": keys, "values": values}

    def pack(self, keys: Tensor, values: Tensor, lanes: I32 | None = None) -> dict[str, Tensor]:
        return self.store(keys, values)

    def scores(self, held: Arrays, q: Tensor) -> Tensor:
        found: Tensor = q @ held["keys"].flatten(1, 2).to(q.dtype).mT
        return found

    def mix(self, held: Arrays, weights: Tensor) -> Tensor:
        found: Tensor = weights @ held["values"].flatten(1, 2).to(weights.dtype)
        return found

    def decode(self, held: Arrays) -> tuple[Tensor, Tensor]:
        return held["keys"], held["values"]


class FormatStore:
    """The units of one format, as views of the memory of the pool. Unit u has index u % per_block in block u // per_block.

    arrays: name -> [blocks, per_block, *shape]; codes: the names of the codec's arrays, all others are side data; bytes: u8[blocks,
    per_block, bytes of a unit].
    """

    def __init__(self, data: Tensor, fmt: Format) -> None:
        memory = data.view(-1)
        block_bytes = memory.numel() * memory.itemsize // len(data)
        self.format, self.codec, self.exact = fmt, fmt.codec or cast(PageCodec, Exact()), fmt.codec is None
        self.per_block = block_bytes // fmt.bytes
        if not self.per_block:
            raise Unsupported(f"format {fmt.name!r}: a unit takes {fmt.bytes} bytes, more than the {block_bytes} of a block")
        size, dtype = data.shape[-1], data.dtype
        sides = {name for side in fmt.sides for name in side.arrays(size, dtype)}
        self.codes = [name for name in fmt.arrays if name not in sides]
        self.bytes = memory.view(torch.uint8).as_strided((len(data), self.per_block, fmt.bytes), (block_bytes, fmt.bytes, 1))
        self.arrays: dict[str, Tensor] = {}
        # index_select of rows is several times faster than indexing by (block, place); rows may start at any multiple of the
        # greatest common divisor of both sizes
        grain = gcd(block_bytes, fmt.bytes)
        self._steps = block_bytes // grain, fmt.bytes // grain
        self._units: dict[str, Tensor] = {}
        self._slots: dict[str, tuple[Tensor, int, int]] = {}
        for name, at in fmt.offsets().items():
            shape, kind, whole = fmt.arrays[name]
            item, typed = kind.itemsize, memory.view(torch.uint8).view(kind)
            assert block_bytes % item == 0 and fmt.bytes % item == 0 and at % item == 0, f"format {fmt.name!r}: {name} is not aligned"
            inner = torch.empty(shape, device="meta").stride()
            steps = (block_bytes // item, fmt.bytes // item, *inner)
            self.arrays[name] = typed.as_strided((len(data), self.per_block, *shape), steps, at // item)
            self._units[name] = _rows(typed, at // item, prod(shape), grain // item)
            if not whole:
                slot = prod(shape[1:])
                step = gcd(grain // item, slot)
                self._slots[name] = _rows(typed, at // item, slot, step), grain // item // step, slot // step

    def at(self, units: Tensor) -> tuple[Tensor, Tensor]:
        return units // self.per_block, units % self.per_block

    def take(self, names: Iterable[str], units: Tensor) -> dict[str, Tensor]:
        """The arrays [*units.shape, *shape] of these units."""
        block, place = self.at(units.flatten())
        rows = block * self._steps[0] + place * self._steps[1]
        return {name: self._units[name].index_select(0, rows).view(*units.shape, *self.format.arrays[name].shape) for name in names}

    def pick(self, names: Iterable[str], units: Tensor, offsets: Tensor) -> dict[str, Tensor]:
        """The entries [*units.shape, *shape[1:]] of per-slot arrays at these units and offsets."""
        block, place = self.at(units.flatten())
        rows, found = block * self._steps[0] + place * self._steps[1], {}
        for name in names:
            slots, unit, step = self._slots[name]
            got = slots.index_select(0, rows * unit + offsets.flatten() * step)
            found[name] = got.view(*units.shape, *self.format.arrays[name].shape[1:])
        return found

    def put(self, arrays: Arrays, units: Tensor) -> None:
        for name, value in arrays.items():
            self.arrays[name][self.at(units)] = value


def _rows(memory: Tensor, start: int, size: int, step: int) -> Tensor:
    """[n, size]: rows of flat memory that begin at start, start + step, ...; rows may overlap."""
    return memory.as_strided(((len(memory) - start - size) // step + 1, size), (step, 1), start)


@dataclass
class TorchPool:
    """data: [blocks, layers, kv heads, 2 (key, value), 32, D] in the backend's dtype; formats: name of a format -> its units in the same
    memory."""

    data: Tensor
    spec: ModelSpec
    formats: dict[str, FormatStore] = field(default_factory=dict)

    def units(self, space: Space, pages: I32) -> NDArray[np.int64]:
        """i64[pages, units of a page]: the units of these pages."""
        layers, heads = self.data.shape[1:3]
        count = {Lanes.SHARED: layers * heads, Lanes.PER_LAYER: heads, Lanes.PER_HEAD: 1}[space.lanes]
        return pages.astype(np.int64)[:, None] * count + np.arange(count)
