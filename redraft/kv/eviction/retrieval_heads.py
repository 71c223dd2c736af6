"""Which kv heads retrieve: how much of their attention goes back to earlier copies of a token and to what followed these.

Hanlin Tang, Yang Lin, Jing Lin, Qingsen Han, Shikuan Hong, Yiwu Yao, Gongyi Wang: RazorAttention: Efficient KV Cache Compression Through
Retrieval Heads, 2024, arXiv 2407.15891.

1. A block of random tokens is repeated four times; one forward pass.
2. A row of the last copy has an echo score, its attention to the same token in earlier copies, and an induction score, its attention to
   the tokens that followed these. Both are averaged over the rows.
3. A kv head has the largest score of its query heads.

Differs: rows of the last copy only; attention to the three earlier copies is added, not averaged, so a perfect head scores 1.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from redraft.core.spec import Attention
from redraft.core.tree import F32
from redraft.errors import CheckpointError, InvalidInput
from redraft.models import calibration
from redraft.models.trained import Trained, model_hash, place
from redraft.ops.arrays import array

if TYPE_CHECKING:
    from redraft.models.runner import Runner

METHOD = "razor"
COPIES = 4
BLOCK = 512  # tokens of a copy, fewer if the context is short


@dataclass(frozen=True, eq=False)
class HeadProfile:
    """echo, induction: f32[L, K], from 0 to 1; model: the hash of the model; tokens: of the pass."""

    echo: F32
    induction: F32
    model: str
    tokens: int
    texts: int = 1

    def retrieving(self, echo: float, induction: float) -> NDArray[np.bool_]:
        """bool[L, K]: the share `echo` of all heads with the largest echo scores, and the share `induction` with the largest induction
        scores; of equal heads the lower. At least one head of each where a share is above 0."""
        found = np.zeros(self.echo.size, bool)
        for scores, share in ((self.echo, echo), (self.induction, induction)):
            found[np.argsort(-scores.ravel(), kind="stable")[: ceil(share * found.size)]] = True
        return found.reshape(self.echo.shape)

    def weakest(self, share: float) -> NDArray[np.bool_]:
        """bool[L, K]: this share of all heads, those with the smallest scores; of equal heads the higher."""
        found, scores = np.zeros(self.echo.size, bool), np.maximum(self.echo, self.induction).ravel()
        found[np.argsort(-scores, kind="stable")[found.size - round(share * found.size) :]] = True
        return found.reshape(self.echo.shape)

    def save(self, path: Path | None = None) -> Path:
        """Writes a safetensors file, by default where `opened` looks for it; returns its path."""
        arrays = {"echo": self.echo, "induction": self.induction}
        return Trained(METHOD, self.model, {"tokens": self.tokens}, arrays).save(path or place(METHOD, self.model))

    @classmethod
    def load(cls, path: Path) -> HeadProfile:
        """CheckpointError if the file is damaged or of another method."""
        found = Trained.load(path, METHOD)
        try:
            return cls(found.arrays["echo"], found.arrays["induction"], found.model, int(found.about["tokens"]))
        except KeyError as error:
            raise CheckpointError(f"{path}: not a complete file of {METHOD}: {error}") from None


def opened(runner: Runner, path: Path | None, method: str) -> HeadProfile:
    """The profile of this model. path: its file, None for the place where `redraft calibrate` writes it. InvalidInput if there is none or
    if it is of another model."""
    path = path.expanduser() if path else place(METHOD, model_hash(runner))
    if not path.exists():
        of = str(runner.source or "MODEL")
        raise InvalidInput(f"{method}: no profile {path}; make one with: redraft calibrate {of} --method {METHOD}")
    profile = HeadProfile.load(path)
    Trained(METHOD, profile.model, {}, {}).check(runner, path)
    return profile


def calibrate(runner: Runner, texts: Seq[Seq[int]] = (), samples: int = 0, block: int = BLOCK, seed: int = 0) -> HeadProfile:
    """Runs the random text. texts, samples: not needed. The profile depends on the model, the block and the seed."""
    block = min(block, (runner.spec.context - 1) // COPIES, runner.spec.vocab)
    ids = np.random.default_rng(seed).permutation(runner.spec.vocab)[:block].tolist()  # 1. no token twice in a copy
    tokens = [*ids, *ids, *ids, *ids]
    scores: dict[int, tuple[Any, Any]] = {}

    def score(index: int, layer: Attention, q: Any, k: Any, v: Any) -> None:
        rows, keys = (array(x).astype(np.float32).reshape(len(k), -1, layer.head_dim) for x in (q, k))
        scores[index] = head_scores(rows[len(k) - block :], keys, layer)  # 2.

    calibration.run(runner, [tokens], len(tokens), score)
    echo, induction = (np.stack([scores[i][part] for i in sorted(scores)]).astype(np.float32) for part in (0, 1))
    return HeadProfile(echo, induction, model_hash(runner), len(tokens))


def head_scores(q: F32, k: F32, layer: Attention) -> tuple[Any, Any]:
    """Echo and induction scores f64[K] of queries [B, H, D] of the last copy and all keys [n, K, D]."""
    block, n, share = len(q), len(k), layer.heads // layer.kv_heads
    at, found = np.arange(n - block, n), np.zeros((2, layer.heads))
    hidden = np.arange(n) > at[:, None]
    if layer.window is not None:
        hidden |= at[:, None] - np.arange(n) >= layer.window
    for head in range(layer.heads):
        logits = q[:, head] @ k[:, head // share].T * np.float32(layer.score_scale)
        if layer.softcap is not None:
            logits = layer.softcap * np.tanh(logits / layer.softcap)
        logits[hidden] = -np.inf
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        for back in range(1, n // block):
            found[0, head] += weights[np.arange(block), at - back * block].mean()
            found[1, head] += weights[np.arange(block), at - back * block + 1].mean()
    echo, induction = found.reshape(2, layer.kv_heads, share).max(-1)  # 3.
    return echo, induction
