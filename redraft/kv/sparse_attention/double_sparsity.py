"""Reads the tokens with the highest scores on a few channels, those that contributed most to scores in a calibration.

Shuo Yang, Ying Sheng, Joseph E. Gonzalez, Ion Stoica, Lianmin Zheng: Post-Training Sparse Attention with Double Sparsity, 2024,
arXiv 2408.07092.

Once for each model:
1. Run texts. For each layer, head and channel c, average |q_c * k_c| of the same token over all tokens, after the rotation.
2. The channels with the largest averages are the label channels of that head.
During generation:
3. Store the label channels of every key as side data.
4. Score the visible keys with the label channels only. Each query head reads the `tokens` largest; the first tokens of the text and the
   token of the row are always among them. The first layers read all keys.

Differs: labels are chosen for each kv head, by the mean over its query heads, and stored in the dtype of the cache, not in 4 bits;
they are stored for the first layers too; nothing is offloaded, so the query of the next layer is not predicted.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from redraft.card import Card, Guarantee
from redraft.errors import InvalidInput
from redraft.kv import channels
from redraft.kv.sparse_attention.sparse_attention import StatelessRead
from redraft.ops import arrays
from redraft.ops.arrays import Tensor, kth_largest, namespace
from redraft.ops.format import PAGE, Array, Arrays
from redraft.options import Options, number

if TYPE_CHECKING:
    from redraft.models.runner import Runner
    from redraft.ops.backend import Products

METHOD = "double-sparsity"


@dataclass(frozen=True)
class DoubleSparsity(Options):
    """tokens: the tokens that a query head reads; factor: one in `factor` channels of a key is a label; dense: the number of first
    layers that read all keys; sinks: the number of first slots that are always read; profile: the file of a calibration, None for the
    place where `redraft calibrate` writes it.

    Measured with the embedded model, calibrated on 16,384 tokens of code: a quarter of the channels finds 0.53 to 0.55 of the true top
    n / 8 tokens, random channels find 0.38; of the top n / 16 tokens 0.47 to 0.50 against 0.31.
    """

    tokens: int = 256
    factor: int = number(4, ge=1)
    dense: int = number(2, ge=0)
    sinks: int = number(1, ge=0)
    profile: Path | None = None

    card: ClassVar[Card] = Card(
        "Double Sparsity",
        "Yang, Sheng, Gonzalez, Stoica, Zheng, Post-Training Sparse Attention with Double Sparsity, 2024, arXiv 2408.07092",
        Guarantee.LOSSY,
        needs="a calibration of the model, once: redraft calibrate --method double-sparsity",
        deviates="labels for each kv head, in the dtype of the cache; no offloading",
        summary="Reads tokens by calibrated channels; long contexts",
        budget="tokens={tokens}",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens < self.sinks + 2:
            raise InvalidInput(
                f"{METHOD}:tokens={self.tokens}: must be {self.sinks + 2} or more, room for {self.sinks} sinks, a row's own token"
                " and one to choose"
            )

    def open(self, runner: Runner) -> Labels:
        """Raises InvalidInput if the profile is missing or belongs to another model, or if `factor` exceeds the number of channels;
        CheckpointError if the profile is damaged."""
        count = runner.spec.head_dim // self.factor
        if not count:
            raise InvalidInput(f"{METHOD}:factor={self.factor}: must be {runner.spec.head_dim} or less, the number of channels of a key")
        profile = Profile.opened(runner, self.profile)
        return Labels(profile.channels(count), self.tokens, self.dense, self.sinks)

    @staticmethod
    def calibrate(runner: Runner, texts: Seq[Seq[int]], samples: int = 256) -> Profile:
        """Token ids of texts -> Profile; see channels.Profile.measured."""
        return Profile.measured(runner, texts, samples, lambda q, k: namespace(q).mean(abs(q), axis=2) * abs(k))  # 1.


class Profile(channels.Profile):
    """scores: the mean |q_c * k_c| of every channel."""

    method = METHOD

    def channels(self, count: int) -> NDArray[np.int64]:
        """i64 [L, K, count], ascending: the channels with the largest scores; of equal scores the lower channel."""
        return np.sort(np.argsort(-self.scores, axis=-1, kind="stable")[..., :count], axis=-1)  # 2.


@dataclass(frozen=True, eq=False)
class Labels(StatelessRead):
    """The opened method. channels: i64 [L, K, c], the label channels."""

    channels: NDArray[np.int64]
    tokens: int
    dense: int
    sinks: int

    sync_every: ClassVar[int] = 0

    @cached_property
    def name(self) -> str:
        return f"{METHOD}-{sha256(str(self.channels.tolist()).encode()).hexdigest()[:16]}"

    @property
    def dense_up_to(self) -> int:
        return self.tokens

    def arrays(self, head_dim: int, dtype: Any) -> dict[str, Array]:
        return {"labels": Array((PAGE, self.channels.shape[-1]), dtype)}

    def fill(self, index: int, keys: Tensor) -> dict[str, Tensor]:
        return {"labels": _channels(keys, self.channels[index])}  # 3.

    def summarize(self, keys: Tensor) -> dict[str, Tensor]:
        """Nothing, because labels are stored with each key."""
        return {}

    def select(self, index: int, q: Tensor, held: Arrays, seen: Tensor, where: Tensor, at: Tensor, products: Products) -> Tensor:
        """[K, G, R, n], or [K, 1, R, n] in the layers that read all keys."""
        if index < self.dense:
            return seen[:, None]
        xp, (heads, group, rows, _) = namespace(q), q.shape
        chosen = _channels(q, self.channels[index][:, None, None])
        labels = held["labels"].reshape(heads, -1, chosen.shape[-1])
        scores = products(chosen.reshape(heads, group * rows, -1), labels).reshape(heads, group, rows, -1)  # 4.
        first = (where < self.sinks)[:, None]  # by position, because a lane may start later in the text
        always = (first | (where[:, None] == at[:, None]))[:, None]
        scores = xp.where(seen[:, None], xp.where(always, inf, scores), -inf)
        last = kth_largest(scores, min(self.tokens, scores.shape[-1]))
        above, equal = scores > last, scores == last
        room = self.tokens - above.sum(-1)[..., None]  # of equal scores the lower slots
        found: Tensor = seen[:, None] & (above | (equal & (equal.cumsum(-1) <= room)))
        return found


def _channels(x: Any, chosen: Any) -> Any:
    """Some channels of x [..., D]: i64 [..., c] of the same or fewer leading dimensions -> [..., c]."""
    xp = namespace(x)
    places = xp.asarray(chosen, device=arrays.device(x))
    return xp.take_along_axis(x, xp.broadcast_to(places, (*x.shape[:-1], places.shape[-1])), axis=-1)
