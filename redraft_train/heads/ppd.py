"""Parallel prompt decoding: trained vectors in place of the next tokens, so that one pass of the target guesses tokens further on.

Hao (Mark) Chen, Wayne Luk, Ka Fai Cedric Yiu, Rui Li, Konstantin Mishchenko, et al.: Hardware-Aware Parallel Prompt Decoding for
Memory-Efficient Acceleration of LLM Inference, 2024, arXiv 2405.18628.

1. Behind position t come `tokens` rows that start from the vectors, at positions t + 1, t + 2, ... Each sees the text up to t and the
   vectors before it; nothing else sees them. The distribution at vector i guesses token t + 1 + i.
2. Training puts such rows behind `cuts` random positions of each text. The target is frozen, the vectors learn. Loss: as for other heads,
   where a distance counts DECAY times the one before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from redraft.errors import Unsupported
from redraft.options import Options, number
from redraft_train.heads.head import Distributions, Head, Outcome, Window
from redraft_train.heads.layer import Layer, RMSNorm
from redraft_train.target import Shape, Target


@dataclass(frozen=True)
class PPD(Options):
    """tokens: the number of vectors; cuts: places of a text at which they learn in a step."""

    tokens: int = number(3, ge=1, le=8)
    cuts: int = number(32, ge=1)

    def head(self, target: Target, kept: NDArray[Any]) -> PPDHead:
        return PPDHead(self, target, kept)


class PPDHead(Head):
    """The vectors [tokens, hidden]. They start as embeddings of random tokens."""

    method = "ppd"
    rate = 1e-2

    def __init__(self, options: PPD, target: Target, kept: NDArray[Any]) -> None:
        super().__init__(target, kept)
        self.options = options
        start = torch.from_numpy(np.asarray(kept, np.int64))[torch.randint(len(kept), (options.tokens,))]
        self.input_scale = target.spec.embed_scale
        self.vectors = nn.Parameter(target.embedding[start].float() * self.input_scale)
        self.model = (Frozen(target),)  # in a tuple, as it is neither trained nor stored

    def states(self, window: Window) -> list[Tensor]:
        return self._at(window, torch.arange(max(0, window.tokens.shape[1] - 1 - self.options.tokens)))

    def loss(self, window: Window) -> Outcome:
        n = window.tokens.shape[1] - 1 - self.options.tokens
        if torch.is_grad_enabled():
            cuts = torch.randperm(n)[: self.options.cuts].sort().values
        else:
            cuts = torch.arange(0, n, max(1, n // self.options.cuts))
        found = self._at(window, cuts)
        targets = [Distributions(*(part[:, cuts] for part in window.distributions(self.first + i))) for i in range(len(found))]
        return self.outcome([*zip(found, targets, strict=True)])

    def _at(self, window: Window, cuts: Tensor) -> list[Tensor]:
        """cuts: i64[C], positions of the window -> for each vector [B, C, hidden], behind the final norm."""
        (b, t), many = window.tokens.shape, self.options.tokens
        rows, after = torch.arange(many).repeat(len(cuts)), cuts.repeat_interleave(many)
        text = torch.cat([window.text, window.text[:, after]], 1)
        seen = torch.zeros((t + len(rows),) * 2, dtype=torch.bool)
        seen[:t, :t] = torch.ones(t, t, dtype=torch.bool).tril()
        seen[t:, :t] = torch.arange(t)[None] <= after[:, None]
        seen[t:, t:] = (after[:, None] == after[None]) & (rows[:, None] >= rows[None])
        positions = torch.cat([window.positions, window.positions[:, after] + 1 + rows], 1)
        whole = Rows(positions.float(), seen & (text[:, :, None] == text[:, None]))
        x = torch.cat([self.embedded(window.tokens) * self.input_scale, self.vectors[rows].expand(b, -1, -1)], 1)
        return [*self.model[0](x, whole)[:, t:].unflatten(1, (len(cuts), many)).unbind(2)]

    def about(self) -> dict[str, Any]:
        return {"tokens": self.options.tokens}


class Frozen(nn.Module):
    """All layers of the target and its final norm. Gradients flow through it to its inputs. Unsupported for a layer of another form than
    Llama's."""

    def __init__(self, target: Target) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for i, spec in enumerate(target.spec.layers):
            weights = target.layer(i)
            if weights is None or (spec.mixer, spec.mlp) != (target.spec.layers[-1].mixer, target.spec.layers[-1].mlp):
                raise Unsupported(f"--head ppd: trains through layers of Llama's form, all of one size; layer {i} has another one")
            self.layers.append(_loaded(target.shape, weights))
        self.norm = RMSNorm(target.spec.hidden, target.shape.eps)
        with torch.no_grad():
            self.norm.weight.copy_(target.final_norm)
        self.requires_grad_(False)

    def forward(self, x: Tensor, seen: Rows) -> Tensor:
        for layer in self.layers:
            x = layer(x, seen)
        found: Tensor = self.norm(x)
        return found


class Rows:
    """What rows see of each other. positions: f32[B, T]; seen: bool[B, T, T]. In the place of `layer.Seen`, for any number of layers."""

    def __init__(self, positions: Tensor, seen: Tensor) -> None:
        self.positions, self.seen = positions, (seen | torch.eye(seen.shape[1], dtype=torch.bool))[:, None]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B, T, H, D], k and v [B, T, K, D] -> [B, T, H, D]"""
        group = q.shape[2] // k.shape[2]
        keys, values = (one.transpose(1, 2).repeat_interleave(group, 1) for one in (k, v))
        return F.scaled_dot_product_attention(q.transpose(1, 2), keys.to(q.dtype), values.to(q.dtype), self.seen).transpose(1, 2)


@torch.no_grad()
def _loaded(shape: Shape, weights: dict[str, Tensor]) -> Layer:
    layer = Layer(shape)
    for name, parameter in layer.named_parameters():
        parameter.copy_(weights[name])
    return layer
