"""Medusa: heads that guess tokens at fixed distances, each from the same state and apart from the others.

Tianle Cai, Yuhong Li, Zhengyang Geng, et al.: Medusa, 2024, arXiv 2401.10774.

Head k reads x + SiLU(W x + b) of the state x at position t, `blocks` times, and guesses token t + 2 + k through the target's head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from redraft.options import Options, number
from redraft_train.heads.head import Head, Joined, Window, columns
from redraft_train.target import Target


@dataclass(frozen=True)
class Medusa(Options):
    """heads: the number of tokens guessed at once; blocks: of each head; train_head: whether the trimmed head is trained too, and is in
    the file."""

    heads: int = number(4, ge=1, le=16)
    blocks: int = number(1, ge=1, le=8)
    train_head: bool = False

    def head(self, target: Target, kept: NDArray[Any]) -> MedusaHead:
        return MedusaHead(self, target, kept)


class Block(nn.Module):
    """y + SiLU(W x + b), where y is x, or what a matrix makes of x, if that is a state followed by `count` embeddings. Starts as the
    identity on the state."""

    columns: Tensor

    def __init__(self, hidden: int, count: int = 0, scale: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(hidden, hidden * (count + 1)))
        self.bias = nn.Parameter(torch.zeros(hidden))
        self.register_buffer("columns", columns(hidden, count, scale), persistent=False)
        self.residual = Joined(hidden, count, scale) if count else None

    def forward(self, x: Tensor) -> Tensor:
        return (x if self.residual is None else self.residual(x)) + F.silu(F.linear(x, self.weight * self.columns, self.bias))


class Blocks(nn.Module):
    """The blocks of one head."""

    def __init__(self, hidden: int, blocks: int, count: int = 0, scale: float = 1.0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(hidden, 0 if i else count, scale) for i in range(blocks))

    def start(self, matrix: Tensor) -> None:
        """The linear part of the first block, which joins a state and embeddings."""
        first = self.blocks[0]
        assert isinstance(first, Block) and first.residual is not None
        first.residual.weight.copy_(matrix)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class MedusaHead(Head):
    method = "medusa"

    def __init__(self, options: Medusa, target: Target, kept: NDArray[Any]) -> None:
        super().__init__(target, kept, options.train_head)
        self.options = options
        self.heads = nn.ModuleList(Blocks(target.spec.hidden, options.blocks) for _ in range(options.heads))

    def states(self, window: Window) -> list[Tensor]:
        return [head(window.state.float()) for head in self.heads]

    def about(self) -> dict[str, Any]:
        return {"heads": self.options.heads, "blocks": self.options.blocks}
