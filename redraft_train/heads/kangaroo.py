"""Kangaroo: an attention layer behind the first layers of the target, so that these and the target's head draft.

Fangcheng Liu, Yehui Tang, Zhenhua Liu, et al.: Kangaroo, 2024, arXiv 2404.18911.

x is the state after layer `layer` (counted from 1, so that `layer` layers draft). x + attention(norm x), behind a norm, goes to the
target's head and gives the distribution of the next token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from redraft.errors import InvalidInput
from redraft.options import Options, number
from redraft_train.heads.head import Head, Window
from redraft_train.heads.layer import Layer, RMSNorm, Seen
from redraft_train.target import Target


@dataclass(frozen=True)
class Kangaroo(Options):
    """layer: how many layers of the target draft; train_head: whether the trimmed head is trained too, and is in the file."""

    layer: int = number(8, ge=1)
    train_head: bool = False

    def head(self, target: Target, kept: NDArray[Any]) -> KangarooHead:
        most = len(target.spec.layers) - 1
        if self.layer > most:
            raise InvalidInput(f"kangaroo:layer={self.layer}: must be {most} or less, fewer than the model's layers")
        return KangarooHead(self, target, kept)


class KangarooHead(Head):
    method = "kangaroo"
    first = 0

    def __init__(self, options: Kangaroo, target: Target, kept: NDArray[Any]) -> None:
        super().__init__(target, kept, options.train_head)
        self.options, self.shape, self.layers = options, target.shape, (options.layer - 1,)
        start = target.layer(options.layer)
        self.layer = Layer(self.shape, start, mlp=False)
        self.norm = RMSNorm(self.shape.hidden, self.shape.eps)
        with torch.no_grad():
            self.norm.weight.copy_(target.final_norm)

    def states(self, window: Window) -> list[Tensor]:
        x = window.layers[self.options.layer - 1].float()
        return [self.norm(self.layer(x, Seen(window.text, window.positions)))]

    def about(self) -> dict[str, Any]:
        return {"layer": self.options.layer, **self.shape._asdict()}
