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
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
from numpy.typing import NDArray

from redraft.card import Card, Guarantee
from redraft.config import SamplingParams
from redraft.core.batch import Batch
from redraft.core.plan import Work
from redraft.core.sequence import UNLIMITED, Request, Sequence
from redraft.core.spec import Attention
from redraft.core.tree import EMPTY
from redraft.errors import CheckpointError, InvalidInput
from redraft.models.trained import Trained, model_hash, place
from redraft.ops import arrays
from redraft.ops.arrays import Tensor, array, kth_largest, namespace
from redraft.ops.format import PAGE, Array, Arrays
from redraft.options import Options, number

if TYPE_CHECKING:
    from redraft.models.runner import Runner
    from redraft.ops.backend import Backend, Products

METHOD = "double-sparsity"
PIECE = 512  # tokens of a text that run together


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
        needs="a calibration of the model, once: redraft calibrate",
        deviates="labels for each kv head, in the dtype of the cache; no offloading",
        summary="Reads tokens by calibrated channels; long contexts",
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
        path = self.profile.expanduser() if self.profile else place(METHOD, model_hash(runner))
        if not path.exists():
            of = str(runner.source or "MODEL")
            raise InvalidInput(f"{METHOD}: no profile {path}; make one with: redraft calibrate {of} --method {METHOD} --texts FILE")
        profile = Profile.load(path)
        Trained(METHOD, profile.model, {}, {}).check(runner, path)
        return Labels(profile.channels(count), self.tokens, self.dense, self.sinks)

    @staticmethod
    def calibrate(runner: Runner, texts: Seq[Seq[int]], samples: int = 256) -> Profile:
        """Token ids of texts -> Profile. Long texts are cut into pieces of 512 tokens. Of more than `samples` pieces it runs `samples`,
        evenly spaced. Raises InvalidInput if there is no token."""
        from redraft.models.runner import Runner

        size = min(PIECE, runner.spec.context)
        pieces = [list(text[i : i + size]) for text in texts for i in range(0, len(text), size)]
        if not pieces or samples < 1:
            raise InvalidInput(f"{METHOD}: {len(pieces)} pieces of text and samples = {samples}: a calibration needs at least one of each")
        chosen = [pieces[i * len(pieces) // samples] for i in range(samples)] if len(pieces) > samples else pieces
        meter = _Meter(runner)
        own = Runner(runner.spec, runner.weights, cast("Backend", meter), -(-size // PAGE))
        for i, tokens in enumerate(chosen):  # 1.
            request = Request(METHOD, tokens, SamplingParams())
            seq = Sequence(i, request, 0, tokens, len(tokens), seed=0, sync_point=UNLIMITED)
            own.memory.open(seq)
            work = [Work(seq, len(tokens))]
            own.forward(Batch.pack(work, [EMPTY], own.memory.reserve(work, [EMPTY])))
            own.memory.free(seq)
        tokens_run = sum(map(len, chosen))
        return Profile(meter.means(tokens_run), model_hash(runner), len(texts), tokens_run)


@dataclass(frozen=True, eq=False)
class Profile:
    """scores: f32 [L, K, D], the mean |q_c * k_c| of every channel; model: the hash of the calibrated model; texts, tokens: the number
    of texts and tokens of the calibration."""

    scores: NDArray[np.float32]
    model: str
    texts: int
    tokens: int

    def channels(self, count: int) -> NDArray[np.int64]:
        """i64 [L, K, count], ascending: the channels with the largest scores; of equal scores the lower channel."""
        return np.sort(np.argsort(-self.scores, axis=-1, kind="stable")[..., :count], axis=-1)  # 2.

    def save(self, path: Path | None = None) -> Path:
        """Writes a safetensors file, by default where `open` looks for it; returns its path."""
        about = {"texts": self.texts, "tokens": self.tokens}
        return Trained(METHOD, self.model, about, {"scores": self.scores}).save(path or place(METHOD, self.model))

    @classmethod
    def load(cls, path: Path) -> Profile:
        """CheckpointError if the file is damaged or of another method, or if all scores are 0."""
        found = Trained.load(path, METHOD)
        try:
            profile = cls(found.arrays["scores"], found.model, int(found.about["texts"]), int(found.about["tokens"]))
        except KeyError as error:
            raise CheckpointError(f"{path}: not a complete file of {METHOD}: {error}") from None
        if not profile.scores.any():
            raise CheckpointError(f"{path}: all scores are 0: calibrate again")
        return profile


@dataclass(frozen=True, eq=False)
class Labels:
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


class _Meter:
    """Wraps the backend of a runner and adds up |q_c * k_c| of every token that enters attention. sums: f64 [K, D] of layers."""

    def __init__(self, runner: Runner) -> None:
        self._backend = runner.backend
        self.sums: dict[int, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def forward(self, *of: Any) -> None:
        """Returns None, as `run` does, so every layer runs operation by operation and calls `attend`."""

    run = forward

    def attend(self, index: int, layer: Attention, q: Tensor, k: Tensor, *rest: Any) -> Tensor:
        xp = namespace(q)
        rows, keys = (arrays.cast(xp.abs(x), xp.float64) for x in (q, k))
        means = xp.mean(rows.reshape(len(k), layer.kv_heads, -1, layer.head_dim), axis=2)
        self.sums[index] = self.sums.get(index, 0.0) + xp.sum(means * keys, axis=0)
        found: Tensor = self._backend.attend(index, layer, q, k, *rest)
        return found

    def means(self, tokens: int) -> NDArray[np.float32]:
        """f32 [L, K, D]"""
        return (np.stack([array(self.sums[index]) for index in sorted(self.sums)]) / tokens).astype(np.float32)
