"""EAGLE: one decoder layer that predicts the target's next state from its last one and the token in between.

Yuhui Li, Fangyun Wei, Chao Zhang, Hongyang Zhang: EAGLE, 2024, arXiv 2401.15077; EAGLE-3, 2025, arXiv 2503.01840.

1. x_t = fc([state_t, e(token t + 1)]) at position t goes through a decoder layer, which sees the x of all earlier positions of the text.
   The result behind a norm stands for state t + 1. The target's head makes of it the distribution of token t + 2.
2. Further tokens: the result takes the place of the state.
3. Training does the same for `rollout` tokens from each position, so that the layer meets its own results. Loss: cross-entropy to the
   target's distributions, and `regress` times the smooth L1 distance to the target's states, both divided by the size of these.
4. fc starts as the best linear guess of the next state.

Differs: EAGLE-3 reads three layers of the target; its results do not stand for states.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from redraft.options import Options, number
from redraft_train.heads.head import Head, Joined, Outcome, Window
from redraft_train.heads.layer import Layer, RMSNorm, Seen
from redraft_train.heads.start import regressed
from redraft_train.target import Target


@dataclass(frozen=True)
class Eagle(Options):
    """rollout: tokens that training drafts from each position; regress: the weight of the distance to the target's states; noise: the
    bound of the uniform noise that training adds to states, over their size; train_head: whether the trimmed head is trained too, and is
    in the file."""

    rollout: int = number(3, ge=1, le=8)
    regress: float = number(0.2, ge=0)
    noise: float = number(0.0, ge=0)
    train_head: bool = False

    def head(self, target: Target, kept: NDArray[Any]) -> EagleHead:
        return EagleHead(self, target, kept)


class EagleHead(Head):
    method = "eagle"

    def __init__(self, options: Eagle, target: Target, kept: NDArray[Any]) -> None:
        super().__init__(target, kept, options.train_head)
        self.options, self.shape = options, target.shape
        hidden, gain = self.shape.hidden, target.final_norm
        self.inverse = gain.sign() / gain.abs().clamp_min(1e-3)
        self.size = float(target.final_norm.square().mean().sqrt())
        self.scale = target.scale
        self.fc = Joined(hidden, 1, self.scale, self.inverse)
        self.layer = Layer(self.shape, target.layer(-1))
        self.norm = RMSNorm(hidden, self.shape.eps)
        with torch.no_grad():
            self.norm.weight.copy_(target.final_norm)

    @torch.no_grad()
    def begin(self, windows: Iterable[Window]) -> None:
        for matrix in regressed(windows, self.embedding, self.scale, 1):
            self.fc.weight.copy_(matrix * self.inverse[:, None])

    def states(self, window: Window) -> list[Tensor]:
        seen, found = Seen(window.text, window.positions), []
        state, after = window.state.float(), self.embedded(window.tokens)
        if self.options.noise and torch.is_grad_enabled():
            state = state + self.options.noise * self.size * (2 * torch.rand_like(state) - 1)
        for step in range(self.options.rollout):
            x = torch.cat([state[:, : after.shape[1] - 1 - step], after[:, step + 1 :]], -1)
            state = self.norm(self.layer(self.fc(x), seen))
            seen.shift()
            found.append(state)
        return found

    def loss(self, window: Window) -> Outcome:
        found = self.states(window)
        outcome = self.outcome([(state, window.distributions(step + 1)) for step, state in enumerate(found)])
        if not self.options.regress:
            return outcome
        distance = torch.zeros(())
        for step, state in enumerate(found):
            real = window.state[:, step + 1 :].float()
            same = (window.text[:, : real.shape[1]] == window.text[:, step + 1 :]) & (window.text[:, step + 1 :] >= 0)
            state, same = state[:, : real.shape[1]], same[:, : state.shape[1]]
            distance = distance + F.smooth_l1_loss((state / self.size)[same], (real[:, : state.shape[1]] / self.size)[same])
        return outcome._replace(loss=outcome.loss + self.options.regress * distance / len(found))

    def about(self) -> dict[str, Any]:
        return {"layers": 1, "rollout": self.options.rollout, **self.shape._asdict()}
