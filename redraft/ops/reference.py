"""The definition of all operations: float64 PyTorch on the CPU with loops over sequences, heads and rows, written to be simple."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from redraft.core.batch import Batch
from redraft.core.noise import draw
from redraft.core.sequence import Lanes, Space
from redraft.core.spec import Attention, Experts, ModelSpec, Norm, Rotary
from redraft.core.taps import NO_TAPS, Taps
from redraft.core.tree import F64, I32, I64
from redraft.core.view import View, Watch, Window
from redraft.errors import Unsupported
from redraft.ops.arrays import Numbers
from redraft.ops.backend import (
    Adapted,
    Feature,
    ForwardResult,
    LayerWeights,
    Linear,
    LinearWeights,
    LowRank,
    NormWeights,
    Room,
    Select,
    Weights,
    WeightSums,
    argmax,
    best_first,
    limited,
)
from redraft.ops.format import PAGE, Arrays, Format, plain
from redraft.ops.places import chain_shape, unknown
from redraft.ops.quantized import POWERS, Quantized
from redraft.ops.torch_arrays import as_tensor, as_tensors, dtype_of


@dataclass(frozen=True)
class ReferencePlan:
    """tokens: i64[T]; positions: f64[T]; watches, seen: by index of a sequence in the batch."""

    batch: Batch
    tokens: Tensor
    positions: Tensor
    watches: Mapping[int, tuple[Watch, ...]]
    seen: dict[int, WeightSums]


class FormatStore:
    """All units of one format: name of an array -> [units, *shape]. In this backend each format has its own memory."""

    def __init__(self, fmt: Format, arrays: dict[str, Tensor], sides: set[str]) -> None:
        self.format, self.arrays = fmt, arrays
        self.codes = [name for name in arrays if name not in sides]

    def keys_values(self, unit: int) -> tuple[Tensor, Tensor]:
        """The keys and values [32, D] of a unit, in the form that attention reads."""
        held = {name: self.arrays[name][unit] for name in self.codes}
        if self.format.codec is None:
            return held["keys"], held["values"]
        return self.format.codec.decode(held)

    def write(self, unit: int, offset: int, key: Tensor, value: Tensor) -> None:
        """Writes one slot to the arrays of the codec."""
        entries: Arrays = {"keys": key[None], "values": value[None]}
        if self.format.codec is not None:
            entries = self.format.codec.store(key[None], value[None])
        for name, entry in entries.items():
            self.arrays[name][unit, offset] = entry[0]


@dataclass
class ReferencePool:
    """data: float64 [blocks, layers, kv heads, 2 (key, value), 32, D], the units of the plain format."""

    data: Tensor
    spec: ModelSpec
    formats: dict[str, FormatStore] = field(default_factory=dict)

    def units(self, space: Space, page: int) -> range:
        layers, heads = self.data.shape[1:3]
        count = {Lanes.SHARED: layers * heads, Lanes.PER_LAYER: heads, Lanes.PER_HEAD: 1}[space.lanes]
        return range(page * count, (page + 1) * count)


class Reference:
    name = "reference"
    features = frozenset({Feature.PER_LAYER, Feature.PER_HEAD})
    mixers: frozenset[type] = frozenset({Attention})

    def __init__(self, dtype: Any = torch.float64, device: torch.device | str = "cpu") -> None:
        dtype = dtype_of(dtype)
        if dtype != torch.float64 or torch.device(device).type != "cpu":
            raise Unsupported(f"backend 'reference' computes in float64 on the CPU only, not {dtype} on {device}")
        self.dtype, self.device = dtype, torch.device(device)

    def mode(self) -> torch.inference_mode:
        return torch.inference_mode()

    def block_bytes(self, spec: ModelSpec) -> int:
        return len(spec.attention) * spec.kv_heads * 2 * PAGE * spec.head_dim * 8

    def allocate(self, spec: ModelSpec, blocks: int, room: Room | None = None) -> ReferencePool:
        if room is not None:
            raise Unsupported("backend 'reference' has its pool in memory of its own")
        data = torch.zeros(blocks, len(spec.attention), spec.kv_heads, 2, PAGE, spec.head_dim, dtype=self.dtype)
        units = data.view(-1, 2, PAGE, spec.head_dim)
        exact = FormatStore(Format("", plain(self.dtype, spec.head_dim)), {"keys": units[:, 0], "values": units[:, 1]}, set())
        return ReferencePool(data, spec, {"": exact})

    def define(self, pool: ReferencePool, fmt: Format) -> int:
        count = self.block_bytes(pool.spec) // fmt.bytes
        if not count:
            raise Unsupported(f"format {fmt.name!r}: a unit takes {fmt.bytes} bytes, more than a block")
        if fmt.name in pool.formats:  # another combination of methods has the same format
            return count
        arrays = {name: torch.zeros(len(pool.data) * count, *a.shape, dtype=a.dtype) for name, a in fmt.arrays.items()}
        sides = {name for side in fmt.sides for name in side.arrays(pool.spec.head_dim, self.dtype)}
        pool.formats[fmt.name] = FormatStore(fmt, arrays, sides)
        return count

    def zero(self, pool: ReferencePool, pages: list[tuple[Space, int]]) -> None:
        for space, page in pages:
            for array in pool.formats[space.format].arrays.values():
                for unit in pool.units(space, page):
                    array[unit] = 0

    def move(self, pool: ReferencePool, space: Space, src: I32, dst: I32, delta: int = 0) -> None:
        assert not delta or space == Space(), f"{space}: keys are rotated in plain shared pages only"
        stored = pool.formats[space.format]
        for name, array in stored.arrays.items():
            if stored.format.arrays[name].whole:
                continue
            got = [[array[u, s % PAGE].clone() for u in pool.units(space, s // PAGE)] for s in src.tolist()]
            for d, values in zip(dst.tolist(), got, strict=True):
                for u, value in zip(pool.units(space, d // PAGE), values, strict=True):
                    if delta and name == "keys":  # the units of a page are ordered by layer
                        value = turned(value, pool.spec.attention[u // pool.spec.kv_heads % len(pool.spec.attention)].rotary, delta)
                    array[u, d % PAGE] = value

    def read(self, pool: ReferencePool, space: Space, pages: I32) -> Arrays:
        units = [unit for page in pages.tolist() for unit in pool.units(space, page)]
        return {name: array[units] for name, array in pool.formats[space.format].arrays.items()}

    contents = read

    def write(self, pool: ReferencePool, space: Space, pages: I32, arrays: Arrays) -> None:
        units = [unit for page in pages.tolist() for unit in pool.units(space, page)]
        for name, array in arrays.items():
            pool.formats[space.format].arrays[name][units] = array

    def encode(self, pool: ReferencePool, source: Space, target: Space, src: I32, dst: I32, lanes: I32) -> None:
        old, new = pool.formats[source.format], pool.formats[target.format]
        for i, (s, d) in enumerate(zip(src.tolist(), dst.tolist(), strict=True)):
            for here, there in zip(pool.units(source, s), pool.units(target, d), strict=True):
                keys, values = old.keys_values(here)
                made: Arrays = {"keys": keys[None], "values": values[None]}
                if new.format.codec is not None:
                    made = new.format.codec.pack(keys[None], values[None], lanes[i : i + 1])
                for name in new.arrays:
                    if name in new.codes:
                        new.arrays[name][there] = made[name][0]
                    elif name in old.arrays:
                        new.arrays[name][there] = old.arrays[name][here]

    def summarize(self, pool: ReferencePool, space: Space, pages: I32, read: Select) -> None:
        stored = pool.formats[space.format]
        for page in pages.tolist():
            for unit in pool.units(space, page):
                for name, value in read.summarize(stored.keys_values(unit)[0][None]).items():
                    stored.arrays[name][unit] = value[0]

    def plan(self, batch: Batch, spec: ModelSpec, taps: Taps = NO_TAPS) -> ReferencePlan:
        tokens, positions = torch.from_numpy(batch.tokens).long(), torch.from_numpy(batch.positions).double()
        seen = {}
        for s, watches in taps.attention.items():
            nodes = int(batch.starts[s + 1] - batch.tree_starts[s])
            shape = len(spec.attention), spec.kv_heads, batch.pages.held(s, int(batch.starts[s + 1] - batch.starts[s]))
            n = len(watches)
            chain = chain_shape(watches, int(batch.tree_starts[s] - batch.starts[s]), shape)
            seen[s] = WeightSums(torch.zeros(*chain, dtype=self.dtype), torch.zeros(n, nodes, *shape, dtype=self.dtype))
        return ReferencePlan(batch, tokens, positions, taps.attention, seen)

    @property
    def threads(self) -> int:
        return torch.get_num_threads()

    def use_threads(self, count: int) -> None:
        torch.set_num_threads(count)

    def draw(self, key: int, ids: I64, values: F64) -> int:
        return draw(key, ids, values)

    def place(self, array: Numbers) -> Tensor:
        return as_tensor(array)

    def pack(self, weights: LinearWeights, gated: bool = False) -> LinearWeights:
        weights = as_tensors(weights)
        return weights.halved() if isinstance(weights, Quantized) else weights

    def embed(self, weights: Weights, plan: ReferencePlan) -> Tensor:
        x = self.rows(weights.embed, plan.batch.tokens)
        return x if weights.positions is None else x + weights.positions[plan.positions.long()]

    def rows(self, table: Any, ids: I32) -> Tensor:
        assert isinstance(table, Tensor), "an embedding in the form of another backend"
        return table[torch.from_numpy(ids).long()]

    def norm(self, x: Tensor, weights: NormWeights, norm: Norm) -> Tensor:
        if norm.kind == "layer":
            x = x - x.mean(-1, keepdim=True)
        x = x / (x.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt() * weights.weight
        return x if weights.bias is None else x + weights.bias

    def linear(self, x: Tensor, weights: LinearWeights) -> Tensor:
        if isinstance(weights, Adapted):
            return weights.product(x, self)
        if isinstance(weights, Quantized):
            return torch.stack([quantized_row(row, weights) for row in x]) if len(x) else x.new_empty(0, weights.shape[0])
        assert isinstance(weights, Linear), "a weight in the form of another backend"
        y: Tensor = x @ weights.weight.T
        return y if weights.bias is None else y + weights.bias

    def logits(self, x: Tensor, head: LinearWeights) -> Tensor:
        return self.linear(x, head)

    def add_low_rank(self, y: Tensor, x: Tensor, rows: I64, term: LowRank) -> None:
        y[rows, term.first : term.first + term.b.shape[1]] += x[rows] @ term.a.T @ term.b

    def activate(self, x: Tensor, activation: str, gated: bool) -> Tensor:
        gate, up = x.chunk(2, -1) if gated else (x, 1.0)
        match activation:
            case "silu":
                return gate * torch.sigmoid(gate) * up
            case "gelu":
                return gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2))) * up
            case "gelu_tanh":
                return F.gelu(gate, approximate="tanh") * up
            case "quick_gelu":
                return gate * torch.sigmoid(1.702 * gate) * up
            case "relu":
                return gate.clamp(min=0) * up
            case "sigmoid":
                return torch.sigmoid(gate) * up
        raise Unsupported(f"activation {activation!r}")

    def rope(self, x: Tensor, layer: Attention, plan: ReferencePlan) -> Tensor:
        if layer.rotary is None:
            return x
        return turned(x, layer.rotary, plan.positions[:, None, None]) * _scales(x, layer.rotary)

    def attend(
        self,
        index: int,
        layer: Attention,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pool: ReferencePool,
        plan: ReferencePlan,
        sink_logits: Tensor | None = None,
    ) -> Tensor:
        out = torch.zeros(q.shape[0], layer.heads, layer.head_dim, dtype=self.dtype)
        for s in range(len(plan.batch.tree_starts)):
            own = slice(int(plan.batch.starts[s]), int(plan.batch.starts[s + 1]))
            text = SequenceAttention(pool, plan.batch, s, index, layer)
            text.write(k[own], v[own])  # all rows are written before any is read
            text.hold()
            for r in range(own.start, own.stop):
                out[r] = text.attend(r, q[r], plan, sink_logits)
        return out.view(q.shape[0], -1)

    def products(self, a: Tensor, b: Tensor) -> Tensor:
        return products(a, b)

    def watched(self, plan: ReferencePlan) -> Mapping[int, WeightSums]:
        return plan.seen

    def experts(self, x: Tensor, weights: LayerWeights, experts: Experts) -> Tensor:
        assert weights.router is not None
        chances = self.linear(x, weights.router).softmax(-1)
        out = torch.zeros_like(x)
        for t in range(x.shape[0]):
            values, order = chances[t].sort(descending=True, stable=True)  # of equal ones the lowest expert first
            share = values[: experts.top_k] / (values[: experts.top_k].sum() if experts.renormalise else 1)
            for e, p in sorted(zip(order[: experts.top_k].tolist(), share, strict=True)):
                inner = limited(self.linear(x[t, None], weights.experts_up[e]), experts.mlp)
                inner = self.activate(inner, experts.mlp.activation, experts.mlp.gated)
                out[t] += p * self.linear(inner, weights.experts_down[e])[0]
        return out

    def cap(self, x: Tensor, limit: float) -> Tensor:
        return limit * torch.tanh(x / limit)

    def head(self, x: Tensor, weights: Weights, final: Norm, plan: ReferencePlan, taps: Taps) -> ForwardResult:
        rows = self.norm(x[torch.from_numpy(plan.batch.logit_rows).long()], weights.final_norm, final)
        logits = self.logits(rows, weights.head)
        top_k = best_first(logits, taps.top_k) if taps.top_k else None
        return ForwardResult(argmax(logits), top_k, logits if taps.logits else None)


def quantized_row(x: Tensor, weights: Quantized) -> Tensor:
    """x [ins] -> [outs], by the steps of ops/quantized.py and in float32, because that module defines every bit."""
    codes, v = weights.whole().long(), x.float().clone()
    if weights.columns is not None:
        v[weights.columns] = 0
    largest = torch.tensor(127.0)
    m = v.abs().max()
    s, r = m / largest, largest / m
    if not m.isfinite():
        return torch.full((len(codes),), math.nan, dtype=x.dtype)
    r = r if r.isfinite() else torch.tensor(0.0)
    if weights.grouped:
        total, lows = torch.zeros(len(codes)), weights.lows()
        for g, scale in enumerate(weights.scales().T.double()):
            own = slice(g * weights.group, (g + 1) * weights.group)
            power = max(power for power in POWERS if v[own].abs().max() * power <= m)
            code = torch.round(v[own] * power * r).long()
            total = ((codes[:, own] @ code) / power * scale + total).float()  # exact in float64, then rounded once
            if lows is not None:
                total = (code.sum() / power * lows[:, g].double() + total).float()
        y = total * s
    else:
        y = (codes @ torch.round(v * r).long()).float() * (s * weights.scale)
    if weights.columns is not None and weights.side is not None:
        for column, side in zip(weights.columns.tolist(), weights.side.T.float(), strict=True):
            y = y + x[column].float() * side
    if weights.bias is not None:
        y = y + weights.bias.float()
    return y.to(x.dtype)


def products(a: Tensor, b: Tensor) -> Tensor:
    """a [K, R, D] times b [K, n, D] -> [K, R, n]"""
    return a @ b.mT


def turned(x: Tensor, rotary: Rotary | None, by: Tensor | float) -> Tensor:
    """x [..., D], rotated by `by` positions."""
    if rotary is None:
        return x
    angles = by * torch.tensor(rotary.frequencies, dtype=torch.float64)
    a, b, rest = x.split([rotary.dim // 2, rotary.dim // 2, x.shape[-1] - rotary.dim], -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin(), rest], -1)


def _scales(x: Tensor, rotary: Rotary) -> Tensor:
    """The factor of each dimension."""
    return torch.tensor([*rotary.scales, *rotary.scales, *[1.0] * (x.shape[-1] - rotary.dim)], dtype=torch.float64)


class SequenceAttention:
    """Attention of one sequence in one layer: its slots, and the slots that each row sees."""

    def __init__(self, pool: ReferencePool, batch: Batch, s: int, index: int, layer: Attention) -> None:
        self.pool, self.batch, self.s, self.index, self.layer = pool, batch, s, index, layer
        self.view = batch.views[s] or View()
        self.heads, self.share = layer.kv_heads, layer.heads // layer.kv_heads
        self.start, self.tree_start, self.end = (int(x) for x in (batch.starts[s], batch.tree_starts[s], batch.starts[s + 1]))
        self.first_bits = int((batch.starts[1 : s + 1] - batch.tree_starts[:s]).sum())  # tree rows before this sequence
        self.tail, self.chain, self.again = batch.pages.tail[s], batch.pages.chain[s], batch.pages.slots[s]
        kind = batch.pages.kinds[s]
        self.lanes = [{Lanes.SHARED: 0, Lanes.PER_LAYER: index, Lanes.PER_HEAD: index * self.heads + h}[kind] for h in range(self.heads)]
        self.inside = [{Lanes.SHARED: index * self.heads + h, Lanes.PER_LAYER: h, Lanes.PER_HEAD: 0}[kind] for h in range(self.heads)]
        self.lengths = [int(batch.pages.lengths[s][lane]) for lane in self.lanes]
        rows = batch.pages.tentative(s, self.end - self.start)
        self.units = [self._units(head, -(-(self.lengths[head] + rows) // PAGE)) for head in range(self.heads)]
        self.slots = PAGE * max(map(len, self.units))

    def _units(self, head: int, count: int) -> list[tuple[FormatStore, int]]:
        """The unit of each page of the lane of a head, encoded pages first."""
        pages, lane, found = self.batch.pages, self.lanes[head], []
        encoded = pages.encoded[self.s][lane].tolist()
        for i, page in enumerate([*encoded, *pages.pages[self.s][lane].tolist()][:count]):
            name = self.view.encoded if i < len(encoded) else self.view.format
            space = Space(pages.kinds[self.s], name)
            found.append((self.pool.formats[name], self.pool.units(space, page)[self.inside[head]]))
        return found

    def slot(self, head: int, r: int) -> int:
        """The slot that row r of the sequence writes."""
        return self.lengths[head] + self.tail + r if self.again is None else int(self.again[r])

    def write(self, k: Tensor, v: Tensor) -> None:
        """Writes k and v [rows, K, D] and their side data."""
        for head in range(self.heads):
            for r in range(len(k)):
                slot = self.slot(head, r)
                stored, unit = self.units[head][slot // PAGE]
                stored.write(unit, slot % PAGE, k[r, head], v[r, head])
        for r in range(len(k)):  # side data are computed from keys in the form that attention reads
            places = [divmod(self.slot(head, r), PAGE) for head in range(self.heads)]
            at = [(*self.units[head][page], offset) for head, (page, offset) in enumerate(places)]
            keys = torch.stack([stored.keys_values(unit)[0][offset] for stored, unit, offset in at])
            for side in at[0][0].format.sides:
                for name, entry in side.fill(self.index, keys[None]).items():
                    for head, (stored, unit, offset) in enumerate(at):
                        stored.arrays[name][unit, offset] = entry[0, head]

    def hold(self) -> None:
        """Loads the keys and values [slots, D] of each head in the form that attention reads."""
        units = [[stored.keys_values(unit) for stored, unit in units] for units in self.units]
        self.held = [(torch.cat([k for k, _ in pairs]), torch.cat([v for _, v in pairs])) for pairs in units]

    def visible(self, r: int, head: int) -> dict[int, int]:
        """The slots that row r sees, with their positions."""
        length, mine = self.lengths[head], int(self.batch.positions[r])
        held, tail = self.batch.pages.positions[self.s], self.batch.tails[self.s].tolist()
        where = dict(enumerate(range(length) if held is None else held[self.lanes[head]].tolist()))
        if self.again is not None:  # a committed slot that runs again sees the slots up to itself
            where, seen = {slot: p for slot, p in where.items() if slot <= self.again[r - self.start]}, []
        elif r < self.tree_start:  # a chain row sees the chain up to itself
            seen = list(range(self.tail + r - self.start + 1))
        else:  # a node sees the whole chain and the nodes of its bits
            bits = self.batch.visible[self.first_bits + r - self.tree_start]
            nodes = [j for j in range(64 * len(bits)) if int(bits[j // 64]) >> (j % 64) & 1]
            seen = [*range(self.chain), *(self.chain + j for j in nodes)]
        where |= {length + i: tail[i] for i in seen}
        if self.layer.window is not None:
            where = {slot: p for slot, p in where.items() if mine - p < self.layer.window}
        if (window := self.view.window) is not None and window.holds(self.index, head):
            where = {slot: p for slot, p in where.items() if p < window.sinks or mine - p < window.recent}
        return where

    def attend(self, r: int, q: Tensor, plan: ReferencePlan, sink_logits: Tensor | None) -> Tensor:
        """The output of row r: q [H, D] -> [H, D]. Adds its statistics to the plan."""
        mine = int(self.batch.positions[r])
        seen = [self.visible(r, head) for head in range(self.heads)]
        read = self._read(r, q, seen)
        far, sinks, window = q, 0, self.view.window or Window(0, 0)
        if self.view.window is not None and window.turned:
            sinks = window.sinks
            far = turned(q, self.layer.rotary, -max(0, mine + 1 - window.size))
        out = torch.zeros_like(q)
        weights = torch.zeros(self.heads, self.share, self.slots, dtype=torch.float64)
        for head in range(self.heads):
            keys, values = self.held[head]
            for g in range(self.share):
                h, slots = head * self.share + g, read[head][g]
                turns = torch.tensor([seen[head][slot] < sinks and window.holds(self.index, head) for slot in slots])
                scores = torch.where(turns, keys[slots] @ far[h], keys[slots] @ q[h])
                scores = self._with_far(mine, q[h], keys[slots], [seen[head][slot] for slot in slots], scores) * self.layer.score_scale
                if self.layer.softcap is not None:
                    scores = self.layer.softcap * torch.tanh(scores / self.layer.softcap)
                scores = self._grouped(mine, scores + self.logs(head, slots), [seen[head][slot] for slot in slots])
                own = scores if sink_logits is None else torch.cat([scores, sink_logits[h, None]])
                weights[head, g, slots] = own.softmax(0)[: len(slots)]
                out[h] = weights[head, g, slots] @ values[slots]
        for i, watch in enumerate(plan.watches.get(self.s, ())):
            if mine >= watch.since:
                self._note(watch, r, weights, seen, WeightSums(*(part[i] for part in plan.seen[self.s])))
        return out

    def _with_far(self, mine: int, q: Tensor, keys: Tensor, where: list[int], scores: Tensor) -> Tensor:
        """scores [n] of q [D] at position `mine` and keys [n, D] at these positions, with those of far keys at their one distance."""
        if (far := self.view.far) is None:
            return scores
        positions = torch.tensor(where)
        plain_keys = turned(keys, self.layer.rotary, -positions[:, None])
        found = plain_keys @ turned(q, self.layer.rotary, far.distance - mine)
        return torch.where(mine - positions >= far.near, found, scores)

    def _grouped(self, mine: int, scores: Tensor, where: list[int]) -> Tensor:
        """scores [n] of a row at position `mine` and keys at these positions, changed for those that it attends as a group."""
        if (parallel := self.view.parallel) is None or mine < parallel.end:
            return scores
        inside = torch.tensor([any(first <= position < end for first, end in parallel.spans) for position in where])
        own = scores / parallel.temperature
        return torch.where(inside, own + (parallel.scale * parallel.temperature - 1) * own[inside].logsumexp(0), scores)

    def logs(self, head: int, slots: list[int]) -> Tensor:
        """The logarithms of the numbers of tokens that these slots stand for."""
        logs = self.batch.pages.logs[self.s]
        own = [] if logs is None else logs[self.lanes[head]].tolist()
        return torch.tensor([own[slot] if slot < len(own) else 0.0 for slot in slots], dtype=torch.float64)

    def _read(self, r: int, q: Tensor, seen: list[dict[int, int]]) -> list[list[list[int]]]:
        """The slots that row r reads, for each kv head and each of its query heads."""
        if self.view.read is None:
            return [[sorted(slots)] * self.share for slots in seen]
        mask = torch.zeros(self.heads, 1, self.slots, dtype=torch.bool)
        where = torch.zeros(self.heads, self.slots, dtype=torch.long)
        for head, slots in enumerate(seen):
            for slot, position in slots.items():
                mask[head, 0, slot], where[head, slot] = True, position
        names = list(self.view.read.arrays(self.layer.head_dim, q.dtype))
        padded = [units + units[:1] * (self.slots // PAGE - len(units)) for units in self.units]
        held = {name: torch.stack([torch.stack([s.arrays[name][u] for s, u in units]) for units in padded]) for name in names}
        rows, at = q.view(self.heads, self.share, 1, -1), torch.tensor([int(self.batch.positions[r])])
        picked = self.view.read.select(self.index, rows, held, mask, where, at, products)[:, :, 0].expand(-1, self.share, -1)
        return [[row.nonzero().flatten().tolist() for row in head] for head in picked]

    def _note(self, watch: Watch, r: int, weights: Tensor, seen: list[dict[int, int]], to: WeightSums) -> None:
        """Adds a statistic of weights [K, G, slots] of row r to chain [L, K, slots] or [R, L, K, slots], or to nodes [N, L, K, slots]."""
        for head, slots in enumerate(seen):
            counts = [watch.heads is None or watch.heads[self.index][head * self.share + g] for g in range(self.share)]
            for slot in slots:
                own = [float(weights[head, g, slot]) if counts[g] else 0.0 for g in range(self.share)]
                match watch.statistic:
                    case "mass":
                        value = sum(own) / self.share
                    case "low":
                        value = float(sum(own) / self.share < 1 / len(slots))
                    case "above":
                        value = float(max(own) > watch.threshold / len(slots))
                    case _:
                        raise Unsupported(unknown(watch.statistic))
                if r < self.tree_start:
                    chain = to.chain[r - int(self.batch.starts[self.s])] if watch.each else to.chain
                    chain[self.index, head, slot] += value
                else:
                    to.nodes[r - self.tree_start, self.index, head, slot] = value
