"""2-bit or 4-bit codes for the tokens that an eviction policy would drop; those that it keeps stay exact.

June Yong Yang, Byeongwook Kim, Jeongin Bae, Beomseok Kwon, Gunho Park, Eunho Yang, Se Jung Kwon, Dongsoo Lee: No Token Left Behind:
Reliable KV Cache Compression via Importance-Aware Mixed Precision Quantization, 2024, arXiv 2402.18096.

Once for each model:
1. Run texts. For each layer, kv head and channel, note the largest magnitude of the queries, after the rotation.
During generation, the keep policy says which tokens stay exact in each head. For each page of 32 others of one head:
2. The balancer of a channel: b = sqrt(largest magnitude of queries / largest magnitude of keys).
3. The key of a token, times b, and its value are encoded on a grid of the token: 2^bits even steps from the least to the largest element.
4. Score: (query / b) times codes, times the token's scale, plus its zero times the sum of query / b. Output as with kivi.
A token that was encoded stays so.

Differs: the balancer has the queries of a calibration and the keys of the page, not those of the prompt; tokens are encoded when a head
has 32 of them; a group is a whole token; the tokens that stay are not encoded; no 3 bits, which a byte does not hold evenly.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from redraft.card import Card, Guarantee
from redraft.core.sequence import UNLIMITED
from redraft.errors import InvalidInput
from redraft.kv.channels import Profile
from redraft.kv.quantization.kivi import ROOM, CodeUnits
from redraft.ops.arrays import Tensor, cast, device, dots, namespace, wide
from redraft.ops.format import PAGE, Array, Arrays
from redraft.options import Options

if TYPE_CHECKING:
    from redraft.models.runner import Runner

LEAST = 1e-5  # of both magnitudes


class Queries(Profile):
    """scores: the largest magnitude of the channels of queries."""

    method = "mikv"


@dataclass(frozen=True)
class MiKV(Options):
    """bits: of a code, 2 or 4; balance: whether channels are balanced, which needs a calibration; profile: its file, None for the place
    where `redraft calibrate` writes it. The keep policy of the request says which tokens stay exact."""

    bits: int = 2
    balance: bool = True
    profile: Path | None = None

    card: ClassVar[Card] = Card(
        "MiKV",
        "Yang, Kim, Bae, Kwon, Park, Yang, Kwon, Lee, No Token Left Behind: Reliable KV Cache Compression via Importance-Aware Mixed "
        "Precision Quantization, 2024, arXiv 2402.18096",
        Guarantee.LOSSY,
        needs="a keep policy; a calibration of the model, once: redraft calibrate --method mikv",
        deviates="queries of a calibration; a balancer for each page of 32 tokens; whole tokens as groups; kept tokens stay exact",
        summary="Encodes what a keep policy would evict; drops nothing",
        beside="keep=h2o:budget={part}",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits not in (2, 4):
            raise InvalidInput(f"mikv:bits={self.bits}: must be 2 or 4")

    def open(self, runner: Runner) -> BalancedUnits:
        """Raises InvalidInput if the profile is missing or belongs to another model; CheckpointError if it is damaged."""
        queries = Queries.opened(runner, self.profile).scores if self.balance else None
        return BalancedUnits(runner.spec.head_dim, runner.backend.dtype, self.bits, queries)

    @staticmethod
    def calibrate(runner: Runner, texts: Seq[Seq[int]], samples: int = 256) -> Queries:
        """Token ids of texts -> Queries; see Profile.measured."""
        return Queries.measured(runner, texts, samples, lambda q, k: namespace(q).max(namespace(q).abs(q), axis=2), largest=True)  # 1.


class BalancedUnits(CodeUnits):
    """The codec. A token of one head takes D bits / 4 + 4 b + D b / 32 bytes, where b is the size of the backend's dtype: at D = 64 in
    bfloat16 44 bytes with 2 bits and 76 with 4. queries: f32 [L, K, D], None for a balancer of 1.

    A page is encoded when an eviction policy gives up its tokens. An element that is not finite spoils its token only.
    """

    def __init__(self, head_dim: int, dtype: Any, bits: int, queries: NDArray[np.float32] | None) -> None:
        super().__init__(head_dim, dtype, UNLIMITED, bits)
        self.queries = None if queries is None else queries.reshape(-1, head_dim)
        self.name = f"mikv-{bits}-{'even' if queries is None else sha256(queries.tobytes()).hexdigest()[:16]}"
        tokens = Array((PAGE,), dtype)
        self.arrays = {
            **self.arrays,
            "values": self.arrays["values"]._replace(whole=True),  # tokens that were encoded do not move
            "key_scales": tokens,
            "key_zeros": tokens,
            "balance": Array((head_dim,), dtype, whole=True),  # 1 / b
        }

    @np.errstate(all="ignore")
    def pack(self, keys: Tensor, values: Tensor, lanes: Any = None) -> dict[str, Tensor]:
        exact = wide(self.dtype)
        x = cast(keys, exact)
        balance = cast(self._balance(x, lanes), self.dtype)
        k, key_scales, key_zeros = self._encode(x / cast(balance, exact)[..., None, :], -1)
        v, value_scales, value_zeros = self._encode(values, -1)  # 3.
        made = {"keys": k, "values": v, "key_scales": key_scales, "key_zeros": key_zeros}
        return {**made, "value_scales": value_scales, "value_zeros": value_zeros, "balance": balance}

    def _balance(self, x: Tensor, lanes: Any) -> Tensor:
        """2. x [m, 32, D] -> 1 / b [m, D]."""
        xp = namespace(x)
        if self.queries is None:
            return xp.ones_like(x[..., 0, :])
        assert lanes is not None, "the queries are those of the layer and head"
        queries = xp.asarray(self.queries[np.asarray(lanes)], dtype=x.dtype, device=device(x))
        largest = xp.max(xp.where(xp.isfinite(x), xp.abs(x), xp.zeros_like(x)), axis=-2)
        found: Tensor = xp.sqrt(xp.clip(largest, min=LEAST) / xp.clip(queries, min=LEAST))
        return found

    def scores(self, held: Arrays, q: Tensor) -> Tensor:
        xp, (heads, rows, size), count = namespace(q), q.shape, held["keys"].shape[1]
        found, run = [], max(1, ROOM // max(1, heads * rows * size))
        for at in range(0, count, run):
            codes, scales, zeros, balance = (held[name][:, at : at + run] for name in ("keys", "key_scales", "key_zeros", "balance"))
            scales, zeros, balance = (cast(part, q.dtype) for part in (scales, zeros, balance))
            products = dots(q[:, None] * balance[:, :, None], self._unpack(codes, q.dtype)) * scales[:, :, None]  # [K, run, R, 32]
            sums = xp.permute_dims(dots(q, balance), (0, 2, 1))[..., None]  # [K, run, R, 1]
            found.append(xp.permute_dims(products + sums * zeros[:, :, None], (0, 2, 1, 3)).reshape(heads, rows, -1))  # 4.
        scores: Tensor = xp.concat(found, axis=-1)
        return scores

    def _meant(self, held: Arrays) -> tuple[Tensor, Tensor]:
        exact, found = wide(self.dtype), []
        for name in ("key", "value"):
            scales, zeros = (cast(held[f"{name}_{part}"], exact)[..., None] for part in ("scales", "zeros"))
            found.append(self._unpack(held[f"{name}s"], exact) * scales + zeros)
        return found[0] * cast(held["balance"], exact)[..., None, :], found[1]
