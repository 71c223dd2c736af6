"""Each prompt chooses the layers that run behind it: a trained router at each layer votes on every token of the prompt.

Akriti Jain, Saransh Sharma, Koyel Mukherjee, Soumyabrata Pal: FiRST: Finetuning Router-Selective Transformers for Input-Adaptive
Latency Reduction, 2024, arXiv 2410.12513.

1. The prompt runs all layers. The router of layer l gives every token a vote, the sigmoid of w_l h + b_l at the layer's input h.
2. After the prompt, a layer is skipped if the mean of its votes is below `threshold`. The first and the last layer always run.
3. All later rows of the text run the layers that are left.

Differs: only the routers are trained, the model itself is not, so quality falls where many layers are skipped. The layers are chosen
once for each request, from its whole prompt, which therefore never comes from the prefix cache. The slots of skipped layers stay
allocated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from redraft.card import Card, Guarantee
from redraft.core.layers import Layers
from redraft.core.sequence import UNLIMITED, Sequence
from redraft.core.taps import Taps
from redraft.core.tree import F64
from redraft.errors import CheckpointError, InvalidInput
from redraft.models.trained import Trained, model_hash, place
from redraft.ops.arrays import Tensor, array
from redraft.options import Options, number

METHOD = "first"


@dataclass(frozen=True)
class FiRST(Options):
    """path: the folder or file of the trained routers, None for where their trainer writes them; threshold: the mean vote below which a
    layer is skipped."""

    path: Path | None = None
    threshold: float = number(0.5, ge=0, le=1)

    card: ClassVar[Card] = Card(
        "FiRST",
        "Jain, Sharma, Mukherjee, Pal, FiRST: Finetuning Router-Selective Transformers for Input-Adaptive Latency Reduction, 2024, "
        "arXiv 2410.12513",
        Guarantee.LOSSY,
        needs="routers trained for the model",
        deviates="the model itself is not fine-tuned; the slots of skipped layers stay allocated",
        summary="Skips layers that routers vote out; long answers",
    )

    def open(self, runner: Any) -> Routers:
        """InvalidInput if there are no routers or they belong to another model, CheckpointError if the file is damaged."""
        path = self.path.expanduser() if self.path else place(METHOD, model_hash(runner))
        if not path.exists():
            of = str(runner.source or "MODEL")
            raise InvalidInput(f"{METHOD}: no routers {path}; make them with: python -m redraft_train.routers {of} --data FOLDER")
        found = Trained.load(path, METHOD)
        found.check(runner, path)
        count, hidden = len(runner.spec.layers), runner.spec.hidden
        weight, bias = found.arrays.get("weight"), found.arrays.get("bias")
        if weight is None or bias is None or weight.shape != (count, hidden) or bias.shape != (count,):
            raise CheckpointError(f"{path}: routers of {count} layers need the arrays weight [{count}, {hidden}] and bias [{count}]")
        return Routers(weight.astype(np.float64), bias.astype(np.float64), self.threshold)


@dataclass(frozen=True)
class Votes:
    """Of `rows` tokens of the context: total f64[L], the sum of the votes for each layer."""

    total: F64
    rows: int = 0


class Routers:
    """The opened form. weight: f64[L, hidden]; bias: f64[L]."""

    skips = True

    def __init__(self, weight: F64, bias: F64, threshold: float) -> None:
        self.weight, self.bias, self.threshold = weight, bias, threshold
        self.taps = Taps(hidden=frozenset(range(len(bias) - 2)))  # the input of a layer is the output of the one before

    def begin(self, seq: Sequence) -> list[Votes]:
        return [Votes(np.zeros(len(self.bias)))]

    def fork(self, state: list[Votes], seq: Sequence) -> list[Votes]:
        return list(state)

    def end(self, state: list[Votes]) -> None:
        pass

    def observe(self, seq: Sequence, hidden: Mapping[int, Tensor]) -> None:
        """Votes are added row by row, so the sum does not depend on the chunks in which the context ran."""
        state = seq.state[self]
        votes = np.ones((max((len(rows) for rows in hidden.values()), default=0), len(self.bias)))
        for layer, rows in hidden.items():
            scores = (array(rows).astype(np.float64) * self.weight[layer + 1]).sum(-1) + self.bias[layer + 1]
            votes[:, layer + 1] = 0.5 * (1 + np.tanh(0.5 * scores))  # 1., the sigmoid, which does not overflow
        (before,) = state
        state[0] = replace(before, total=np.cumsum([before.total, *votes], axis=0)[-1], rows=before.rows + len(votes))

    def border(self, seq: Sequence) -> int:
        return UNLIMITED

    def plan(self, seq: Sequence) -> Layers:
        """Without a vote all layers run."""
        (votes,) = seq.state[self]
        stays = votes.total >= self.threshold * votes.rows  # 2.
        stays[[0, -1]] = True
        return Layers.whole(np.flatnonzero(stays).tolist())
