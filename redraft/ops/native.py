"""Compiled kernels on the CPU (ops/cpu): bit-exact, and a step of layers is one call.

Memory is laid out as PyTorch's backend lays it out, so that all which is done to pages between steps is shared. Sequences with
a view of their own (4-bit pages, windows, sparse reads) are attended by PyTorch, those of plain or int8 pages beside them
natively: what these get depends neither on their neighbours nor on whether their weights are watched.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from redraft.core.batch import Batch
from redraft.core.sequence import Lanes
from redraft.core.taps import NOTHING, Taps
from redraft.core.tree import I32
from redraft.core.view import View, Watch
from redraft.errors import Unsupported
from redraft.models.spec import Experts, LayerSpec, ModelSpec, Norm, Rotary
from redraft.ops import library
from redraft.ops.backend import Feature, LayerWeights, Linear, LinearWeights, NormWeights, Outputs, Seen, Weights, best_first
from redraft.ops.cpu import abi
from redraft.ops.format import INT8_VECTORS, Format
from redraft.ops.quantized import Quantized
from redraft.ops.torch_ops import Plan, TorchOps, lend_threads
from redraft.ops.torch_pool import Pool

KINDS = {torch.float32: abi.F32, torch.bfloat16: abi.BF16}
STATISTICS = "mass", "low"  # of attention weights; see Watch
LANES = {Lanes.SHARED: 0, Lanes.PER_LAYER: 1, Lanes.PER_HEAD: 2}
HUGE = 1 << 21  # bytes of a page


@dataclass(frozen=True, eq=False)
class Packed:
    """A linear layer in panels, `panels` u8 [panels, steps, 64, 4]; extra: the other arrays that `c` points to, by its fields."""

    c: abi.Linear
    panels: Tensor
    extra: dict[str, Tensor]

    @property
    def outs(self) -> int:
        return int(self.c.outs)

    @property
    def hollow(self) -> bool:
        return False

    def rows(self, keep: NDArray[Any]) -> Linear | Quantized:
        """Only these outputs, unpacked."""
        assert not self.c.gated, "rows of gates lie between others"
        own = torch.as_tensor(keep)
        bias = self.extra["bias"][own] if "bias" in self.extra else None
        if self.c.kind == abi.I4:
            codes = torch.stack([self.panels & 15, self.panels >> 4], 2).flatten(1, 2).to(torch.int8) - 8
        else:
            codes = self.panels
        dense = codes.transpose(1, 2).flatten(0, 1)[own].flatten(1)
        match self.c.kind:
            case abi.I8:
                return Quantized(dense.view(torch.int8)[:, : self.c.ins], self.extra["scale"][own], self.c.ins, torch.float32, 0, bias)
            case abi.I4:
                scale = self.extra["scales"].transpose(1, 2).flatten(0, 1)[own]
                return Quantized(dense[:, : self.c.ins], scale, self.c.ins, torch.float32, self.c.group, bias)
        dtype = torch.float32 if self.c.kind == abi.F32 else torch.bfloat16
        return Linear(dense.view(dtype)[:, : self.c.ins].contiguous(), None if bias is None else bias.to(dtype))


@dataclass
class Group:
    """Sequences that are attended natively, whose pages are of one format; rows: theirs in the batch, None where they are all."""

    format: str
    rows: Tensor | None
    step: abi.Step
    attention: int | None = None  # the kernels' plan
    kept: list[Any] = field(default_factory=list)  # what `step` points to
    seen: dict[int, Seen] = field(default_factory=dict)  # statistics, by place in the group


@dataclass
class NativePlan:
    """other: PyTorch's plan of the sequences with the rows `theirs`. A sequence may be attended by both, for what PyTorch does on the
    way (side data, and with them statistics); then the native result stands. seen: statistics of the other sequences by their place in
    the batch."""

    tokens: Tensor
    positions: Tensor
    logit_rows: Tensor
    turns: Mapping[int, int]  # id of a layer's Rotary -> its place in cos and sin
    cos: tuple[NDArray[np.float32], ...]
    sin: tuple[NDArray[np.float32], ...]
    groups: list[Group] = field(default_factory=list)
    theirs: Tensor | None = None
    other: Plan | None = None
    places: list[int] = field(default_factory=list)  # in the batch, of the sequences of `other`
    seen: dict[int, Seen] = field(default_factory=dict)


class NativeOps(TorchOps):
    """Unsupported, with the reason, where no kernel serves this dtype, device or machine."""

    name = "native"
    features: frozenset[Feature] = TorchOps.features | {Feature.RUN, Feature.BIT_EXACT}

    def __init__(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> None:
        serves, why = library.serves(dtype, device)
        loaded = library.load()
        if serves != self.name or loaded is None:
            raise Unsupported(f"backend 'native': {why}")
        super().__init__(dtype, device)
        self.library, self.c = loaded, abi.bind(loaded.c)
        self.kind = KINDS[dtype]
        self.inside = 0.0  # seconds in kernels so far
        self._coded: set[str] = set()  # formats whose codes the kernels read and write
        self._segments: dict[int, Any] = {}
        self._turns_of: dict[int, tuple[ModelSpec, list[Rotary], dict[int, int]]] = {}
        lend_threads()  # two pools of spinning threads cost a factor of 40

    @property
    def threads(self) -> int:
        return self.library.threads

    def use_threads(self, count: int) -> None:
        self.library.set_threads(count)

    def slab_bytes(self, spec: ModelSpec) -> int:
        serves, why = library.serves(self.dtype, self.device, spec)
        if serves != self.name:
            raise Unsupported(f"backend 'native': {why}")
        return super().slab_bytes(spec)

    def define(self, pool: Pool, fmt: Format) -> int:
        known = getattr(fmt.codec, "layout", "") == INT8_VECTORS and not fmt.sides
        (self._coded.add if known else self._coded.discard)(fmt.name)
        return super().define(pool, fmt)

    # ---- weights

    def pack(self, weights: LinearWeights, gated: bool = False) -> LinearWeights:
        if isinstance(weights, Quantized):
            return self._pack_codes(weights, gated)
        assert isinstance(weights, Linear)
        weight, bias = weights
        c = abi.Linear(outs=weight.shape[0], ins=weight.shape[1], kind=self.kind, gated=gated)
        panels = self._panels(c)
        weight = weight.to(self.dtype).contiguous()
        self._call("rd_pack", c, weight.data_ptr(), panels.data_ptr())
        return Packed(c, panels, self._floats(c, bias=bias))

    def _pack_codes(self, weights: Quantized, gated: bool) -> LinearWeights:
        if weights.columns is not None or weights.group % 16:
            return weights.halved()  # outlier columns and odd groups are PyTorch's
        outs, ins = weights.shape
        c = abi.Linear(outs=outs, ins=ins, kind=abi.I4 if weights.grouped else abi.I8, group=weights.group, gated=gated)
        codes, panels = weights.whole().contiguous(), self._panels(c)
        extra = self._floats(c, bias=weights.bias)
        if weights.grouped:
            scale, arranged = weights.scale.contiguous(), torch.empty(len(panels), weights.scale.shape[1], abi.PANEL, dtype=torch.float16)
            self._call("rd_pack_int4", c, codes.data_ptr(), scale.data_ptr(), panels.data_ptr(), arranged.data_ptr())
            c.scales, extra["scales"] = arranged.data_ptr(), arranged
        else:
            sums = torch.empty(len(panels) * abi.PANEL, dtype=torch.int32)
            self._call("rd_pack_int8", c, codes.data_ptr(), panels.data_ptr(), sums.data_ptr())
            c.sums, extra["sums"] = sums.data_ptr(), sums
            extra |= self._floats(c, scale=weights.scale)
        return Packed(c, panels, extra)

    def _panels(self, c: abi.Linear) -> Tensor:
        """Room for the panels, on huge pages where they fill some."""
        size = self.c.rd_panel_bytes(c)
        grain = HUGE if size >= HUGE else abi.LINE
        memory = torch.empty(size + grain, dtype=torch.uint8)
        start = -memory.data_ptr() % grain
        panels = memory[start : start + size]
        if size >= HUGE:
            self.c.rd_huge(panels.data_ptr(), size)
        c.panels = panels.data_ptr()
        return panels.view(-(-c.outs // abi.PANEL), -1, abi.PANEL, 4)

    def _floats(self, c: abi.Linear, **given: Tensor | None) -> dict[str, Tensor]:
        """Numbers of outputs in the panels' order."""
        made = {}
        for name, values in given.items():
            if values is not None:
                values = values.float().contiguous()
                made[name] = torch.empty(-(-c.outs // abi.PANEL) * abi.PANEL)
                self._call("rd_pack_floats", c, values.data_ptr(), made[name].data_ptr())
                setattr(c, name, made[name].data_ptr())
        return made

    # ---- the plan

    def plan(self, batch: Batch, spec: ModelSpec, taps: Taps = NOTHING) -> NativePlan:  # type: ignore[override]
        count = len(batch.tree_starts)
        tokens, positions, logit_rows = self._uploads([batch.tokens, batch.positions, batch.logit_rows])
        rotaries, places = self._rotaries(spec)
        cos, sin = zip(*(_angles(rotary, batch.positions) for rotary in rotaries)) if rotaries else ((), ())
        plan = NativePlan(tokens, positions, logit_rows, places, cos, sin)
        ours = [view is None or (view == View(view.format) and view.format in self._coded) for view in batch.views]
        theirs = [s for s in range(count) if not ours[s]]
        if theirs:
            other, rows = batch.only(theirs)
            watched = {i: taps.attention[s] for i, s in enumerate(theirs) if s in taps.attention}
            plan.other, plan.theirs, plan.places = super().plan(other, spec, Taps(attention=watched)), torch.from_numpy(rows).long(), theirs
        watched = {s: watches for s, watches in taps.attention.items() if watches and ours[s]}
        own: dict[str, list[int]] = {}
        for s, view in enumerate(batch.views):
            if view is None or not (view.block or view.window or view.read):  # all is seen, of pages that may hold side data
                own.setdefault("" if view is None else view.format, []).append(s)
        for name, members in own.items():
            some, mine = (batch, None) if len(members) == count else batch.only(members)
            watches = {i: watched[s] for i, s in enumerate(members) if s in watched}
            group = self._group(name, some, None if mine is None else torch.from_numpy(mine).long(), spec, plan, watches)
            plan.groups.append(group)
            plan.seen |= {members[i]: seen for i, seen in group.seen.items()}
        return plan

    def _rotaries(self, spec: ModelSpec) -> tuple[list[Rotary], dict[int, int]]:
        """The different rotaries of a model, and the place of each layer's among them by its id: to hash one takes its time."""
        if id(spec) not in self._turns_of:
            every = [layer.rotary for layer in spec.layers if layer.rotary is not None]
            different = list(dict.fromkeys(every))
            self._turns_of[id(spec)] = spec, different, {id(rotary): different.index(rotary) for rotary in every}
        return self._turns_of[id(spec)][1:]

    def _group(
        self, name: str, batch: Batch, rows: Tensor | None, spec: ModelSpec, plan: NativePlan, watches: Mapping[int, tuple[Watch, ...]]
    ) -> Group:
        view, count = batch.pages, len(batch.tree_starts)
        seqs = np.zeros(count, abi.SEQ)
        nodes = np.concatenate([[0], np.cumsum(batch.starts[1:] - batch.tree_starts)])
        ancestors, at = np.ascontiguousarray(batch.ancestors), np.ascontiguousarray(batch.positions)
        words = ancestors.shape[1]
        kept: list[Any] = [seqs, ancestors, at]
        for s in range(count):
            a, t, z = int(batch.starts[s]), int(batch.tree_starts[s]), int(batch.starts[s + 1])
            pages, lengths = (np.ascontiguousarray(x, np.int32) for x in (view.pages[s], view.lengths[s]))
            held, pointers = view.positions[s], 0
            kept += [pages, lengths]
            if held is not None:
                lanes = [np.ascontiguousarray(lane, np.int32) for lane in held]
                lines = np.array([lane.ctypes.data for lane in lanes], np.int64)
                kept += [lanes, lines]
                pointers = lines.ctypes.data
            seqs[s] = (
                a, z - a, t - a, view.tail[s], view.chain[s], LANES[view.kinds[s]], pages.shape[1], words,
                pages.ctypes.data, lengths.ctypes.data, pointers, ancestors.ctypes.data + int(nodes[s]) * words * 8, at.ctypes.data + 4 * a,
            )  # fmt: skip
        turns = [np.array([one.ctypes.data for one in made], np.int64) for made in (plan.cos, plan.sin)]
        kept += [*turns, plan.cos, plan.sin]
        first = spec.layers[0]
        kind = abi.I8 if name in self._coded else self.kind
        pool = abi.Pool(layers=len(spec.layers), kv_heads=first.kv_heads, size=first.head_dim, kind=kind)
        step = abi.Step(len(batch.tokens), count, seqs.ctypes.data, pool, turns[0].ctypes.data, turns[1].ctypes.data)
        group = Group(name, rows, step, None, kept)
        if watches:
            self._watch(group, batch, spec, watches)
        if len(batch.tokens):
            group.attention = self.c.rd_plan(step, first.heads)
            if not group.attention:
                raise MemoryError("attention's plan")
            weakref.finalize(group, self.c.rd_plan_free, group.attention)
        return group

    def _watch(self, group: Group, batch: Batch, spec: ModelSpec, watches: Mapping[int, tuple[Watch, ...]]) -> None:
        """Room for statistics, by place in the group."""
        lines = []
        for s, wanted in watches.items():
            a, t, z = int(batch.starts[s]), int(batch.tree_starts[s]), int(batch.starts[s + 1])
            slots = int(batch.pages.lengths[s].max()) + batch.pages.tail[s] + z - a
            shape = len(spec.layers), spec.kv_heads, slots
            seen = group.seen[s] = Seen(torch.zeros(len(wanted), *shape), torch.zeros(len(wanted), z - t, *shape))
            for i, watch in enumerate(wanted):
                if watch.statistic not in STATISTICS:
                    raise Unsupported(f"statistic {watch.statistic!r} of attention; known: {', '.join(STATISTICS)}")
                low = STATISTICS.index(watch.statistic)
                lines.append((seen.chain[i].data_ptr(), seen.nodes[i].data_ptr(), slots, s, watch.since, low, 0))
        watched = np.array(lines, abi.WATCHED)
        group.kept.append(watched)
        group.step.watched, group.step.watches = watched.ctypes.data, len(watched)

    # ---- the operations

    def embed(self, weights: Weights, plan: NativePlan) -> Tensor:  # type: ignore[override]
        if not isinstance(weights.embed, Packed):
            return super().embed(weights, plan)  # type: ignore[arg-type]
        c = weights.embed.c
        x = torch.empty(len(plan.tokens), c.ins, dtype=self.dtype)
        self.c.rd_rows(c, plan.tokens.data_ptr(), len(x), x.data_ptr())
        return x if weights.positions is None else x + weights.positions.index_select(0, plan.positions)

    def norm(self, x: Tensor, weights: NormWeights, norm: Norm) -> Tensor:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        if not x.numel():
            return out
        flat = x.contiguous().view(-1, x.shape[-1])
        bias = None if weights.bias is None else weights.bias.data_ptr()
        to = self._rows(out.view(-1, x.shape[-1]))
        self._call("rd_norm", self._rows(flat), to, weights.weight.data_ptr(), bias, norm.eps, int(norm.kind == "rms"))
        return out

    def linear(self, x: Tensor, weights: LinearWeights) -> Tensor:
        if not isinstance(weights, Packed):
            return super().linear(x, weights)
        x, out = x.contiguous(), x.new_empty(len(x), weights.c.outs)  # Rows hold an address only: x must live until the call is over
        if len(x):
            self._call("rd_linear", weights.c, self._rows(x), self._rows(out), abi.ACTIVATIONS["none"], 0)
        return out

    def activate(self, x: Tensor, activation: str, gated: bool) -> Tensor:
        if activation not in abi.ACTIVATIONS:
            raise Unsupported(f"activation {activation!r}")
        x, out = x.contiguous(), x.new_empty(len(x), x.shape[1] // 2 if gated else x.shape[1])
        if len(x):
            self._call("rd_activate", self._rows(x), self._rows(out), abi.ACTIVATIONS[activation], int(gated))
        return out

    def rope(self, x: Tensor, layer: LayerSpec, plan: NativePlan) -> Tensor:  # type: ignore[override]
        if layer.rotary is None:
            return x
        out = x.contiguous() if not x.is_contiguous() else x.clone()
        if len(x):
            place = plan.turns[id(layer.rotary)]
            rows = self._rows(out.view(len(x), -1))
            self._call("rd_rope", rows, x.shape[1], x.shape[2], plan.cos[place].ctypes.data, plan.sin[place].ctypes.data)
        return out

    def attend(self, index: int, layer: LayerSpec, q: Tensor, k: Tensor, v: Tensor, pool: Pool, plan: NativePlan) -> Tensor:  # type: ignore[override]
        if plan.other is None and len(plan.groups) == 1:
            return self._attend_group(index, layer, q, k, v, pool, plan.groups[0])
        out = q.new_empty(len(q), layer.heads * layer.head_dim)
        if plan.other is not None and plan.theirs is not None:
            at = plan.theirs
            out[at] = super().attend(index, layer, q[at], k[at], v[at], pool, plan.other)
        for group in plan.groups:
            if group.rows is None:
                out = self._attend_group(index, layer, q, k, v, pool, group) if self._reads(pool, group) else out
            elif len(at := group.rows) and self._reads(pool, group):
                out[at] = self._attend_group(index, layer, q[at], k[at], v[at], pool, group)
        return out

    def _reads(self, pool: Pool, group: Group) -> bool:
        return pool.shelves[group.format].exact or group.format in self._coded

    def _attend_group(self, index: int, layer: LayerSpec, q: Tensor, k: Tensor, v: Tensor, pool: Pool, group: Group) -> Tensor:
        out = q.new_empty(len(q), layer.heads * layer.head_dim)
        if not len(q):
            return out
        q, k, v = (x.contiguous().view(len(x), -1) for x in (q, k, v))
        self._place(group, pool)
        rows = (self._rows(x) for x in (q, k, v, out))
        self._call("rd_attend", group.step, group.attention, index, layer.heads, layer.window or 0, *rows)
        return out

    def _place(self, group: Group, pool: Pool) -> None:
        """Where the units of the group's format lie."""
        shelf, to = pool.shelves[group.format], group.step.pool
        offsets = shelf.format.offsets()
        to.data = pool.data.data_ptr() + offsets["keys"]
        to.values, to.key_scales, to.value_scales = (
            offsets.get(name, 0) - offsets["keys"] for name in ("values", "key_scales", "value_scales")
        )
        to.slab_bytes, to.unit_bytes, to.per_slab = pool.data[0].nbytes, shelf.format.bytes, shelf.per_slab

    def watched(self, plan: NativePlan) -> Mapping[int, Seen]:  # type: ignore[override]
        found = {} if plan.other is None else {plan.places[i]: seen for i, seen in super().watched(plan.other).items()}
        return found | plan.seen

    def run(self, first: int, last: int, h: Tensor, spec: ModelSpec, weights: Weights, pool: Pool, plan: NativePlan) -> Tensor | None:
        """Layers first..last (exclusive) in one call, None where one of them or a sequence needs them operation by operation."""
        if plan.other is not None or len(plan.groups) != 1 or not len(h):
            return None
        segment = self._segment(spec, weights, plan)
        if segment is None:
            return None
        out = h.clone(memory_format=torch.contiguous_format)
        (group,) = plan.groups
        self._place(group, pool)
        self._call("rd_run", segment, first, last, group.step, group.attention, self._rows(out))
        return out

    def _segment(self, spec: ModelSpec, weights: Weights, plan: NativePlan) -> Any:
        """All layers as the kernels read them, made once for a model; None where one is not all packed."""
        if id(weights) not in self._segments:
            layers = [self._layer(layer, own, plan) for layer, own in zip(spec.layers, weights.layers, strict=True)]
            found = [layer for layer in layers if layer is not None]
            self._segments[id(weights)] = (abi.Layer * len(layers))(*found) if len(found) == len(layers) else None
            weakref.finalize(weights, self._segments.pop, id(weights), None)
        return self._segments[id(weights)]

    def _layer(self, layer: LayerSpec, own: LayerWeights, plan: NativePlan) -> abi.Layer | None:
        parts = [part.c for part in (own.qkv, own.out, own.up, own.down) if isinstance(part, Packed)]
        if isinstance(layer.mlp, Experts) or len(parts) < 4 or bool(parts[2].gated) != layer.mlp.gated:
            return None

        def at(x: Tensor | None) -> int | None:
            return None if x is None else x.data_ptr()

        norms = own.attn_norm.weight, own.attn_norm.bias, own.mlp_norm.weight, own.mlp_norm.bias
        qk = (own.q_norm.weight, own.k_norm.weight) if own.q_norm and own.k_norm else (None, None)
        return abi.Layer(
            *parts, *map(at, (*norms, *qk)),
            layer.norm.eps, layer.qk_norm.eps if layer.qk_norm else 0.0, int(layer.norm.kind == "rms"), layer.heads, layer.window or 0,
            -1 if layer.rotary is None else plan.turns[id(layer.rotary)], abi.ACTIVATIONS[layer.mlp.activation],
        )  # fmt: skip

    def head(self, x: Tensor, weights: Weights, final: Norm, plan: NativePlan, taps: Taps) -> Outputs:  # type: ignore[override]
        rows = x if plan.logit_rows.numel() == x.shape[0] else x.index_select(0, plan.logit_rows)
        rows = self.norm(rows, weights.final_norm, final)
        head = weights.head
        if not isinstance(head, Packed) or taps.logits:
            logits = self.linear(rows, head)
            top_k = best_first(logits, taps.top_k) if taps.top_k else None
            return Outputs(logits.argmax(-1).int().numpy(), top_k, logits if taps.logits else None)
        best = np.zeros((len(rows), min(max(1, taps.top_k), head.outs)), abi.BEST)
        if len(rows):
            self._call("rd_best", head.c, self._rows(rows), self.kind, best.shape[1], best.ctypes.data)
        found: I32 = np.ascontiguousarray(best["index"])
        return Outputs(found[:, 0].copy(), found if taps.top_k else None)

    def _rows(self, x: Tensor) -> abi.Rows:
        return abi.Rows.of(x, self.kind)

    def _call(self, name: str, *arguments: Any) -> None:
        began = perf_counter()
        failed = getattr(self.c, name)(*arguments)
        self.inside += perf_counter() - began
        if failed:
            raise MemoryError(f"{name}: out of memory") if failed == 1 else RuntimeError(f"{name}: refused its arguments")


def _angles(rotary: Rotary, positions: I32) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """cos and sin [T, dim / 2], times the rotary's scale; angles in float64."""
    angles = positions.astype(np.float64)[:, None] * np.asarray(rotary.frequencies)
    return (np.cos(angles) * rotary.scale).astype(np.float32), (np.sin(angles) * rotary.scale).astype(np.float32)
