"""Hydra: heads that guess one token each, from the state and the tokens on the way to it.

Zachary Ankner, Rishab Parthasarathy, et al.: Hydra, 2024, arXiv 2402.05109. Bin Xiao, Chunan Shi, et al.: Clover, 2024, arXiv 2405.00263.

1. Head i reads the state at position t and the embeddings of tokens t + 1 to t + 1 + i, and guesses token t + 2 + i: one block that
   joins them, then blocks - 1 blocks as in Medusa, then the target's head. The first block starts as the best linear guess of the state.
2. prefix (Hydra++): the states pass through a decoder layer first, in which each sees those before it.
3. cell=gru (Clover): one recurrent cell for all depths takes in one token after the other, from the state on.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from redraft.errors import InvalidInput, shown
from redraft.options import Options, number
from redraft_train.heads.head import Head, Window
from redraft_train.heads.layer import Layer, Seen
from redraft_train.heads.medusa import Blocks
from redraft_train.heads.start import regressed
from redraft_train.target import Target

CELLS = "none", "gru"


@dataclass(frozen=True)
class Hydra(Options):
    """heads: the most tokens on a path; blocks: of each head; prefix: decoder layers before the heads, 0 or 1; cell: `gru` for one
    recurrent cell in place of the heads; train_head: whether the trimmed head is trained too, and is in the file."""

    heads: int = number(4, ge=1, le=16)
    blocks: int = number(1, ge=1, le=8)
    prefix: int = number(0, ge=0, le=1)
    cell: str = "none"
    train_head: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cell not in CELLS:
            raise InvalidInput(f"hydra:cell={shown(self.cell)}: must be {' or '.join(CELLS)}")

    def head(self, target: Target, kept: NDArray[Any]) -> HydraHead:
        return HydraHead(self, target, kept)


class HydraHead(Head):
    method = "hydra"

    def __init__(self, options: Hydra, target: Target, kept: NDArray[Any]) -> None:
        super().__init__(target, kept, options.train_head)
        self.options, self.shape, hidden = options, target.shape, target.spec.hidden
        self.scale = target.scale
        self.prefix = Layer(self.shape) if options.prefix else None
        if options.cell == "gru":
            self.cell = Cell(target)
        else:
            self.heads = nn.ModuleList(Blocks(hidden, options.blocks, i + 1, target.scale) for i in range(options.heads))

    @torch.no_grad()
    def begin(self, windows: Iterable[Window]) -> None:
        if self.prefix is None and self.options.cell == "none":
            found = regressed(windows, self.embedding, self.scale, self.options.heads)
            for matrix, head in zip(found, self.heads, strict=False):
                assert isinstance(head, Blocks)
                head.start(matrix)

    def states(self, window: Window) -> list[Tensor]:
        x = window.state.float()
        if self.prefix is not None:
            x = self.prefix(x, Seen(window.text, window.positions))
        after, found = self.embedded(window.tokens), []
        inputs = x
        for i in range(self.options.heads):
            inputs, token = inputs[:, :-1], after[:, i + 1 :]
            if self.options.cell == "gru":
                inputs = self.cell(inputs, token)
                found.append(inputs)
            else:
                inputs = torch.cat([inputs, token], -1)
                found.append(self.heads[i](inputs))
        return found

    def about(self) -> dict[str, Any]:
        found = {"heads": self.options.heads, "blocks": self.options.blocks, "prefix": self.options.prefix, "cell": self.options.cell}
        return {**found, "layer": self.shape._asdict()} if self.options.prefix else found


class Cell(nn.Module):
    """A gated recurrent unit as torch.nn.GRUCell's, of gates reset, update and new, over states divided by `gain`. It starts by keeping
    nearly all of its state."""

    def __init__(self, target: Target) -> None:
        super().__init__()
        hidden = target.spec.hidden
        self.gain = nn.Parameter(target.final_norm.abs().clamp_min(1e-3))
        self.ih, self.hh = Gates(hidden, target.scale / float(self.gain.detach().square().mean().sqrt())), Gates(hidden)
        with torch.no_grad():
            self.ih.bias[hidden : 2 * hidden] = 2.0

    def forward(self, state: Tensor, embedding: Tensor) -> Tensor:
        """[..., hidden] each -> the next state, multiplied by `gain` as the first one is."""
        before = state / self.gain
        reset, update, new = self.ih(embedding).chunk(3, -1)
        own_reset, own_update, own = self.hh(before).chunk(3, -1)
        kept = torch.sigmoid(update + own_update)
        return (kept * before + (1 - kept) * torch.tanh(new + torch.sigmoid(reset + own_reset) * own)) * self.gain


class Gates(nn.Module):
    """A linear layer from one vector to those of three gates. The vector is multiplied by `scale` first; files hold the products."""

    def __init__(self, hidden: int, scale: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3 * hidden, hidden) * hidden**-0.5)
        self.bias = nn.Parameter(torch.zeros(3 * hidden))
        self.columns = scale

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.columns, self.bias)
