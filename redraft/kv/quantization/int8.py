"""Keys and values as 8-bit integers, with one scale for each vector of a token and head.

Tim Dettmers, Mike Lewis, Younes Belkada, Luke Zettlemoyer: LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale,
2022, arXiv 2208.07339 (its grid for rows of hidden states). For caches this is common practice without a paper of its own; vLLM's
`int8_per_token_head` has the same layout.

1. The scale of a vector is its largest magnitude / 127.
2. Its codes are the multiples of the scale, rounded half to even.
3. Score: query times codes, times the key's scale.
4. Output: weights times the values' scales, times codes.

Error bounds. |q.k' - q.k| <= sum|q| max|k| / 254 for a query q, a key k and its decoded codes k'. Each channel of an output changes by
at most the largest max|v| / 254 of the tokens that it reads. Both hold up to rounding of float32, and for one layer with given inputs.
The change of a whole text is not bounded.

Differs: it encodes keys and values of a cache, not the factors of a product; there are no separate outlier columns; queries and
weights stay floating point.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from redraft.card import Card, Guarantee
from redraft.ops.arrays import Tensor, cast, dots, mixed, namespace, same_library, wide, widened
from redraft.ops.format import INT8_VECTORS, PAGE, Array, Arrays

LARGEST_CODE = 127
LARGEST_SCALE = 2.679388e36  # its product with LARGEST_CODE is still a finite float32


@dataclass(frozen=True)
class Int8:
    """No hyper-parameters."""

    card: ClassVar[Card] = Card(
        "8-bit keys and values",
        "Dettmers, Lewis, Belkada, Zettlemoyer, LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale, 2022, arXiv 2208.07339",
        Guarantee.NEAR,
        deviates="the paper's grid, on cached keys and values; no outlier columns; queries and weights stay floating point",
        summary="8 bits for the cache; half the memory, nearly exact",
    )

    def open(self, runner: Any) -> Int8Units:
        return Int8Units(runner.spec.head_dim, runner.backend.dtype)


class Int8Units:
    """The codec. A token of one head takes 2 D + 8 bytes. The codes of a token depend on that token alone.

    A vector decodes to NaN as a whole if an element is not finite, or so large that float32 cannot hold the scale. Rows that do not see
    such a vector are not affected. Vectors below 1e-36 lose precision and become zero in the end. `decode` rounds to the backend's
    dtype; `scores` and `mix` use unrounded numbers.
    """

    name = "int8"
    block = 0
    layout = INT8_VECTORS

    def __init__(self, head_dim: int, dtype: Any | np.dtype[Any]) -> None:
        self.dtype = dtype
        codes, scales = Array((PAGE, head_dim), same_library(dtype, "int8")), Array((PAGE,), same_library(dtype, "float32"))
        self.arrays: Mapping[str, Array] = {"keys": codes, "values": codes, "key_scales": scales, "value_scales": scales}

    def store(self, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        """Vectors [..., D] -> codes [..., D] and scales [...]."""
        (k, key_scales), (v, value_scales) = _encode(keys), _encode(values)
        return {"keys": k, "values": v, "key_scales": key_scales, "value_scales": value_scales}

    def pack(self, keys: Tensor, values: Tensor, lanes: Any = None) -> dict[str, Tensor]:
        return self.store(keys, values)

    def scores(self, held: Arrays, q: Tensor) -> Tensor:
        scales = cast(held["key_scales"], q.dtype).reshape(len(q), 1, -1)
        found: Tensor = dots(q, cast(held["keys"], q.dtype).reshape(len(q), -1, q.shape[-1])) * scales  # 3.
        return found

    def mix(self, held: Arrays, weights: Tensor) -> Tensor:
        scales = cast(held["value_scales"], weights.dtype).reshape(len(weights), 1, -1)
        shares = namespace(weights).where(weights == 0, weights, weights * scales)  # 0 x NaN is NaN
        found: Tensor = mixed(shares, cast(held["values"], weights.dtype).reshape(len(weights), weights.shape[-1], -1))  # 4.
        return found

    def decode(self, held: Arrays) -> tuple[Tensor, Tensor]:
        exact = wide(self.dtype)
        keys, values = (cast(held[f"{name}s"], exact) * cast(held[f"{name}_scales"], exact)[..., None] for name in ("key", "value"))
        return cast(keys, self.dtype), cast(values, self.dtype)


@np.errstate(all="ignore")
def _encode(x: Tensor) -> tuple[Tensor, Tensor]:
    xp, x = namespace(x), widened(x)
    scales = cast(xp.max(xp.abs(x), axis=-1) / LARGEST_CODE, xp.float32)  # 1.
    scales = xp.where(xp.isinf(scales), scales, xp.clip(scales, max=LARGEST_SCALE))
    steps = xp.nan_to_num(x / scales[..., None], nan=0.0, posinf=0.0, neginf=0.0)  # 0 where the scale is 0 or not finite
    return cast(xp.clip(xp.round(steps), -LARGEST_CODE, LARGEST_CODE), xp.int8), scales  # 2.
