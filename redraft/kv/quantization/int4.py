"""Older pages as 4-bit codes: keys with a grid for each channel, values with a grid for each token. The newest tokens stay exact.

Zirui Liu, Jiayi Yuan, Hongye Jin, Shaochen (Henry) Zhong, Zhaozhuo Xu, Vladimir Braverman, Beidi Chen, Xia Hu: KIVI: A Tuning-Free
Asymmetric 2bit Quantization for KV Cache, 2024, arXiv 2402.02750.

1. A group is a channel of the keys over the 32 tokens of a page, or the value of one token.
2. Its grid has 16 even steps from its least to its largest element: zero = least, scale = (largest - least) / 15.
3. Codes are rounded half to even and packed two in a byte: the first half of the channels in the low bits, the second in the high.
4. Score: (query times the channels' scales) times codes, plus query times the channels' zeros.
5. Output: (weights times the tokens' scales) times codes, plus weights times the tokens' zeros.

Differs: 4 bits instead of 2; a group of values is a whole token, not 32 channels of it; values are encoded by whole pages like keys,
while the paper keeps a sliding window of exact values; prompt rows after a sync point see codes too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from redraft.card import Card, Guarantee
from redraft.errors import Unsupported
from redraft.ops.arrays import Tensor, cast, dots, mixed, namespace, same_library, wide
from redraft.ops.format import INT4_BLOCKS, PAGE, Array, Arrays
from redraft.options import Options, number

STEPS = 15
ROOM = 2**22  # elements of scaled queries at once; each page has its own, so a chunk of many rows would need too much memory


@dataclass(frozen=True)
class Int4(Options):
    """block: the number of tokens that are encoded at once. The newest 0 to block - 1 committed tokens stay exact."""

    block: int = number(128, ge=PAGE, multiple_of=PAGE)

    card: ClassVar[Card] = Card(
        "KIVI, 4 bits",
        "Liu, Yuan, Jin, Zhong, Xu, Braverman, Chen, Hu, KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache, 2024, "
        "arXiv 2402.02750",
        Guarantee.LOSSY,
        deviates="4 bits; whole tokens as groups of values; exact values end at a sync point like keys, not in a sliding window",
        summary="4 bits for older pages; when cache memory is short",
    )

    def open(self, runner: Any) -> Int4Units:
        return Int4Units(runner.spec.head_dim, runner.backend.dtype, self.block)


class Int4Units:
    """The codec. A token of one head takes D + (2 D + 64) b / 32 bytes, where b is the size of the backend's dtype: 76 bytes at D = 64
    in bfloat16.

    Scales and zeros have the backend's dtype. A zero is one of the elements and therefore exact; so is a group of equal elements. An
    element changes by at most half a scale, apart from rounding. An element that is not finite spoils its whole group. `decode`
    rounds to the backend's dtype; `scores` and `mix` use unrounded numbers.
    """

    name = "int4"
    layout = INT4_BLOCKS

    def __init__(self, head_dim: int, dtype: Any | np.dtype[Any], block: int) -> None:
        if head_dim % 2:
            raise Unsupported(f"codec 'int4' packs two channels into a byte, but the head size {head_dim} is odd")
        self.dtype, self.block = dtype, block
        channels, tokens, packed = Array((head_dim,), dtype, whole=True), Array((PAGE,), dtype), same_library(dtype, "uint8")
        self.arrays: Mapping[str, Array] = {
            "keys": Array((PAGE, head_dim // 2), packed, whole=True),  # a key code is valid with the grid of its page only
            "values": Array((PAGE, head_dim // 2), packed),
            "key_scales": channels,
            "key_zeros": channels,
            "value_scales": tokens,
            "value_zeros": tokens,
        }

    def store(self, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        raise Unsupported("codec 'int4' encodes whole pages; single tokens are written to exact pages")

    def pack(self, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        (k, key_scales, key_zeros), (v, value_scales, value_zeros) = self._encode(keys, -2), self._encode(values, -1)
        return {
            "keys": k,
            "values": v,
            "key_scales": key_scales,
            "key_zeros": key_zeros,
            "value_scales": value_scales,
            "value_zeros": value_zeros,
        }

    @np.errstate(all="ignore")
    def _encode(self, x: Tensor, along: int) -> tuple[Tensor, Tensor, Tensor]:
        """x [..., 32, D] -> codes [..., 32, D / 2], scales and zeros of groups along dimension `along`."""
        xp, exact = namespace(x), wide(self.dtype)
        x = cast(x, exact)
        low, high = xp.min(x, axis=along, keepdims=True), xp.max(x, axis=along, keepdims=True)  # 1.
        scales, zeros = cast((high - low) / STEPS, self.dtype), cast(low, self.dtype)  # 2.
        steps = xp.nan_to_num((x - cast(zeros, exact)) / cast(scales, exact), nan=0.0, posinf=0.0, neginf=0.0)
        codes = cast(xp.clip(xp.round(steps), 0, STEPS), xp.uint8)
        half = codes.shape[-1] // 2
        packed = codes[..., :half] | codes[..., half:] << 4
        return packed, xp.squeeze(scales, axis=along), xp.squeeze(zeros, axis=along)  # 3.

    def scores(self, held: Arrays, q: Tensor) -> Tensor:
        xp, (heads, rows, size), count = namespace(q), q.shape, held["keys"].shape[1]
        found, run = [], max(1, ROOM // max(1, heads * rows * size))
        for at in range(0, count, run):
            codes, scales, zeros = (held[name][:, at : at + run] for name in ("keys", "key_scales", "key_zeros"))
            products = dots(q[:, None] * cast(scales, q.dtype)[:, :, None], _unpack(codes, q.dtype))  # [K, run, R, 32]
            some = xp.permute_dims(products, (0, 2, 1, 3)) + dots(q, cast(zeros, q.dtype))[..., None]  # 4.
            found.append(some.reshape(heads, rows, -1))
        scores: Tensor = xp.concat(found, axis=-1)
        return scores

    def mix(self, held: Arrays, weights: Tensor) -> Tensor:
        heads, _, slots = weights.shape
        scales, zeros = (cast(held[name], weights.dtype).reshape(heads, 1, slots) for name in ("value_scales", "value_zeros"))
        codes = _unpack(held["values"], weights.dtype).reshape(heads, slots, -1)
        found: Tensor = mixed(weights * scales, codes) + dots(weights, zeros)  # 5.
        return found

    def decode(self, held: Arrays) -> tuple[Tensor, Tensor]:
        exact, found = wide(self.dtype), []
        for name, along in (("key", np.s_[..., None, :]), ("value", np.s_[..., None])):
            scales, zeros = (cast(held[f"{name}_{part}"], exact)[along] for part in ("scales", "zeros"))
            found.append(cast(_unpack(held[f"{name}s"], exact) * scales + zeros, self.dtype))
        return found[0], found[1]


def _unpack(packed: Tensor, dtype: Any | np.dtype[Any]) -> Tensor:
    """Bytes [..., D / 2] -> codes [..., D]."""
    found: Tensor = cast(namespace(packed).concat([packed & STEPS, packed >> 4], axis=-1), dtype)
    return found
