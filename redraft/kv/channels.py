"""Calibrations of channels: a number for each channel of each kv head, over the tokens of texts that run through a model."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from redraft.core.spec import Attention
from redraft.errors import CheckpointError, InvalidInput
from redraft.models import calibration
from redraft.models.trained import Trained, model_hash, place
from redraft.ops import arrays
from redraft.ops.arrays import Tensor, array, namespace

if TYPE_CHECKING:
    from redraft.models.runner import Runner

PIECE = 512  # tokens of a text that run together

Score = Callable[[Tensor, Tensor], Tensor]
"""Queries [T, K, G, D] and keys [T, K, D] of tokens, rotated, in float64 -> [T, K, D]."""


@dataclass(frozen=True, eq=False)
class Profile:
    """scores: f32 [L, K, D], the mean or the largest over tokens; model: the hash of the calibrated model; texts, tokens: the number of
    texts and tokens of the calibration. A method derives from it and says its registered name."""

    method: ClassVar[str]
    scores: NDArray[np.float32]
    model: str
    texts: int
    tokens: int

    def save(self, path: Path | None = None) -> Path:
        """Writes a safetensors file, by default where `opened` looks for it; returns its path."""
        about = {"texts": self.texts, "tokens": self.tokens}
        return Trained(self.method, self.model, about, {"scores": self.scores}).save(path or place(self.method, self.model))

    @classmethod
    def load(cls, path: Path) -> Self:
        """CheckpointError if the file is damaged or of another method, or if all scores are 0."""
        found = Trained.load(path, cls.method)
        try:
            profile = cls(found.arrays["scores"], found.model, int(found.about["texts"]), int(found.about["tokens"]))
        except KeyError as error:
            raise CheckpointError(f"{path}: not a complete file of {cls.method}: {error}") from None
        if not profile.scores.any():
            raise CheckpointError(f"{path}: all scores are 0: calibrate again")
        return profile

    @classmethod
    def opened(cls, runner: Runner, given: Path | None) -> Self:
        """The profile in this file, or of the model of `runner`. InvalidInput if it is missing or belongs to another model."""
        path = given.expanduser() if given else place(cls.method, model_hash(runner))
        if not path.exists():
            of = str(runner.source or "MODEL")
            raise InvalidInput(f"{cls.method}: no profile {path}; make one with: redraft calibrate {of} --method {cls.method} --texts FILE")
        profile = cls.load(path)
        Trained(cls.method, profile.model, {}, {}).check(runner, path)
        return profile

    @classmethod
    def measured(cls, runner: Runner, texts: Seq[Seq[int]], samples: int, score: Score, largest: bool = False) -> Self:
        """Token ids of texts -> Profile. Long texts are cut into pieces of 512 tokens. Of more than `samples` pieces it runs `samples`,
        evenly spaced. largest: scores are the largest over tokens, not the mean. Raises InvalidInput if there is no token."""
        size = min(PIECE, runner.spec.context)
        pieces = [list(text[i : i + size]) for text in texts for i in range(0, len(text), size)]
        if not pieces or samples < 1:
            raise InvalidInput(
                f"{cls.method}: {len(pieces)} pieces of text and samples = {samples}: a calibration needs at least one of each"
            )
        chosen = [pieces[i * len(pieces) // samples] for i in range(samples)] if len(pieces) > samples else pieces
        found: dict[int, Any] = {}

        def add(index: int, layer: Attention, q: Tensor, k: Tensor, v: Tensor) -> None:
            xp = namespace(q)
            rows, keys = (arrays.cast(x, xp.float64) for x in (q, k))
            scores = score(rows.reshape(len(k), layer.kv_heads, -1, layer.head_dim), keys)
            if largest:
                most = xp.max(scores, axis=0)
                found[index] = xp.maximum(found.get(index, most), most)
            else:
                found[index] = found.get(index, 0.0) + xp.sum(scores, axis=0)

        calibration.run(runner, chosen, size, add)
        tokens = sum(map(len, chosen))
        each = np.stack([array(found[index]) for index in sorted(found)]) / (1 if largest else tokens)
        return cls(each.astype(np.float32), model_hash(runner), len(texts), tokens)
