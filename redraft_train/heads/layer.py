"""A decoder layer of Llama's form, over texts, and over drafts that begin at each of their positions."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from redraft_train.target import Shape


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight


class Attention(nn.Module):
    frequencies: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        q, k = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden, q, bias=False)
        self.k_proj = nn.Linear(shape.hidden, k, bias=False)
        self.v_proj = nn.Linear(shape.hidden, k, bias=False)
        self.o_proj = nn.Linear(q, shape.hidden, bias=False)
        half = shape.head_dim // 2
        self.register_buffer("frequencies", shape.rope_theta ** (-torch.arange(half) / half), persistent=False)

    def forward(self, x: Tensor, seen: Seen) -> Tensor:
        shape, (b, t, _) = self.shape, x.shape
        angles = seen.positions[:, :t, None] * self.frequencies  # [B, T, D / 2]
        q = _turned(self.q_proj(x).view(b, t, shape.heads, -1), angles)
        k = _turned(self.k_proj(x).view(b, t, shape.kv_heads, -1), angles)
        v = self.v_proj(x).view(b, t, shape.kv_heads, -1)
        found: Tensor = self.o_proj(seen.attend(q, k.to(q.dtype), v.to(q.dtype)).reshape(b, t, -1))
        return found


def _turned(x: Tensor, angles: Tensor) -> Tensor:
    """x [B, T, H, D], pairs of the two halves rotated by angles [B, T, D / 2]."""
    one, two = x.float().chunk(2, -1)
    cos, sin = angles.cos()[:, :, None], angles.sin()[:, :, None]
    return torch.cat([one * cos - two * sin, two * cos + one * sin], -1).to(x.dtype)


class Seen:
    """The keys and values of one layer, which the rows of each position see. The first `attend` holds the texts: a position sees those
    up to itself. Each later one continues the draft of every position by one row, which also sees the draft's rows before it, and in
    the text what its first row saw."""

    def __init__(self, text: Tensor, positions: Tensor) -> None:
        """text, positions: i64[B, T], as in Window. Rows begin at positions 0 of the window."""
        self.positions = positions.float()
        t = text.shape[1]
        same = (text[:, :, None] == text[:, None]) & torch.ones(t, t, dtype=torch.bool).tril()
        self.hidden = torch.zeros(same.shape).masked_fill(~same, -torch.inf)[:, None, None]  # [B, 1, 1, T, T]
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def shift(self) -> None:
        """The next rows are one position further on."""
        self.positions = self.positions + 1

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B, n, H, D], k and v [B, n, K, D] of the first n positions -> [B, n, H, D]."""
        b, n, heads, size = q.shape
        grouped = q.view(b, n, k.shape[2], -1, size)  # B n K G D
        self.keys.append(k)
        self.values.append(v)
        scores = torch.einsum("bnkgd,btkd->bkgnt", grouped, self.keys[0][:, :n])
        scores = scores.float() / math.sqrt(size) + self.hidden[..., :n, :n]
        own = [(grouped * key[:, :n, :, None]).sum(-1).permute(0, 2, 3, 1).float() / math.sqrt(size) for key in self.keys[1:]]
        weights = torch.cat([scores, *(one[..., None] for one in own)], -1).softmax(-1).to(v.dtype)
        found = torch.einsum("bkgnt,btkd->bnkgd", weights[..., :n], self.values[0][:, :n])
        for i, value in enumerate(self.values[1:]):
            found = found + weights[..., n + i].permute(0, 3, 1, 2)[..., None] * value[:, :n, :, None]
        return found.reshape(b, n, heads, size)


class Mlp(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.down_proj = nn.Linear(shape.intermediate, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return found


class Layer(nn.Module):
    """mlp: False for the attention half alone. It starts as the identity. start: the weights of another layer, of which what its two
    halves add is left out at first."""

    def __init__(self, shape: Shape, start: Mapping[str, Tensor] | None = None, mlp: bool = True) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden, shape.eps)
        self.self_attn = Attention(shape)
        if mlp:
            self.post_attention_layernorm = RMSNorm(shape.hidden, shape.eps)
            self.mlp = Mlp(shape)
        own = dict(self.named_parameters())
        with torch.no_grad():
            for name, parameter in own.items():
                if start is not None:
                    parameter.copy_(start[name])
                elif parameter.ndim > 1:
                    nn.init.normal_(parameter, std=shape.hidden**-0.5)
            for last in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
                if last in own:
                    own[last].zero_()

    def forward(self, x: Tensor, seen: Seen) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), seen)
        return x + self.mlp(self.post_attention_layernorm(x)) if hasattr(self, "mlp") else x
