"""Keys without the channels that matter least: older pages store the others, and all of the values.

Yuhui Xu, Zhanming Jie, Hanze Dong, Lei Wang, Xudong Lu, Aojun Zhou, Amrita Saha, Caiming Xiong, Doyen Sahoo: ThinK: Thinner Key Cache
by Query-Driven Pruning, 2024, arXiv 2407.21018.

Once for each model:
1. Run texts. For each layer and kv head, average the square of each channel of the queries over tokens and query heads, after the
   rotation.
During generation, for each page of 32 tokens of one head:
2. The score of a channel is that average times the mean of the squares of the keys of the page.
3. Of D channels, the D - floor(share D) with the largest scores are stored, of equal scores the lower ones.
4. Scores of queries and keys leave the other channels out. They are still divided by the square root of D.

Differs: queries are those of a calibration, not the last ones of the prompt, so that a page depends on its own text only; channels are
chosen for each page; new tokens are thinned too, when their page is old; values keep their channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from math import floor
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from redraft.card import Card, Guarantee
from redraft.errors import Unsupported
from redraft.kv.channels import Profile
from redraft.ops.arrays import Tensor, cast, device, dots, mixed, namespace, same_library, wide
from redraft.ops.format import PAGE, THIN_KEYS, Array, Arrays
from redraft.options import Options, number

if TYPE_CHECKING:
    from redraft.models.runner import Runner

LARGEST_SIZE = 256  # of a head: a channel is a byte


class Queries(Profile):
    """scores: the mean of the squares of the channels of queries."""

    method = "think"


@dataclass(frozen=True)
class ThinK(Options):
    """share: the share of the channels of keys that is left out; block: the number of tokens that are encoded at once, the newest 0 to
    block - 1 committed tokens keep all channels; profile: the file of a calibration, None for the place where `redraft calibrate` writes
    it."""

    share: float = number(0.4, ge=0, lt=1)
    block: int = number(128, ge=PAGE, multiple_of=PAGE)
    profile: Path | None = None

    card: ClassVar[Card] = Card(
        "ThinK",
        "Xu, Jie, Dong, Wang, Lu, Zhou, Saha, Xiong, Sahoo, ThinK: Thinner Key Cache by Query-Driven Pruning, 2024, arXiv 2407.21018",
        Guarantee.LOSSY,
        needs="a calibration of the model, once: redraft calibrate --method think",
        deviates="queries of a calibration, not of the prompt's end; channels for each page of 32 tokens",
        summary="Leaves out channels of keys; a fifth less memory",
    )

    def open(self, runner: Runner) -> ThinUnits | None:
        """None if no channel is left out. Raises InvalidInput if the profile is missing or belongs to another model; CheckpointError if
        it is damaged."""
        size = runner.spec.head_dim
        if size > LARGEST_SIZE:
            raise Unsupported(f"think: the head size {size} is above {LARGEST_SIZE}")
        kept = size - floor(self.share * size)
        if kept == size:
            return None
        return ThinUnits(size, runner.backend.dtype, self.block, kept, Queries.opened(runner, self.profile).scores)

    @staticmethod
    def calibrate(runner: Runner, texts: Seq[Seq[int]], samples: int = 256) -> Queries:
        """Token ids of texts -> Queries; see Profile.measured."""
        return Queries.measured(runner, texts, samples, lambda q, k: namespace(q).mean(q * q, axis=2))  # 1.


class ThinUnits:
    """The codec. A page of one head takes 32 (kept + D) b + kept bytes, where b is the size of the backend's dtype: at D = 64 in bfloat16
    with 39 channels a token takes 208 bytes, an exact one 256. queries: f32 [L, K, D]. What is stored is exact."""

    layout = THIN_KEYS

    def __init__(self, head_dim: int, dtype: Any, block: int, kept: int, queries: NDArray[np.float32]) -> None:
        self.size, self.dtype, self.block, self.kept = head_dim, dtype, block, kept
        self.queries = queries.reshape(-1, head_dim)
        self.arrays: Mapping[str, Array] = {
            "keys": Array((PAGE, kept), dtype, whole=True),  # valid with the channels of its page only
            "values": Array((PAGE, head_dim), dtype),
            "channels": Array((kept,), same_library(dtype, "uint8"), whole=True),
        }

    @cached_property
    def name(self) -> str:
        return f"think-{self.kept}-{sha256(self.queries.tobytes()).hexdigest()[:16]}"

    def store(self, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        raise Unsupported("codec 'think' encodes whole pages; single tokens are written to exact pages")

    @np.errstate(all="ignore")
    def pack(self, keys: Tensor, values: Tensor, lanes: Any = None) -> dict[str, Tensor]:
        assert lanes is not None, "the channels depend on the layer and head"
        exact = wide(self.dtype)
        xp, x = namespace(keys), cast(keys, exact)
        queries = xp.asarray(self.queries[np.asarray(lanes)], dtype=exact, device=device(keys))
        scores = xp.nan_to_num(queries * xp.mean(x * x, axis=-2), nan=np.inf)  # 2.
        order = xp.argsort(scores, axis=-1, descending=True, stable=True)
        channels = xp.sort(order[..., : self.kept], axis=-1)  # 3.
        thin = xp.take_along_axis(keys, xp.broadcast_to(channels[..., None, :], (*keys.shape[:-1], self.kept)), axis=-1)
        return {"keys": thin, "values": values, "channels": cast(channels, same_library(self.dtype, "uint8"))}

    def scores(self, held: Arrays, q: Tensor) -> Tensor:
        found: Tensor = dots(q, cast(self._whole(held), q.dtype).reshape(len(q), -1, self.size))  # 4.
        return found

    def mix(self, held: Arrays, weights: Tensor) -> Tensor:
        found: Tensor = mixed(weights, cast(held["values"], weights.dtype).reshape(len(weights), -1, self.size))
        return found

    def decode(self, held: Arrays) -> tuple[Tensor, Tensor]:
        """Keys with zeros in the channels that are not stored."""
        return self._whole(held), held["values"]

    def _whole(self, held: Arrays) -> Tensor:
        keys, channels = held["keys"], held["channels"]
        xp = namespace(keys)
        at = xp.arange(self.size, device=device(keys))
        stored = xp.any(channels[..., None, :] == at[:, None], axis=-1)  # [..., D]
        place = xp.clip(xp.cumulative_sum(cast(stored, xp.int64), axis=-1) - 1, min=0)[..., None, :]
        spread = xp.take_along_axis(keys, xp.broadcast_to(place, (*keys.shape[:-1], self.size)), axis=-1)
        found: Tensor = xp.where(stored[..., None, :], spread, xp.zeros_like(spread))
        return found
