"""KIVI's codes, with the largest errors stored beside them and the rest of the error as a product of thin matrices.

Hao Kang, Qingru Zhang, Souvik Kundu, Geonhwa Jeong, Zaoxing Liu, Tushar Krishna, Tuo Zhao: GEAR: An Efficient KV Cache Compression
Recipe for Near-Lossless Generative Inference of LLM, 2024, arXiv 2403.05527.

For the keys and for the values of a page of 32 tokens of one head:
1. Of each group (a channel of keys, a token of values) the `outliers` smallest and as many largest elements are outliers. The grid of the
   group covers the other elements only.
2. All elements are encoded on their grid; an outlier lies beyond its end.
3. Residual: elements minus what the codes mean, 0 for outliers. Its factors A [32, r] and B [D, r]: from a fixed B, three times
   A = residual times B, with orthonormal columns, and B = residual transposed times A.
4. What is still missing at an outlier is stored with its place.
5. Score: that of the codes, plus (query times B) times A transposed, plus query times what outliers lack. Output likewise.

Differs: blocks are pages, with the same rank for the prompt and for new tokens; a number of outliers in each group, not a share of them
(1 of each kind is 6 % of the keys of a page and 3 % of values of 64 channels); factors and outliers have the dtype of the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from redraft.card import Card, Guarantee
from redraft.errors import InvalidInput, Unsupported
from redraft.kv.quantization.kivi import CodeUnits
from redraft.ops.arrays import Tensor, cast, device, dots, mixed, namespace, same_library, wide
from redraft.ops.format import PAGE, Array, Arrays
from redraft.options import Options, number

POWERS = 3
LARGEST_SIZE = 256  # of a head: the channel of an outlier is a byte


@dataclass(frozen=True)
class GEAR(Options):
    """bits: of a code, 2 or 4; rank: of the product that stands for the error; outliers: the number of smallest, and of largest, elements
    of a group that are stored exactly; block: the number of tokens that are encoded at once. The newest 0 to block - 1 committed tokens
    stay exact. With rank=0,outliers=0 it is kivi."""

    bits: int = 2
    rank: int = number(1, ge=0, le=8)
    outliers: int = number(1, ge=0, le=4)
    block: int = number(128, ge=PAGE, multiple_of=PAGE)

    card: ClassVar[Card] = Card(
        "GEAR",
        "Kang, Zhang, Kundu, Jeong, Liu, Krishna, Zhao, GEAR: An Efficient KV Cache Compression Recipe for Near-Lossless Generative "
        "Inference of LLM, 2024, arXiv 2403.05527",
        Guarantee.LOSSY,
        deviates="factors for each page of 32 tokens; a number of outliers in each group; both in the dtype of the cache",
        summary="2 bits, errors repaired; between kivi and int4",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits not in (2, 4):
            raise InvalidInput(f"gear:bits={self.bits}: must be 2 or 4")

    def open(self, runner: Any) -> CodeUnits:
        size, dtype = runner.spec.head_dim, runner.backend.dtype
        if not self.rank and not self.outliers:
            return CodeUnits(size, dtype, self.block, self.bits)
        return RepairedUnits(size, dtype, self.block, self.bits, self.rank, self.outliers)


class RepairedUnits(CodeUnits):
    """The codec. Beside the codes a page of one head takes 2 r (32 + D) b bytes for factors and 2 n (32 + D) (b + 1) for outliers, where n
    is `outliers` and b the size of the backend's dtype. At D = 64 in bfloat16 a token takes 44 bytes with 2 bits, each rank adds 12 and
    each outlier of a kind 18; exact tokens take 256."""

    def __init__(self, head_dim: int, dtype: Any, block: int, bits: int, rank: int, outliers: int) -> None:
        super().__init__(head_dim, dtype, block, bits)
        if head_dim > LARGEST_SIZE or 2 * outliers >= head_dim:
            raise Unsupported(f"gear:outliers={outliers}: the head size {head_dim} is not in {2 * outliers + 1} to {LARGEST_SIZE}")
        self.rank, self.outliers = rank, outliers
        self.name = f"gear-{bits}-{rank}-{outliers}"
        more: dict[str, Array] = {}
        if rank:
            left, right = Array((rank, PAGE), dtype, whole=True), Array((rank, head_dim), dtype, whole=True)
            more |= {"key_left": left, "key_right": right, "value_left": left, "value_right": right}
        if outliers:
            count, places = 2 * outliers, same_library(dtype, "uint8")
            more |= {
                "key_outliers": Array((count, head_dim), dtype, whole=True),
                "key_places": Array((count, head_dim), places, whole=True),
                "value_outliers": Array((PAGE, count), dtype),
                "value_places": Array((PAGE, count), places),
            }
        self.arrays = {**self.arrays, **more}

    @np.errstate(all="ignore")
    def pack(self, keys: Tensor, values: Tensor, lanes: Any = None) -> dict[str, Tensor]:
        exact = wide(self.dtype)
        given = {"key": (cast(keys, exact), -2), "value": (cast(values, exact), -1)}
        places = {name: self._places(x, along) for name, (x, along) in given.items()}
        inner = {name: _without(x, places[name], along) for name, (x, along) in given.items()}  # 1.
        made = super().pack(inner["key"], inner["value"])  # 2.
        for (name, (x, along)), meant in zip(given.items(), super()._meant(made), strict=True):
            if self.rank:
                left, right = self._factors(_filled(x - meant, places[name], 0.0, along))
                made |= {f"{name}_left": left, f"{name}_right": right}
                meant = meant + self._product(left, right, exact)
            if self.outliers:
                lacking = namespace(x).take_along_axis(x - meant, places[name], axis=along)  # 4.
                kind = same_library(self.dtype, "uint8")
                made |= {f"{name}_outliers": cast(lacking, self.dtype), f"{name}_places": cast(places[name], kind)}
        return {name: made[name] for name in self.arrays}

    def scores(self, held: Arrays, q: Tensor) -> Tensor:
        found = super().scores(held, q)
        repairs = self._repairs(held, "key", q.dtype)
        return found + dots(q, repairs.reshape(len(q), -1, q.shape[-1]))  # 5.

    def mix(self, held: Arrays, weights: Tensor) -> Tensor:
        repairs = self._repairs(held, "value", weights.dtype)
        return super().mix(held, weights) + mixed(weights, repairs.reshape(*weights.shape[::2], -1))

    def _meant(self, held: Arrays) -> tuple[Tensor, Tensor]:
        keys, values = super()._meant(held)
        exact = wide(self.dtype)
        return keys + self._repairs(held, "key", exact), values + self._repairs(held, "value", exact)

    def _repairs(self, held: Arrays, name: str, dtype: Any) -> Tensor:
        """[..., 32, D]: what is added to the meaning of codes."""
        along, parts = -2 if name == "key" else -1, []
        if self.rank:
            parts.append(self._product(held[f"{name}_left"], held[f"{name}_right"], dtype))
        if self.outliers:
            lacking, places = cast(held[f"{name}_outliers"], dtype), held[f"{name}_places"]
            xp = namespace(lacking)
            slots = xp.arange(PAGE if along == -2 else self.arrays["key_outliers"].shape[-1], device=device(lacking))
            for i in range(2 * self.outliers):
                if along == -2:
                    here = places[..., i, None, :] == slots[:, None]
                    parts.append(xp.where(here, lacking[..., i, None, :], xp.zeros_like(lacking[..., :1, :])))
                else:
                    here = places[..., i, None] == slots
                    parts.append(xp.where(here, lacking[..., i, None], xp.zeros_like(lacking[..., :1])))
        found: Tensor = sum(parts[1:], parts[0])
        return found

    def _product(self, left: Tensor, right: Tensor, dtype: Any) -> Tensor:
        """Factors [..., r, 32] and [..., r, D] -> [..., 32, D]."""
        columns = zip(*(namespace(x).unstack(cast(x, dtype), axis=-2) for x in (left, right)), strict=True)
        terms = [a[..., :, None] * b[..., None, :] for a, b in columns]
        found: Tensor = sum(terms[1:], terms[0])
        return found

    def _places(self, x: Tensor, along: int) -> Tensor:
        """The places of the outliers of each group, the smallest first: like x, with 2 n instead of the group's size."""
        xp = namespace(x)
        order = xp.argsort(x, axis=along, stable=True)
        size, count = x.shape[along], self.outliers
        some = xp.asarray([*range(count), *range(size - count, size)], dtype=xp.int64, device=device(x))
        found: Tensor = xp.take(order, some, axis=along)
        return found

    def _factors(self, residual: Tensor) -> tuple[Tensor, Tensor]:
        """3. [m, 32, D] -> A [m, r, 32] and B [m, r, D], of which the first ones do not depend on r."""
        xp = namespace(residual)
        residual = xp.nan_to_num(residual, nan=0.0, posinf=0.0, neginf=0.0)
        size = residual.shape[-1]
        start = np.cos(np.outer(np.arange(1, self.rank + 1), np.arange(size)) + 1)
        right = xp.broadcast_to(xp.asarray(start, dtype=residual.dtype, device=device(residual)), (len(residual), self.rank, size))
        for _ in range(POWERS):
            left = _orthonormal(dots(right, residual))
            right = mixed(left, residual)
        return cast(left, self.dtype), cast(right, self.dtype)


def _filled(x: Tensor, places: Tensor, value: float, along: int) -> Tensor:
    """x with a number in these places of each group."""
    xp = namespace(x)
    slots = xp.arange(x.shape[along], device=device(x))
    slots = slots[:, None] if along == -2 else slots
    for place in xp.unstack(places, axis=along):
        x = xp.where(xp.expand_dims(place, axis=along) == slots, xp.asarray(value, dtype=x.dtype, device=device(x)), x)
    return x


def _without(x: Tensor, places: Tensor, along: int) -> Tensor:
    """x with each outlier moved to the nearest end of the range of the others."""
    xp = namespace(x)
    low, high = (fold(_filled(x, places, end, along), axis=along, keepdims=True) for fold, end in ((xp.min, np.inf), (xp.max, -np.inf)))
    found: Tensor = xp.minimum(xp.maximum(x, low), high)
    return found


def _orthonormal(x: Tensor) -> Tensor:
    """x [m, r, n] with orthonormal rows, each from those before it; a row of zeros stays."""
    xp, found = namespace(x), list[Tensor]()
    for i in range(x.shape[-2]):
        row = x[..., i : i + 1, :]
        for other in found * 2:  # twice, against cancellation
            row = row - dots(row, other) * other
        norm = xp.sqrt(dots(row, row))
        found.append(xp.where(norm > 0, row / xp.where(norm > 0, norm, xp.ones_like(norm)), xp.zeros_like(row)))
    made: Tensor = xp.concat(found, axis=-2)
    return made
