"""The definition: float64 PyTorch on the CPU, one loop a sequence, head and row, written to be obviously right."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from redraft.core.batch import Batch, PageView
from redraft.core.sequence import Lanes
from redraft.core.taps import Taps
from redraft.core.tree import I32
from redraft.errors import Unsupported
from redraft.models.spec import Experts, LayerSpec, ModelSpec, Norm
from redraft.ops.backend import Feature, LayerWeights, Linear, NormWeights, Outputs, Weights, best_first

PAGE = 32


@dataclass(frozen=True)
class Plan:
    batch: Batch
    tokens: Tensor
    positions: Tensor


class Reference:
    """Pool: float64 [slabs, layers, kv heads, 2 (key, value), 32, D]."""

    name = "reference"
    features = frozenset({Feature.PER_LAYER, Feature.PER_HEAD})

    def __init__(self, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> None:
        if dtype != torch.float64 or torch.device(device).type != "cpu":
            raise Unsupported(f"backend 'reference' computes in float64 on the CPU only, not {dtype} on {device}")
        self.dtype, self.device = dtype, torch.device(device)

    def slab_bytes(self, spec: ModelSpec) -> int:
        return len(spec.layers) * spec.kv_heads * 2 * PAGE * spec.head_dim * 8

    def allocate(self, spec: ModelSpec, slabs: int) -> Tensor:
        return torch.zeros(slabs, len(spec.layers), spec.kv_heads, 2, PAGE, spec.head_dim, dtype=self.dtype)

    def zero(self, pool: Tensor, pages: list[tuple[Lanes, int]]) -> None:
        for kind, page in pages:
            _units(pool, kind)[page] = 0

    def move(self, pool: Tensor, kind: Lanes, src: I32, dst: I32) -> None:
        units = _units(pool, kind)  # [pages of this kind, heads in a page, 2, 32, D]
        got = [units[s // PAGE][..., s % PAGE, :].clone() for s in src.tolist()]
        for d, value in zip(dst.tolist(), got, strict=True):
            units[d // PAGE][..., d % PAGE, :] = value

    def plan(self, batch: Batch, spec: ModelSpec) -> Plan:
        return Plan(batch, torch.from_numpy(batch.tokens).long(), torch.from_numpy(batch.positions).double())

    def pack(self, weights: Linear) -> Linear:
        return weights

    def embed(self, weights: Weights, plan: Plan) -> Tensor:
        x = weights.embed[plan.tokens]
        return x if weights.positions is None else x + weights.positions[plan.positions.long()]

    def norm(self, x: Tensor, weights: NormWeights, norm: Norm) -> Tensor:
        if norm.kind == "layer":
            x = x - x.mean(-1, keepdim=True)
        x = x / (x.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt() * weights.weight
        return x if weights.bias is None else x + weights.bias

    def linear(self, x: Tensor, weights: Linear) -> Tensor:
        y = x @ weights.weight.T
        return y if weights.bias is None else y + weights.bias

    def activate(self, x: Tensor, activation: str, gated: bool) -> Tensor:
        gate, up = x.chunk(2, -1) if gated else (x, 1.0)
        match activation:
            case "silu":
                return gate * torch.sigmoid(gate) * up
            case "gelu":
                return gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2))) * up
            case "gelu_tanh":
                return F.gelu(gate, approximate="tanh") * up
            case "relu":
                return gate.clamp(min=0) * up
        raise Unsupported(f"activation {activation!r}")

    def rope(self, x: Tensor, layer: LayerSpec, plan: Plan) -> Tensor:
        rotary = layer.rotary
        if rotary is None:
            return x
        angles = plan.positions[:, None] * torch.tensor(rotary.frequencies, dtype=torch.float64)
        cos, sin = (angles.cos() * rotary.scale)[:, None], (angles.sin() * rotary.scale)[:, None]
        a, b, rest = x.split([rotary.dim // 2, rotary.dim // 2, x.shape[-1] - rotary.dim], -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)

    def attend(self, index: int, layer: LayerSpec, q: Tensor, k: Tensor, v: Tensor, pool: Tensor, plan: Plan) -> Tensor:
        batch, pages = plan.batch, plan.batch.pages
        out = torch.zeros(q.shape[0], layer.heads, layer.head_dim, dtype=self.dtype)
        group = layer.heads // layer.kv_heads
        at = 0  # tree rows before this sequence
        for s in range(len(batch.tree_starts)):
            start, tree_start, end = int(batch.starts[s]), int(batch.tree_starts[s]), int(batch.starts[s + 1])
            for head in range(layer.kv_heads):
                lane = _lane(pages.kinds[s], index, head, layer.kv_heads)
                length, tail = int(pages.lengths[s][lane]), pages.tail[s]
                memory = [_place(pool, pages, s, lane, slot, index, head) for slot in range(length + tail + end - start)]
                for r in range(start, end):  # every row is written before any is read
                    memory[length + tail + r - start][0] = k[r, head]
                    memory[length + tail + r - start][1] = v[r, head]
                held = pages.positions[s]
                positions = list(range(length)) if held is None else held[lane].tolist()
                for r in range(start, end):
                    seen = list(range(length))
                    where = list(positions)
                    mine = int(batch.positions[r])
                    if r < tree_start:  # a chain row sees the chain up to itself
                        seen += range(length, length + r - start + 1)
                        where += range(mine - (r - start), mine + 1)
                    else:  # a node sees the whole chain, its ancestors and itself
                        chain = pages.chain[s]
                        bits = batch.ancestors[at + r - tree_start]
                        path = [j for j in range(64 * len(bits)) if int(bits[j // 64]) >> (j % 64) & 1]
                        root = mine - len(path)
                        seen += range(length, length + chain)
                        where += range(root - chain + 1, root + 1)
                        seen += [length + chain + j for j in path]
                        where += range(root + 1, mine + 1)
                    if layer.window is not None:
                        seen = [i for i, p in zip(seen, where, strict=True) if mine - p < layer.window]
                    keys = torch.stack([memory[i][0] for i in seen])
                    values = torch.stack([memory[i][1] for i in seen])
                    for h in range(head * group, (head + 1) * group):
                        out[r, h] = (keys @ q[r, h] / math.sqrt(layer.head_dim)).softmax(0) @ values
            at += end - tree_start
        return out.view(q.shape[0], -1)

    def experts(self, x: Tensor, weights: LayerWeights, experts: Experts) -> Tensor:
        assert weights.router is not None and weights.experts_up is not None and weights.experts_down is not None
        chances = self.linear(x, weights.router).softmax(-1)
        out = torch.zeros_like(x)
        for t in range(x.shape[0]):
            top = chances[t].topk(experts.top_k)
            share = top.values / top.values.sum() if experts.renormalise else top.values
            for e, p in zip(top.indices.tolist(), share, strict=True):
                inner = self.activate(weights.experts_up[e] @ x[t], experts.mlp.activation, experts.mlp.gated)
                out[t] += p * (weights.experts_down[e] @ inner)
        return out

    def head(self, x: Tensor, weights: Weights, final: Norm, plan: Plan, taps: Taps) -> Outputs:
        rows = self.norm(x[torch.from_numpy(plan.batch.logit_rows).long()], weights.final_norm, final)
        logits = self.linear(rows, weights.head)
        top_k = best_first(logits, taps.top_k) if taps.top_k else None
        argmax = logits.argmax(-1).int().numpy()
        return Outputs(argmax, top_k, logits if taps.logits else None)


def _units(pool: Tensor, kind: Lanes) -> Tensor:
    """The pool as [pages of this kind, heads in a page, 2, 32, D]."""
    slabs, layers, heads = pool.shape[:3]
    of = {Lanes.SHARED: layers * heads, Lanes.PER_LAYER: heads, Lanes.PER_HEAD: 1}[kind]
    return pool.view(slabs * layers * heads // of, of, *pool.shape[3:])


def _lane(kind: Lanes, layer: int, head: int, kv_heads: int) -> int:
    return {Lanes.SHARED: 0, Lanes.PER_LAYER: layer, Lanes.PER_HEAD: layer * kv_heads + head}[kind]


def _place(pool: Tensor, pages: PageView, s: int, lane: int, slot: int, layer: int, head: int) -> Any:
    """[2, D]: key and value of one slot, a view into the pool."""
    kind = pages.kinds[s]
    unit = {Lanes.SHARED: layer * pool.shape[2] + head, Lanes.PER_LAYER: head, Lanes.PER_HEAD: 0}[kind]
    page = int(pages.pages[s][lane, slot // PAGE])
    return _units(pool, kind)[page, unit][:, slot % PAGE]
