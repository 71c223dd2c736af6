"""Older pages as 2-bit or 4-bit codes: keys with a grid for each channel, values with a grid for each token. The newest tokens stay exact.

Zirui Liu, Jiayi Yuan, Hongye Jin, Shaochen (Henry) Zhong, Zhaozhuo Xu, Vladimir Braverman, Beidi Chen, Xia Hu: KIVI: A Tuning-Free
Asymmetric 2bit Quantization for KV Cache, 2024, arXiv 2402.02750.

1. A group is a channel of the keys over the 32 tokens of a page, or the value of one token.
2. Its grid has 2^bits even steps from its least to its largest element: zero = least, scale = (largest - least) / (2^bits - 1).
3. Codes are rounded half to even and packed 8 / bits in a byte: the first channels in the lowest bits, the last in the highest.
4. Score: (query times the channels' scales) times codes, plus query times the channels' zeros.
5. Output: (weights times the tokens' scales) times codes, plus weights times the tokens' zeros.

Differs: a group of values is a whole token, not 32 channels of it; values are encoded by whole pages like keys, while the paper keeps
a sliding window of exact values; prompt rows after a sync point see codes too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from redraft.card import Card, Guarantee
from redraft.errors import InvalidInput, Unsupported
from redraft.ops.arrays import Tensor, cast, dots, mixed, namespace, same_library, wide
from redraft.ops.format import CODE_BLOCKS, PAGE, Array, Arrays
from redraft.options import Options, number

ROOM = 2**22  # elements of scaled queries at once; each page has its own, so a chunk of many rows would need too much memory
PAPER = (
    "Liu, Yuan, Jin, Zhong, Xu, Braverman, Chen, Hu, KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache, 2024, arXiv 2402.02750"
)


@dataclass(frozen=True)
class KIVI(Options):
    """bits: of a code, 2 or 4; block: the number of tokens that are encoded at once. The newest 0 to block - 1 committed tokens stay
    exact."""

    bits: int = 2
    block: int = number(128, ge=PAGE, multiple_of=PAGE)

    card: ClassVar[Card] = Card(
        "KIVI",
        PAPER,
        Guarantee.LOSSY,
        deviates="whole tokens as groups of values; exact values end at a sync point like keys, not in a sliding window",
        summary="2 bits for older pages; for the longest contexts",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits not in (2, 4):
            raise InvalidInput(f"kivi:bits={self.bits}: must be 2 or 4")

    def open(self, runner: Any) -> CodeUnits:
        return CodeUnits(runner.spec.head_dim, runner.backend.dtype, self.block, self.bits)


@dataclass(frozen=True)
class Int4(Options):
    """block: the number of tokens that are encoded at once. The newest 0 to block - 1 committed tokens stay exact."""

    block: int = number(128, ge=PAGE, multiple_of=PAGE)

    card: ClassVar[Card] = Card(
        "KIVI, 4 bits",
        PAPER,
        Guarantee.LOSSY,
        deviates="4 bits; whole tokens as groups of values; exact values end at a sync point like keys, not in a sliding window",
        summary="4 bits for older pages; when cache memory is short",
    )

    def open(self, runner: Any) -> CodeUnits:
        return KIVI(4, self.block).open(runner)


class CodeUnits:
    """The codec. A token of one head takes D bits / 4 + (2 D + 64) b / 32 bytes, where b is the size of the backend's dtype: at D = 64
    in bfloat16 44 bytes with 2 bits and 76 with 4.

    Scales and zeros have the backend's dtype. A zero is one of the elements and therefore exact; so is a group of equal elements. An
    element changes by at most half a scale, apart from rounding. An element that is not finite spoils its whole group. `decode`
    rounds to the backend's dtype; `scores` and `mix` use unrounded numbers.
    """

    def __init__(self, head_dim: int, dtype: Any | np.dtype[Any], block: int, bits: int) -> None:
        self.bits, self.name = bits, f"int{bits}"
        self.layout = CODE_BLOCKS[bits]
        if head_dim % (8 // bits):
            raise Unsupported(f"codec '{self.name}' packs {8 // bits} channels into a byte, which do not divide the head size {head_dim}")
        self.dtype, self.block = dtype, block
        channels, tokens, packed = Array((head_dim,), dtype, whole=True), Array((PAGE,), dtype), same_library(dtype, "uint8")
        self.arrays: Mapping[str, Array] = {
            "keys": Array((PAGE, head_dim * bits // 8), packed, whole=True),  # a key code is valid with the grid of its page only
            "values": Array((PAGE, head_dim * bits // 8), packed),
            "key_scales": channels,
            "key_zeros": channels,
            "value_scales": tokens,
            "value_zeros": tokens,
        }

    def store(self, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        raise Unsupported(f"codec {self.name!r} encodes whole pages; single tokens are written to exact pages")

    def pack(self, keys: Tensor, values: Tensor, lanes: Any = None) -> dict[str, Tensor]:
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
        """x [..., 32, D] -> codes [..., 32, D bits / 8], scales and zeros of groups along dimension `along`."""
        xp, exact, steps = namespace(x), wide(self.dtype), 2**self.bits - 1
        x = cast(x, exact)
        low, high = xp.min(x, axis=along, keepdims=True), xp.max(x, axis=along, keepdims=True)  # 1.
        scales, zeros = cast((high - low) / steps, self.dtype), cast(low, self.dtype)  # 2.
        places = xp.nan_to_num((x - cast(zeros, exact)) / cast(scales, exact), nan=0.0, posinf=0.0, neginf=0.0)
        codes = cast(xp.clip(xp.round(places), 0, steps), xp.uint8)
        size = codes.shape[-1] * self.bits // 8
        packed = codes[..., :size]
        for i in range(1, 8 // self.bits):  # 3.
            packed = packed | codes[..., i * size : (i + 1) * size] << i * self.bits
        return packed, xp.squeeze(scales, axis=along), xp.squeeze(zeros, axis=along)

    def scores(self, held: Arrays, q: Tensor) -> Tensor:
        xp, (heads, rows, size), count = namespace(q), q.shape, held["keys"].shape[1]
        found, run = [], max(1, ROOM // max(1, heads * rows * size))
        for at in range(0, count, run):
            codes, scales, zeros = (held[name][:, at : at + run] for name in ("keys", "key_scales", "key_zeros"))
            products = dots(q[:, None] * cast(scales, q.dtype)[:, :, None], self._unpack(codes, q.dtype))  # [K, run, R, 32]
            some = xp.permute_dims(products, (0, 2, 1, 3)) + dots(q, cast(zeros, q.dtype))[..., None]  # 4.
            found.append(some.reshape(heads, rows, -1))
        scores: Tensor = xp.concat(found, axis=-1)
        return scores

    def mix(self, held: Arrays, weights: Tensor) -> Tensor:
        heads, _, slots = weights.shape
        scales, zeros = (cast(held[name], weights.dtype).reshape(heads, 1, slots) for name in ("value_scales", "value_zeros"))
        codes = self._unpack(held["values"], weights.dtype).reshape(heads, slots, -1)
        found: Tensor = mixed(weights * scales, codes) + dots(weights, zeros)  # 5.
        return found

    def decode(self, held: Arrays) -> tuple[Tensor, Tensor]:
        keys, values = self._meant(held)
        return cast(keys, self.dtype), cast(values, self.dtype)

    def _meant(self, held: Arrays) -> tuple[Tensor, Tensor]:
        """What the codes mean, unrounded."""
        exact, found = wide(self.dtype), []
        for name, along in (("key", np.s_[..., None, :]), ("value", np.s_[..., None])):
            scales, zeros = (cast(held[f"{name}_{part}"], exact)[along] for part in ("scales", "zeros"))
            found.append(self._unpack(held[f"{name}s"], exact) * scales + zeros)
        return found[0], found[1]

    def _unpack(self, packed: Tensor, dtype: Any | np.dtype[Any]) -> Tensor:
        """Bytes [..., D bits / 8] -> codes [..., D]."""
        parts = [packed >> shift & 2**self.bits - 1 for shift in range(0, 8, self.bits)]
        found: Tensor = cast(namespace(packed).concat(parts, axis=-1), dtype)
        return found
