"""Turns one direction of the hidden state, so that the model answers by its context, or by what it knows.

Julian Minder, Kevin Du, Niklas Stoehr, Giovanni Monea, Chris Wendler, Robert West, Ryan Cotterell: Controllable Context Sensitivity
and the Knob Behind It, 2024, arXiv 2411.07404.

1. A unit vector u of one layer was trained, with constants that follow the context and what the model knows.
2. At the output of that layer, the last row of the context and every later row get h + (c - u.h) u: their coordinate along u is c.

Differs: u and both constants are trained together on prompts without words of an intent, not by exchanging coordinates of prompts
with such words; `strength` moves the coordinate a part of the way.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from redraft.card import Card, Guarantee
from redraft.errors import CheckpointError, InvalidInput
from redraft.models.trained import Trained, model_hash, place
from redraft.ops.arrays import Tensor, cast, like, namespace, widened
from redraft.options import Options, number

if TYPE_CHECKING:
    from redraft.models.runner import Runner

METHOD = "context-knob"


@dataclass(frozen=True)
class ContextKnob(Options):
    """turn: 1: the trained constant that follows the context, -1: the one that follows what the model knows, others in proportion; c:
    the constant itself, instead; strength: the part of the way that the coordinate moves, 0: nothing changes; path: the file or folder of
    the trained vector, None for its place among what is kept."""

    turn: float = number(1.0)
    c: float | None = number(None)
    strength: float = number(1.0, ge=0, le=1)
    path: Path | None = None

    card: ClassVar[Card] = Card(
        "The knob of context sensitivity",
        "Minder, Du, Stoehr, Monea, Wendler, West, Cotterell, Controllable Context Sensitivity and the Knob Behind It, 2024, "
        "arXiv 2411.07404",
        Guarantee.LOSSY,
        needs="a vector trained for the model: python -m redraft_train.knob",
        deviates="u and the constants are trained together, without words of an intent; a strength",
        summary="Follows the context or the model's knowledge; for RAG",
    )

    def open(self, runner: Runner) -> Knob:
        """InvalidInput if there is no file or it belongs to another model, CheckpointError if it is damaged. With strength 0 it is not
        read."""
        if not self.strength:
            return Knob(np.zeros(0), 0, 0.0, 0.0)
        path = self.path.expanduser() if self.path else place(METHOD, model_hash(runner))
        if not path.exists():
            of = str(runner.source or "MODEL")
            raise InvalidInput(f"{METHOD}: no file {path}; make one with: python -m redraft_train.knob {of} --out FOLDER")
        trained = Trained.load(path, METHOD)
        trained.check(runner, path)
        u, layer = trained.arrays.get("u"), trained.about.get("layer")
        context, prior = (trained.about.get(name) for name in ("context", "prior"))
        layers, hidden = len(runner.spec.layers), runner.spec.hidden
        if u is None or u.shape != (hidden,) or type(layer) is not int or not (isinstance(context, float) and isinstance(prior, float)):
            raise CheckpointError(f"{path}: not a complete file of {METHOD}: u of {hidden} numbers, layer, context and prior are needed")
        if not 0 <= layer < layers - 1:
            raise CheckpointError(f"{path}: layer = {layer}: 0 to {layers - 2} is allowed, a layer before the last of this model")
        c = self.c if self.c is not None else self.turn * context if self.turn >= 0 else -self.turn * prior
        return Knob(np.asarray(u, np.float64), layer, c, self.strength)


@dataclass(frozen=True, eq=False)
class Knob:
    """u: f64[hidden]; layer: at whose output it acts; c: the coordinate that rows get."""

    u: NDArray[np.float64]
    layer: int
    c: float
    strength: float

    @property
    def bytes(self) -> int:
        return int(self.u.nbytes)

    def between(self, context: int) -> Turned | None:
        return Turned(self, context - 1) if self.strength else None

    def shareable_tokens(self, context: int) -> int:
        return context - 1


@dataclass(frozen=True)
class Turned:
    """since: the first position that the knob acts on."""

    knob: Knob
    since: int

    @property
    def cuts(self) -> frozenset[int]:
        return frozenset({self.knob.layer + 1})

    def act(self, layer: int, h: Tensor, positions: NDArray[np.int32]) -> Tensor:
        if positions.max() < self.since:
            return h
        xp, wide, knob = namespace(h), widened(h), self.knob
        u = like(knob.u / np.linalg.norm(knob.u), wide)
        coordinates = xp.sum(wide * u, axis=-1, keepdims=True)  # row by row: its rounding does not depend on the number of rows
        turned = cast(wide + (knob.c - coordinates) * knob.strength * u, h.dtype)  # 2.
        chosen = like((positions >= self.since)[:, None], xp.ones_like(wide[:1, :1], dtype=xp.bool))
        found: Tensor = xp.where(chosen, turned, h)
        return found
