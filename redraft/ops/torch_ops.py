"""PyTorch on CPU or CUDA: all index and mask tensors are made once a step, then a layer is a handful of large operations.

Attention gathers each sequence's pages into a padded [S, K, slots, D] block and calls scaled_dot_product_attention;
sequences with many rows (prompt chunks) go alone, so that padding never costs more than it saves.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from redraft.core.batch import Batch
from redraft.core.sequence import Lanes
from redraft.core.taps import Taps
from redraft.core.tree import I32
from redraft.errors import Unsupported
from redraft.models.spec import Experts, LayerSpec, ModelSpec, Norm, Rotary
from redraft.ops.backend import Feature, LayerWeights, Linear, NormWeights, Outputs, Weights, best_first

PAGE = 32
PACKED_FOR = 16  # rows; the layout serves every number of rows, one made for a single row serves only that
ALONE = 48  # a sequence with more rows than this is attended by itself


@dataclass
class Group:
    """Sequences attended together. rows: i64[S, R] padded row numbers, or None where the group's rows are simply all
    rows in order; kept: positions in the padded block that are real rows; pages: i64[2 S K n] rows of the pool's pages;
    masks: window -> [S, 1, G R, slots] additive."""

    count: int
    width: int
    slots: int
    pages: Tensor
    masks: dict[int | None, Tensor]
    rows: Tensor | None = None
    kept: Tensor | None = None
    real: Tensor | None = None


@dataclass
class Plan:
    tokens: Tensor
    positions: Tensor
    logit_rows: Tensor
    writes: Tensor  # i64[T * K]: row of the pool's slots for the key of (row, head) in layer 0; the value lies 32 on
    groups: list[Group]
    kv_heads: int
    turns: dict[Rotary, tuple[Tensor, Tensor]] = field(default_factory=dict)


class TorchOps:
    """Pool: [slabs, layers, kv heads, 2 (key, value), 32, D] in the backend's dtype."""

    name = "torch"
    features: frozenset[Feature] = frozenset()

    def __init__(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> None:
        self.dtype, self.device = dtype, torch.device(device)

    def slab_bytes(self, spec: ModelSpec) -> int:
        return len(spec.layers) * spec.kv_heads * 2 * PAGE * spec.head_dim * self.dtype.itemsize

    def allocate(self, spec: ModelSpec, slabs: int) -> Tensor:
        # not zeroed: a page is, when it is handed out, and untouched memory costs nothing
        return torch.empty(slabs, len(spec.layers), spec.kv_heads, 2, PAGE, spec.head_dim, dtype=self.dtype, device=self.device)

    def zero(self, pool: Tensor, pages: list[tuple[Lanes, int]]) -> None:
        if any(kind != Lanes.SHARED for kind, _ in pages):
            raise self._lanes()
        for _, page in pages:
            pool[page].zero_()

    def move(self, pool: Tensor, kind: Lanes, src: I32, dst: I32) -> None:
        if kind != Lanes.SHARED:
            raise self._lanes()
        places = self._upload(np.stack([src // PAGE, src % PAGE, dst // PAGE, dst % PAGE]))
        got = pool[places[0], :, :, :, places[1]]  # [moves, L, K, 2, D]: all gathered, then scattered
        pool[places[2], :, :, :, places[3]] = got

    def _lanes(self) -> Unsupported:
        return Unsupported("backend 'torch' attends shared lanes only; per-layer and per-head lanes need backend 'reference'")

    def _upload(self, array: NDArray[np.generic]) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array, np.int64))
        return tensor if self.device.type == "cpu" else tensor.pin_memory().to(self.device, non_blocking=True)

    # ---- the plan: integers of one step, uploaded in one buffer

    def plan(self, batch: Batch, spec: ModelSpec) -> Plan:
        if any(kind != Lanes.SHARED for kind in batch.pages.kinds):
            raise self._lanes()
        layers, heads = len(spec.layers), spec.kv_heads
        rows = np.diff(batch.starts).tolist()
        small = [s for s, n in enumerate(rows) if n <= ALONE]
        members = ([small] if small else []) + [[s] for s, n in enumerate(rows) if n > ALONE]
        windows = {layer.window for layer in spec.layers}
        parts: list[NDArray[np.generic]] = [batch.tokens, batch.positions, batch.logit_rows, self._writes(batch, layers, heads)]
        shapes: list[tuple[int, int, int]] = []
        for group in members:
            pages, slots = self._pages(batch, group, layers, heads)
            width = max(rows[s] for s in group)
            shapes.append((len(group), width, slots))
            parts.append(pages)
            parts += self._padding(batch, group, rows, width)
        sizes = [p.size for p in parts]
        up = iter(self._upload(np.concatenate([p.ravel() for p in parts])).split(sizes))
        tokens, positions, logit_rows, writes = next(up), next(up), next(up), next(up)
        groups = []
        deepest = np.maximum.reduceat(batch.positions, batch.starts[:-1])  # a tree's last row need not be its deepest
        tree_rows = np.concatenate([[0], np.cumsum(batch.starts[1:] - batch.tree_starts)])
        share = spec.layers[0].heads // heads
        for group, (count, width, slots) in zip(members, shapes, strict=True):
            masks: dict[int | None, Tensor] = {}
            for window in windows:
                # a window that no row can reach past is no window: most steps share one mask
                reach = None if window is None or int(deepest[group].max()) < window else window
                if reach not in masks:
                    masks[reach] = self._mask(batch, group, width, slots, reach, tree_rows, share)
                masks[window] = masks[reach]
            pages_t, rows_t, kept, real = next(up), next(up), next(up), next(up)
            padded = (rows_t.view(count, width), kept, real) if rows_t.numel() else (None, None, None)
            groups.append(Group(count, width, slots, pages_t, masks, *padded))
        return Plan(tokens, positions, logit_rows, writes, groups, heads)

    def _writes(self, batch: Batch, layers: int, heads: int) -> NDArray[np.int64]:
        view, slots = batch.pages, []
        for s, (a, z) in enumerate(zip(batch.starts[:-1].tolist(), batch.starts[1:].tolist(), strict=True)):
            first = int(view.lengths[s][0]) + view.tail[s]
            slot = np.arange(first, first + z - a)
            slots.append(view.pages[s][0, slot // PAGE].astype(np.int64) * (layers * heads * 2 * PAGE) + slot % PAGE)
        base = np.concatenate(slots) if slots else np.zeros(0, np.int64)
        return (base[:, None] + np.arange(heads) * (2 * PAGE)).ravel()

    def _pages(self, batch: Batch, group: list[int], layers: int, heads: int) -> tuple[NDArray[np.int64], int]:
        view = batch.pages
        held = [-(-(int(view.lengths[s][0]) + view.tail[s] + int(batch.starts[s + 1] - batch.starts[s])) // PAGE) for s in group]
        table = np.zeros((len(group), max(held)), np.int64)
        for i, (s, n) in enumerate(zip(group, held, strict=True)):
            table[i, :n] = view.pages[s][0, :n]
            table[i, n:] = view.pages[s][0, 0]  # padding must point at zeroed memory that someone owns
        unit = np.arange(heads)[None, None, :, None] * 2 + np.arange(2)[:, None, None, None]
        return table[None, :, None, :] * (layers * heads * 2) + unit, max(held) * PAGE

    def _padding(self, batch: Batch, group: list[int], rows: list[int], width: int) -> list[NDArray[np.int64]]:
        """Padded row numbers, real places and real rows; empty when the group is all rows in order without padding."""
        if len(group) == len(rows) and all(rows[s] == width for s in group):
            return [np.zeros(0, np.int64)] * 3
        table = np.zeros((len(group), width), np.int64)
        real = np.zeros((len(group), width), bool)
        for i, s in enumerate(group):
            table[i, : rows[s]] = np.arange(batch.starts[s], batch.starts[s + 1])
            real[i, : rows[s]] = True
        return [table, np.flatnonzero(real), table[real]]

    def _mask(
        self, batch: Batch, group: list[int], width: int, slots: int, window: int | None, tree_rows: NDArray[np.int64], share: int
    ) -> Tensor:
        view = batch.pages
        see = np.zeros((len(group), width, slots), bool)
        see[:, :, 0] = True  # padding rows see something, so that no softmax is empty
        for i, s in enumerate(group):
            a, t, z = int(batch.starts[s]), int(batch.tree_starts[s]), int(batch.starts[s + 1])
            length, chain = int(view.lengths[s][0]), view.chain[s]
            mine, rows = see[i], t - a
            mine[: z - a, :length] = True
            mine[rows : z - a, length : length + chain] = True
            mine[:rows, length : length + rows] = np.tri(rows, dtype=bool)
            bits = None
            if z > t:
                own = batch.ancestors[tree_rows[s] : tree_rows[s] + z - t]
                nodes = view.tail[s] + rows + z - t - chain
                bits = np.unpackbits(own.astype("<u8").view(np.uint8), axis=1, bitorder="little")[:, :nodes].astype(bool)
                mine[rows : z - a, length + chain : length + chain + nodes] = bits
            if window is not None:
                held = view.positions[s]
                where = np.full((z - a, slots), np.iinfo(np.int64).max // 2)
                where[:, :length] = np.arange(length) if held is None else held[0]
                at = batch.positions[a:z].astype(np.int64)
                if rows:
                    where[:, length : length + rows] = at[:rows]
                if bits is not None:
                    deep = bits.sum(1)
                    root = at[rows] - deep[0]
                    where[:, length : length + chain] = np.arange(root - chain + 1, root + 1)
                    # a node on the path lies as many positions back as there are later nodes on it
                    where[rows:, length + chain : length + chain + nodes] = at[rows:, None] - deep[:, None] + np.cumsum(bits, 1)
                mine[: z - a] &= at[:, None] - where < window
        seen = torch.from_numpy(see).to(self.device)
        mask = torch.zeros(see.shape, dtype=self.dtype, device=self.device).masked_fill_(~seen, float("-inf"))
        return mask[:, None].expand(-1, share, -1, -1).reshape(len(group), 1, share * width, slots)

    # ---- the operations

    def embed(self, weights: Weights, plan: Plan) -> Tensor:
        x = weights.embed.index_select(0, plan.tokens)
        return x if weights.positions is None else x + weights.positions.index_select(0, plan.positions)

    def norm(self, x: Tensor, weights: NormWeights, norm: Norm) -> Tensor:
        if norm.kind == "layer":
            return F.layer_norm(x, x.shape[-1:], weights.weight, weights.bias, norm.eps)
        return F.rms_norm(x, x.shape[-1:], weights.weight, norm.eps)

    def pack(self, weights: Linear) -> Linear:
        """On the CPU, oneDNN's blocked layout: 17 rows then cost 1.7 times one row instead of 2.3 (docs/log.md)."""
        if self.device.type != "cpu" or self.dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
            return weights
        return Linear(torch.ops.mkldnn._reorder_linear_weight(weights.weight, PACKED_FOR), weights.bias)

    def linear(self, x: Tensor, weights: Linear) -> Tensor:
        if not weights.weight.is_mkldnn:
            return F.linear(x, weights.weight, weights.bias)
        if not len(x):
            return x.new_empty(0, weights.weight.shape[0])
        return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, weights.weight, weights.bias, "none", [], ""))

    def activate(self, x: Tensor, activation: str, gated: bool) -> Tensor:
        gate = x.narrow(-1, 0, x.shape[-1] // 2) if gated else x
        match activation:
            case "silu":
                out = F.silu(gate)
            case "gelu":
                out = F.gelu(gate)
            case "gelu_tanh":
                out = F.gelu(gate, approximate="tanh")
            case "relu":
                out = F.relu(gate)
            case _:
                raise Unsupported(f"activation {activation!r}")
        return out.mul_(x.narrow(-1, gate.shape[-1], gate.shape[-1])) if gated else out

    def rope(self, x: Tensor, layer: LayerSpec, plan: Plan) -> Tensor:
        rotary = layer.rotary
        if rotary is None:
            return x
        if rotary not in plan.turns:
            plan.turns[rotary] = self._turns(rotary, plan.positions)
        cos, sin = plan.turns[rotary]
        if rotary.dim == x.shape[-1]:
            return torch.addcmul(x * cos, x.roll(rotary.dim // 2, -1), sin)
        turned, rest = x.split([rotary.dim, x.shape[-1] - rotary.dim], -1)
        return torch.cat([torch.addcmul(turned * cos, turned.roll(rotary.dim // 2, -1), sin), rest], -1)

    def _turns(self, rotary: Rotary, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and signed sin [T, 1, dim] such that x * cos + roll(x, dim / 2) * sin turns x; angles in float64."""
        angles = positions.double()[:, None] * torch.tensor(rotary.frequencies, dtype=torch.float64, device=self.device)
        cos, sin = angles.cos() * rotary.scale, angles.sin() * rotary.scale
        return torch.cat([cos, cos], -1)[:, None].to(self.dtype), torch.cat([-sin, sin], -1)[:, None].to(self.dtype)

    def attend(self, index: int, layer: LayerSpec, q: Tensor, k: Tensor, v: Tensor, pool: Tensor, plan: Plan) -> Tensor:
        heads, size = layer.kv_heads, layer.head_dim
        share = layer.heads // heads
        slots = pool.view(-1, size)
        writes = plan.writes + index * heads * 2 * PAGE
        slots.index_copy_(0, writes, k.reshape(-1, size))
        slots.index_copy_(0, writes + PAGE, v.reshape(-1, size))
        pages = pool.view(-1, PAGE * size)
        out = None
        for group in plan.groups:
            held = pages.index_select(0, group.pages + index * heads * 2).view(2, group.count, heads, group.slots, size)
            rows = q if group.rows is None else q[group.rows]
            rows = rows.view(group.count, group.width, heads, share, size).permute(0, 2, 3, 1, 4)
            rows = rows.reshape(group.count, heads, share * group.width, size)
            seen = F.scaled_dot_product_attention(rows, held[0], held[1], attn_mask=group.masks[layer.window])
            seen = seen.view(group.count, heads, share, group.width, size).permute(0, 3, 1, 2, 4)
            seen = seen.reshape(group.count * group.width, heads * share * size)
            if group.kept is None or group.real is None:
                return seen
            if out is None:
                out = torch.empty(q.shape[0], heads * share * size, dtype=q.dtype, device=q.device)
            out[group.real] = seen[group.kept]
        assert out is not None, "an empty batch has no attention"
        return out

    def experts(self, x: Tensor, weights: LayerWeights, experts: Experts) -> Tensor:
        assert weights.router is not None and weights.experts_up is not None and weights.experts_down is not None
        chances = self.linear(x, weights.router).to(torch.promote_types(x.dtype, torch.float32)).softmax(-1)
        share, chosen = chances.topk(experts.top_k, dim=-1)
        if experts.renormalise:
            share = share / share.sum(-1, keepdim=True)
        share = share.to(x.dtype)
        out = torch.zeros_like(x)
        for e in chosen.unique().tolist():
            rows, place = (chosen == e).nonzero(as_tuple=True)
            inner = self.activate(F.linear(x[rows], weights.experts_up[e]), experts.mlp.activation, experts.mlp.gated)
            out.index_add_(0, rows, F.linear(inner, weights.experts_down[e]) * share[rows, place, None])
        return out

    def head(self, x: Tensor, weights: Weights, final: Norm, plan: Plan, taps: Taps) -> Outputs:
        rows = x if plan.logit_rows.numel() == x.shape[0] else x.index_select(0, plan.logit_rows)
        logits = self.linear(self.norm(rows, weights.final_norm, final), weights.head)
        top_k = best_first(logits, taps.top_k) if taps.top_k else None
        argmax = logits.argmax(-1).int().cpu().numpy()
        return Outputs(argmax, top_k, logits if taps.logits else None)
