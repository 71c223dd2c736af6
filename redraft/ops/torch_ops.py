"""PyTorch on CPU or CUDA. All index and mask tensors are made once per step; a layer is then a few large operations.

Attention gathers the pages of several sequences into a padded [S, K, slots, D] tensor and calls scaled_dot_product_attention.
Sequences with many rows (prompt chunks) form their own group, so padding never costs more than it saves. A sequence with other lanes,
page formats or views than the plain ones, or with watched attention weights, is attended separately ("alone").
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from redraft.core.batch import Batch
from redraft.core.noise import draw
from redraft.core.sequence import Lanes, Space
from redraft.core.spec import Attention, Experts, ModelSpec, Norm, Rotary
from redraft.core.taps import NO_TAPS, Taps
from redraft.core.tree import F64, I32, I64
from redraft.core.view import Far, Watch
from redraft.errors import Unsupported
from redraft.ops import places
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
from redraft.ops.format import PAGE, Arrays, Format, PageCodec, plain
from redraft.ops.places import LoneSequence, Writer, tree_bits, tree_rows
from redraft.ops.quantized import Quantized, product
from redraft.ops.torch_arrays import as_tensor, as_tensors, dtype_of
from redraft.ops.torch_pool import FormatStore, TorchPool

PACKED_FOR = 16  # rows; this layout works for any number of rows, a layout for a single row works for that only
MAX_GROUPED_ROWS = 48  # a sequence with more rows forms a group of its own


@dataclass
class TorchGroup:
    """Sequences that are attended together. count: S; width: R; pages: i64[2 S K n], rows of the pool's pages; masks: window ->
    additive mask [S, 1, G R, slots]; rows: i64[S, R], padded row numbers, None if the rows of the group are all rows in order; kept:
    the places in [S, R] that are not padding; real: their row numbers."""

    count: int
    width: int
    slots: int
    pages: Tensor
    masks: dict[int | None, Tensor]
    rows: Tensor | None = None
    kept: Tensor | None = None
    real: Tensor | None = None


PageSource = tuple[PageCodec, Arrays, int]  # the codec, the arrays [K, units, ...] and the number of units of pages of one format


@dataclass
class TorchPlan:
    """A step of T rows and K kv heads. tokens, positions: i64[T]; logit_rows: i64[R], the rows with logits; writes: i64[T * K], the slot
    of the pool for the key of (row, head) in layer 0, its value is 32 slots later; groups: sequences attended together; plain: the
    rows of `writes`, None for all; writers: where the other rows are written; lone: sequences attended alone; turns: cos and sin of
    each rotary, for all rows."""

    tokens: Tensor
    positions: Tensor
    logit_rows: Tensor
    writes: Tensor
    groups: list[TorchGroup]
    kv_heads: int
    plain: Tensor | None
    writers: list[Writer]
    lone: list[LoneSequence]
    turns: dict[Rotary, tuple[Tensor, Tensor]] = field(default_factory=dict)


class TorchOps:
    """The PyTorch backend; see TorchPool for the memory layout."""

    name = "torch"
    features: frozenset[Feature] = frozenset({Feature.PER_LAYER, Feature.PER_HEAD})
    mixers: frozenset[type] = frozenset({Attention})

    def __init__(self, dtype: Any = torch.float32, device: torch.device | str = "cpu") -> None:
        """dtype: PyTorch's or numpy's."""
        self.dtype, self.device = dtype_of(dtype), torch.device(device)
        take_threads_back()

    def mode(self) -> torch.inference_mode:
        return torch.inference_mode()

    def block_bytes(self, spec: ModelSpec) -> int:
        return len(spec.attention) * spec.kv_heads * 2 * PAGE * spec.head_dim * self.dtype.itemsize

    def allocate(self, spec: ModelSpec, blocks: int, room: Room | None = None) -> TorchPool:
        if room is not None:
            raise Unsupported("backend 'torch' has its pool in memory of its own")
        # not zeroed, because each page is zeroed when it is allocated, and untouched memory costs nothing
        shape = blocks, len(spec.attention), spec.kv_heads, 2, PAGE, spec.head_dim
        pool = TorchPool(torch.empty(shape, dtype=self.dtype, device=self.device), spec)
        self.define(pool, Format("", plain(self.dtype, spec.head_dim)))
        return pool

    def define(self, pool: TorchPool, fmt: Format) -> int:
        pool.formats[fmt.name] = FormatStore(pool.data, fmt)
        return pool.formats[fmt.name].per_block

    def zero(self, pool: TorchPool, pages: list[tuple[Space, int]]) -> None:
        of: dict[Space, list[int]] = {}
        for space, page in pages:
            if space == Space():
                pool.data[page].zero_()
            else:
                of.setdefault(space, []).append(page)
        for space, some in of.items():
            stored = pool.formats[space.format]
            stored.bytes[stored.at(self._upload(pool.units(space, np.array(some))))] = 0

    def move(self, pool: TorchPool, space: Space, src: I32, dst: I32, delta: int = 0) -> None:
        if space == Space():
            places = self._upload(np.stack([src // PAGE, src % PAGE, dst // PAGE, dst % PAGE]))
            got = pool.data[places[0], :, :, :, places[1]]  # [moves, L, K, 2, D]: all are read before any is written
            if delta:
                self._turn_keys(got, pool.spec, delta)
            pool.data[places[2], :, :, :, places[3]] = got
            return
        assert not delta, f"{space}: keys are rotated in plain shared pages only"
        stored = pool.formats[space.format]
        (here, there), (of, to) = (
            self._upload(np.stack([pool.units(space, src // PAGE), pool.units(space, dst // PAGE)])),
            self._upload(np.stack([src % PAGE, dst % PAGE]))[..., None],
        )
        for name, array in stored.arrays.items():
            if not stored.format.arrays[name].whole:
                array[*stored.at(there), to] = array[*stored.at(here), of]

    def _turn_keys(self, got: Tensor, spec: ModelSpec, delta: int) -> None:
        """Rotates the keys of got [moves, L, K, 2, D] by `delta` positions."""
        by, wide = torch.tensor([delta], device=self.device), self._wide()
        for rotary in {layer.rotary for layer in spec.attention} - {None}:
            assert rotary is not None
            layers = [i for i, layer in enumerate(spec.attention) if layer.rotary == rotary]
            got[:, layers, :, 0] = _turn(got[:, layers, :, 0].to(wide), *self._turns(rotary, by, [1.0] * len(rotary.frequencies), wide)).to(
                self.dtype
            )

    def read(self, pool: TorchPool, space: Space, pages: I32) -> Arrays:
        stored = pool.formats[space.format]
        return stored.take(stored.arrays, self._upload(pool.units(space, pages)))

    contents = read

    def write(self, pool: TorchPool, space: Space, pages: I32, arrays: Arrays) -> None:
        pool.formats[space.format].put(arrays, self._upload(pool.units(space, pages)))

    def encode(self, pool: TorchPool, source: Space, target: Space, src: I32, dst: I32, lanes: I32) -> None:
        old, new = pool.formats[source.format], pool.formats[target.format]
        here, there = self._upload(pool.units(source, src)).flatten(), self._upload(pool.units(target, dst)).flatten()
        new.put(new.codec.pack(*old.codec.decode(old.take(old.codes, here)), lanes), there)
        new.put(old.take([name for name in new.arrays if name not in new.codes and name in old.arrays], here), there)

    def summarize(self, pool: TorchPool, space: Space, pages: I32, read: Select) -> None:
        stored, units = pool.formats[space.format], self._upload(pool.units(space, pages)).flatten()
        stored.put(read.summarize(stored.codec.decode(stored.take(stored.codes, units))[0]), units)

    def _wide(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    def _upload(self, array: NDArray[np.generic]) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array, np.int64))
        return tensor if self.device.type == "cpu" else tensor.pin_memory().to(self.device, non_blocking=True)

    # ---- the plan: integers of one step, uploaded in one buffer

    def plan(self, batch: Batch, spec: ModelSpec, taps: Taps = NO_TAPS) -> TorchPlan:
        layers, heads = len(spec.attention), spec.kv_heads
        rows = np.diff(batch.starts).tolist()
        lone = [
            s
            for s, kind in enumerate(batch.pages.kinds)
            if kind is not Lanes.SHARED
            or any(given is not None for given in (batch.views[s], batch.pages.logs[s], batch.pages.slots[s]))
            or taps.attention.get(s)
        ]
        together = [s for s in range(len(rows)) if s not in lone]
        small = [s for s in together if rows[s] <= MAX_GROUPED_ROWS]
        members = ([small] if small else []) + [[s] for s in together if rows[s] > MAX_GROUPED_ROWS]
        windows = {layer.window for layer in spec.attention}
        parts: list[NDArray[np.generic]] = [batch.tokens, batch.positions, batch.logit_rows, self._writes(batch, together, layers, heads)]
        shapes: list[tuple[int, int, int]] = []
        for group in members:
            pages, slots = self._pages(batch, group, layers, heads)
            width = max(rows[s] for s in group)
            shapes.append((len(group), width, slots))
            parts.append(pages)
            parts += self._padding(batch, group, rows, width)
        if lone:
            parts.append(np.flatnonzero(np.repeat([s in together for s in range(len(rows))], rows)))
        up = iter(self._upload(np.concatenate([p.ravel() for p in parts])).split([p.size for p in parts]))
        tokens, positions, logit_rows, writes = next(up), next(up), next(up), next(up)
        groups = []
        deepest = np.maximum.reduceat(batch.positions, batch.starts[:-1])  # the last row of a tree need not be the deepest
        visible_from = tree_rows(batch)
        share = spec.attention[0].heads // heads
        for group, (count, width, slots) in zip(members, shapes, strict=True):
            masks: dict[int | None, Tensor] = {}
            for window in windows:
                # a window that hides nothing from any row counts as None, so most steps need one mask only
                reach = None if window is None or int(deepest[group].max()) < window else window
                if reach not in masks:
                    masks[reach] = self._mask(batch, group, width, slots, reach, visible_from, share)
                masks[window] = masks[reach]
            pages_t, rows_t, kept, real = next(up), next(up), next(up), next(up)
            padded = (rows_t.view(count, width), kept, real) if rows_t.numel() else (None, None, None)
            groups.append(TorchGroup(count, width, slots, pages_t, masks, *padded))
        writers = self._writers(batch, lone, layers, heads)
        alone = [self._alone(batch, s, spec, taps.attention.get(s, ()), visible_from[s]) for s in lone]
        return TorchPlan(tokens, positions, logit_rows, writes, groups, heads, next(up) if lone else None, writers, alone)

    def _uploads(self, arrays: Seq[NDArray[np.generic]]) -> list[Tensor]:
        """Uploads all arrays in one buffer."""
        flat = self._upload(np.concatenate([array.ravel() for array in arrays]))
        return [part.view(array.shape) for part, array in zip(flat.split([a.size for a in arrays]), arrays, strict=True)]

    def _writes(self, batch: Batch, together: list[int], layers: int, heads: int) -> NDArray[np.int64]:
        view, slots, starts = batch.pages, [], batch.starts.tolist()
        for s in together:
            a, z = starts[s], starts[s + 1]
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
            table[i, n:] = view.pages[s][0, 0]  # padding must point at zeroed memory of the sequence
        unit = np.arange(heads)[None, None, :, None] * 2 + np.arange(2)[:, None, None, None]
        return table[None, :, None, :] * (layers * heads * 2) + unit, max(held) * PAGE

    def _padding(self, batch: Batch, group: list[int], rows: list[int], width: int) -> list[NDArray[np.int64]]:
        """Padded row numbers, places that are not padding, and their rows; empty if the group is all rows in order without padding."""
        if len(group) == len(rows) and all(rows[s] == width for s in group):
            return [np.zeros(0, np.int64)] * 3
        table = np.zeros((len(group), width), np.int64)
        real = np.zeros((len(group), width), bool)
        for i, s in enumerate(group):
            table[i, : rows[s]] = np.arange(batch.starts[s], batch.starts[s + 1])
            real[i, : rows[s]] = True
        return [table, np.flatnonzero(real), table[real]]

    def _mask(
        self, batch: Batch, group: list[int], width: int, slots: int, window: int | None, visible_from: list[int], share: int
    ) -> Tensor:
        view = batch.pages
        see = np.zeros((len(group), width, slots), bool)
        see[:, :, 0] = True  # padding rows see one slot, because an empty softmax is NaN
        for i, s in enumerate(group):
            a, t, z = int(batch.starts[s]), int(batch.tree_starts[s]), int(batch.starts[s + 1])
            length, chain = int(view.lengths[s][0]), view.chain[s]
            mine, rows = see[i], t - a
            mine[: z - a, :length] = True
            mine[rows : z - a, length : length + chain] = True
            mine[:rows, length : length + rows] = np.tri(rows, dtype=bool)
            if z > t:
                nodes = view.tail[s] + rows + z - t - chain
                mine[rows : z - a, length + chain : length + chain + nodes] = tree_bits(batch, visible_from[s], z - t, nodes)
            if window is not None:
                held, tail = view.positions[s], batch.tails[s]
                where = np.full(slots, np.iinfo(np.int64).max // 2)
                where[:length] = np.arange(length) if held is None else held[0]
                where[length : length + len(tail)] = tail
                mine[: z - a] &= batch.positions[a:z, None] - where < window
        seen = torch.from_numpy(see).to(self.device)
        mask = torch.zeros(see.shape, dtype=self.dtype, device=self.device).masked_fill_(~seen, float("-inf"))
        return mask[:, None].expand(-1, share, -1, -1).reshape(len(group), 1, share * width, slots)

    # ---- the plan of sequences that are attended alone

    def _writers(self, batch: Batch, lone: list[int], layers: int, heads: int) -> list[Writer]:
        found = places.writers(batch, lone, layers, heads)
        return [Writer(one.format, *self._uploads([one.rows, one.units, one.offsets])) for one in found]

    def _alone(self, batch: Batch, s: int, spec: ModelSpec, watches: tuple[Watch, ...], first: int) -> LoneSequence:
        it = places.alone(batch, s, spec, watches, first)
        some = [it.encoded, it.units, it.lengths, it.at, *([] if it.where is None else [it.where])]
        encoded, units, lengths, at, *where = self._uploads(some)
        seen = WeightSums(*(torch.zeros(part.shape, dtype=self._wide(), device=self.device) for part in it.seen))
        return replace(
            it, encoded=encoded, units=units, lengths=lengths, at=at, where=where[0] if where else None,
            tail=torch.from_numpy(it.tail).to(self.device), seen=seen, last=None if it.last is None else self._upload(it.last),
            logs=None if it.logs is None else torch.from_numpy(it.logs.copy()).to(self.device),
        )  # fmt: skip

    # ---- the operations

    def embed(self, weights: Weights, plan: TorchPlan) -> Tensor:
        assert isinstance(weights.embed, Tensor), "an embedding in the form of another backend"
        x = weights.embed.index_select(0, plan.tokens)
        return x if weights.positions is None else x + weights.positions.index_select(0, plan.positions)

    def rows(self, table: Any, ids: I32) -> Tensor:
        assert isinstance(table, Tensor), "an embedding in the form of another backend"
        return table[torch.from_numpy(ids).long().to(self.device)]

    def norm(self, x: Tensor, weights: NormWeights, norm: Norm) -> Tensor:
        wide = x.to(weights.weight.dtype)  # gains above one may be wider than x
        if norm.kind == "layer":
            return F.layer_norm(wide, x.shape[-1:], weights.weight, weights.bias, norm.eps).to(x.dtype)
        return F.rms_norm(wide, x.shape[-1:], weights.weight, norm.eps).to(x.dtype)

    @property
    def threads(self) -> int:
        return torch.get_num_threads()

    def use_threads(self, count: int) -> None:
        torch.set_num_threads(count)

    def draw(self, key: int, ids: I64, values: F64) -> int:
        return draw(key, ids, values)

    def place(self, array: Numbers) -> Tensor:
        return as_tensor(array, self.device)

    def pack(self, weights: LinearWeights, gated: bool = False) -> LinearWeights:
        """On the CPU, the blocked layout of oneDNN. 17 rows then cost 1.7 times as much as one row, instead of 2.3 (docs/log.md)."""
        weights = as_tensors(weights, self.device)
        if isinstance(weights, Quantized):
            return weights.halved()
        assert isinstance(weights, Linear)
        if self.device.type != "cpu" or not _onednn_packs(self.dtype):
            return weights
        return Linear(torch.ops.mkldnn._reorder_linear_weight(weights.weight, PACKED_FOR), weights.bias)

    def linear(self, x: Tensor, weights: LinearWeights) -> Tensor:
        if isinstance(weights, Adapted):
            return weights.product(x, self)
        if isinstance(weights, Quantized):
            return product(x, weights)
        assert isinstance(weights, Linear), "a weight in the form of another backend"
        if not weights.weight.is_mkldnn:
            return F.linear(x, weights.weight, weights.bias)
        if not len(x):
            return x.new_empty(0, weights.weight.shape[0])
        return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, weights.weight, weights.bias, "none", [], ""))

    def logits(self, x: Tensor, head: LinearWeights) -> Tensor:
        return self.linear(x, head)

    def add_low_rank(self, y: Tensor, x: Tensor, rows: I64, term: LowRank) -> None:
        wide = torch.promote_types(y.dtype, torch.float32)
        added = x[rows].to(wide) @ term.a.to(wide).T @ term.b.to(wide)
        part = y[:, term.first : term.first + term.b.shape[1]]
        part[rows] = (part[rows].to(wide) + added).to(y.dtype)

    def activate(self, x: Tensor, activation: str, gated: bool) -> Tensor:
        gate = x.narrow(-1, 0, x.shape[-1] // 2) if gated else x
        match activation:
            case "silu":
                out = F.silu(gate)
            case "gelu":
                out = F.gelu(gate)
            case "gelu_tanh":
                out = F.gelu(gate, approximate="tanh")
            case "quick_gelu":
                out = gate * torch.sigmoid(1.702 * gate)
            case "relu":
                out = F.relu(gate)
            case "sigmoid":
                out = gate.sigmoid()
            case _:
                raise Unsupported(f"activation {activation!r}")
        return out.mul_(x.narrow(-1, gate.shape[-1], gate.shape[-1])) if gated else out

    def rope(self, x: Tensor, layer: Attention, plan: TorchPlan) -> Tensor:
        rotary = layer.rotary
        if rotary is None:
            return x
        if rotary not in plan.turns:
            cos, sin = self._turns(rotary, plan.positions, rotary.scales, self.dtype)
            plan.turns[rotary] = cos[:, None], sin[:, None]
        return _turn(x, *plan.turns[rotary])

    def _turns(self, rotary: Rotary, positions: Tensor, scales: Seq[float], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and signed sin [T, dim] such that x * cos + roll(x, dim / 2) * sin rotates x, times the scale of each pair; in float64."""
        frequencies, factors = torch.tensor([rotary.frequencies, tuple(scales)], dtype=torch.float64, device=self.device)
        angles = positions.double()[:, None] * frequencies
        cos, sin = angles.cos() * factors, angles.sin() * factors
        return torch.cat([cos, cos], -1).to(dtype), torch.cat([-sin, sin], -1).to(dtype)

    def attend(
        self,
        index: int,
        layer: Attention,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pool: TorchPool,
        plan: TorchPlan,
        sink_logits: Tensor | None = None,
    ) -> Tensor:
        heads, size = layer.kv_heads, layer.head_dim
        share = layer.heads // heads
        for writer in plan.writers:
            self._write(index, k[writer.rows], v[writer.rows], pool.formats[writer.format], writer)
        if plan.plain is not None:
            k, v = k[plan.plain], v[plan.plain]
        slots = pool.data.view(-1, size)
        writes = plan.writes + index * heads * 2 * PAGE
        slots.index_copy_(0, writes, k.reshape(-1, size))
        slots.index_copy_(0, writes + PAGE, v.reshape(-1, size))
        pages = pool.data.view(-1, PAGE * size)
        out = None
        for group in plan.groups:
            held = pages.index_select(0, group.pages + index * heads * 2).view(2, group.count, heads, group.slots, size)
            rows = q if group.rows is None else q[group.rows]
            rows = rows.view(group.count, group.width, heads, share, size).permute(0, 2, 3, 1, 4)
            rows = rows.reshape(group.count, heads, share * group.width, size)
            seen = _attended(rows, held[0], held[1], group.masks[layer.window], layer, sink_logits)
            seen = seen.view(group.count, heads, share, group.width, size).permute(0, 3, 1, 2, 4)
            seen = seen.reshape(group.count * group.width, heads * share * size)
            if group.kept is None or group.real is None:
                return seen
            if out is None:
                out = torch.empty(q.shape[0], heads * share * size, dtype=q.dtype, device=q.device)
            out[group.real] = seen[group.kept]
        if out is None and plan.lone:
            out = torch.empty(q.shape[0], heads * share * size, dtype=q.dtype, device=q.device)
        assert out is not None, "an empty batch has no attention"
        for it in plan.lone:
            rows = q[it.rows].view(-1, heads, share, size).permute(1, 2, 0, 3)
            out[it.rows] = self._attend_alone(index, layer, rows, pool, it, sink_logits).permute(2, 0, 1, 3).flatten(1)
        return out

    def products(self, a: Tensor, b: Tensor) -> Tensor:
        wide = torch.promote_types(a.dtype, torch.float32)
        return a.to(wide) @ b.to(wide).mT

    def watched(self, plan: TorchPlan) -> Mapping[int, WeightSums]:
        return {it.place: it.seen for it in plan.lone if it.watches}

    # ---- attention of a sequence alone

    def _write(self, index: int, k: Tensor, v: Tensor, stored: FormatStore, writer: Writer) -> None:
        """Writes k and v [rows, K, D] of layer `index`, with their side data."""
        at = *stored.at(writer.units[index]), writer.offsets[index]
        made = stored.codec.store(k.flatten(0, 1), v.flatten(0, 1))
        entries = {name: entry.view(*k.shape[:2], *entry.shape[1:]) for name, entry in made.items()}
        if stored.format.sides and not stored.exact:  # side data are computed from keys in the form that attention reads
            k = _keys(stored.codec, made).view(k.shape)
        for side in stored.format.sides:
            entries |= side.fill(index, k)
        for name, entry in entries.items():
            stored.arrays[name][at] = entry

    def _attend_alone(
        self, index: int, layer: Attention, q: Tensor, pool: TorchPool, it: LoneSequence, sink_logits: Tensor | None
    ) -> Tensor:
        """q [K, G, R, D] -> the same shape."""
        heads, share, rows, size = q.shape
        seen, mask = self._visible(index, layer, share, it)
        turned = layer.rotary is not None and (it.near > 0 or it.far is not None)
        stored, weighed = pool.formats[it.view.format], turned or it.logs is not None or it.parallel is not None
        picked = seen[:, None]
        if it.view.read is not None:
            picked = self._picked(index, q, seen, pool, it)
        small = it.view.read is not None and not weighed and not it.encoded.numel() and self._few(picked, it.slots)
        weights = None
        if small and not any(stored.format.arrays[name].whole for name in stored.codes):
            out = self._gathered(index, layer, q, picked, small, stored, it, sink_logits)
        elif stored.exact and not weighed and not it.encoded.numel():
            if it.view.read is not None:
                mask = self._additive(picked, share)
            held = stored.take(stored.codes, it.units[index])
            keys, values = (held[name].view(1, heads, it.slots, size) for name in ("keys", "values"))
            out = _attended(q.reshape(1, heads, share * rows, size), keys, values, mask, layer, sink_logits)
        else:
            sources = self._sources(index, pool, it)
            weights = self._weights(index, layer, q, picked, sources, it, sink_logits)
            out = _mix(sources, weights.flatten(1, 2))
        if it.watches and it.first < rows:
            if weights is None:
                watched = self._weights(index, layer, q[:, :, it.first :], picked, self._sources(index, pool, it), it, sink_logits)
            else:
                watched = weights[:, :, it.first :]
            places.note(index, watched, seen[:, it.first :], it)
        return out.reshape(q.shape).to(q.dtype)

    def _visible(self, index: int, layer: Attention, share: int, it: LoneSequence) -> tuple[Tensor, Tensor]:
        """The slots that rows see, as bool [K or 1, R, slots] and as an additive mask [1, K or 1, G R, slots]."""
        reach = None if layer.window is None or it.deepest < layer.window else layer.window
        if reach not in it.masks or it.lengths.shape[0] > 1:
            seen = self._seen(index, layer, it)
            it.masks[reach] = seen, self._additive(seen[:, None], share)
        masks: tuple[Tensor, Tensor] = it.masks[reach]
        return masks

    def _seen(self, index: int, layer: Attention, it: LoneSequence) -> Tensor:
        """bool [K or 1, R, slots]: the slots that rows see."""
        reach = None if layer.window is None or it.deepest < layer.window else layer.window
        lane = index if it.lengths.shape[0] > 1 else 0
        column = (torch.arange(it.slots, device=self.device) - it.lengths[lane] + 1).clamp_(0, it.tail.shape[1] - 1)
        seen: Tensor = it.tail[:, column].transpose(0, 1)
        if it.last is not None:
            seen = seen & (torch.arange(it.slots, device=self.device) <= it.last[:, None])
        if it.where is not None:
            where = it.where[lane][:, None]
            distance = it.at[:, None] - where
            if reach is not None:
                seen = seen & (distance < reach)
            if it.window is not None:
                inside = (where < it.window.sinks) | (distance < it.window.recent)
                if it.window.heads is not None:
                    inside = inside | ~torch.tensor(it.window.heads[index], device=self.device)[:, None, None]
                seen = seen & inside
        return seen

    def _additive(self, seen: Tensor, share: int) -> Tensor:
        """bool [K, G or 1, R, slots] -> [1, K, G R, slots]"""
        mask = torch.zeros(seen.shape, dtype=self.dtype, device=self.device).masked_fill_(~seen, float("-inf"))
        return mask.expand(-1, share, -1, -1).flatten(1, 2)[None]

    def _picked(self, index: int, q: Tensor, seen: Tensor, pool: TorchPool, it: LoneSequence) -> Tensor:
        """bool [K, G or 1, R, slots]: the slots that `read` selects."""
        read: Select = cast(Select, it.view.read)
        stored, heads = pool.formats[it.view.format], len(q)
        names = list(read.arrays(q.shape[-1], self.dtype))
        held = stored.take(names, it.units[index])
        if it.encoded.numel():
            front = pool.formats[it.view.encoded].take(names, it.encoded[index])
            held = {name: torch.cat([front[name], held[name]], 1) for name in names}
        assert it.where is not None
        where = it.where[index if len(it.where) > 1 else 0].expand(heads, -1)
        return read.select(index, q, held, seen.expand(heads, -1, -1), where, it.at, self.products)

    def _few(self, picked: Tensor, slots: int) -> int:
        """The most slots that a row reads, in whole pages, if gathering only these is less work than reading all; else 0. Always 0 on
        a GPU, because the number would have to be copied to the CPU in every layer."""
        if self.device.type != "cpu":
            return 0
        count = -(-int(picked.sum(-1).max()) // PAGE) * PAGE
        return count if picked.shape[1] * picked.shape[2] * count < slots else 0

    def _gathered(
        self,
        index: int,
        layer: Attention,
        q: Tensor,
        picked: Tensor,
        count: int,
        stored: FormatStore,
        it: LoneSequence,
        sink_logits: Tensor | None,
    ) -> Tensor:
        """Attention over the picked slots, gathered for every row, and for every query head if their slots differ."""
        heads, share, rows, size = q.shape
        picked, apart = picked.expand(heads, -1, -1, -1), picked.shape[1]
        order = picked * torch.arange(it.slots, 0, -1, device=self.device)  # keeps slot order, so sums have the same order
        chosen = order.topk(count, -1)
        slot = chosen.indices.view(heads, -1)
        units = it.units[index].gather(1, slot // PAGE)
        got = stored.pick(stored.codes, units, slot % PAGE)
        some = heads * apart * rows
        held = {name: entry.reshape(some, count // PAGE, PAGE, *entry.shape[2:]) for name, entry in got.items()}
        mine = q.view(heads, apart, share // apart, rows, size).transpose(2, 3).reshape(some, share // apart, size).to(self._wide())
        scores = _settled(stored.codec.scores(held, mine), layer)
        scores = scores.masked_fill_(~(chosen.values > 0).view(some, 1, count), float("-inf"))
        if sink_logits is not None:
            sink_logits = sink_logits.view(heads, apart, 1, -1).expand(-1, -1, rows, -1).reshape(some, -1)
        weights = _softmax(scores, sink_logits)
        mixed = stored.codec.mix(held, weights).reshape(heads, apart, rows, share // apart, size)
        return mixed.transpose(2, 3).reshape(q.shape)

    def _sources(self, index: int, pool: TorchPool, it: LoneSequence) -> list[PageSource]:
        found = [(it.view.encoded, it.encoded[index])] if it.encoded.numel() else []
        formats = [(pool.formats[name], units) for name, units in [*found, (it.view.format, it.units[index])]]
        return [(stored.codec, stored.take(stored.codes, units), units.shape[1]) for stored, units in formats]

    def _weights(
        self,
        index: int,
        layer: Attention,
        q: Tensor,
        picked: Tensor,
        sources: list[PageSource],
        it: LoneSequence,
        sink_logits: Tensor | None,
    ) -> Tensor:
        """Attention weights [K, G, R, slots] of the last R rows, in float32 or better."""
        _, share, rows, _ = q.shape
        q, picked = q.to(self._wide()), picked[:, :, -rows:]
        scores = _scores(sources, q.flatten(1, 2), it.slots // PAGE)
        if it.near and layer.rotary is not None:
            assert it.window is not None and it.where is not None
            if layer.rotary not in it.turns:
                gone = (it.at + 1 - it.window.size).clamp(min=0)
                ones = [1.0] * len(layer.rotary.frequencies)  # q already has the scales of its rotary
                it.turns[layer.rotary] = self._turns(layer.rotary, -gone, ones, self._wide())
            cos, sin = it.turns[layer.rotary]
            turned = _scores(sources, _turn(q, cos[-rows:], sin[-rows:]).flatten(1, 2), -(-it.near // PAGE))
            front = scores[..., : turned.shape[-1]]
            sinks = it.where[index if len(it.where) > 1 else 0][:, None, : turned.shape[-1]] < it.window.sinks
            if it.window.heads is not None:
                sinks = sinks & torch.tensor(it.window.heads[index], device=self.device)[:, None, None]
            front.copy_(torch.where(sinks, turned, front))
        if it.far is not None and layer.rotary is not None:
            scores = self._with_far(index, layer.rotary, it.far, q, scores, sources, it)
        scores = _settled(scores.reshape(-1, share, rows, scores.shape[-1]), layer)
        if it.logs is not None:
            scores = scores + it.logs[index if len(it.logs) > 1 else 0][:, None, None].to(scores.dtype)
        if it.parallel is not None:
            scores = places.grouped(index, scores, picked, it)
        scores = scores.masked_fill_(~picked, float("-inf"))
        return _softmax(scores, None if sink_logits is None else sink_logits.view(-1, share, 1).expand(-1, -1, rows))

    def _with_far(
        self, index: int, rotary: Rotary, far: Far, q: Tensor, scores: Tensor, sources: list[PageSource], it: LoneSequence
    ) -> Tensor:
        """scores [K, G R, slots] of the last R rows, with those of far keys at their one distance."""
        heads, share, rows, size = q.shape
        assert it.where is not None
        lane = index if len(it.where) > 1 else 0
        where, ones, wide = it.where[lane], [1.0] * len(rotary.frequencies), self._wide()  # both have the scales of their rotary
        if (rotary, lane) not in it.far_turns:
            back = [part.unflatten(0, where.shape) for part in self._turns(rotary, -where.flatten(), ones, wide)]
            it.far_turns[rotary, lane] = (back[0], back[1]), self._turns(rotary, far.distance - it.at, ones, wide)
        turns_of_keys, (cos, sin) = it.far_turns[rotary, lane]
        keys = torch.cat([codec.decode(held)[0].to(wide).reshape(heads, -1, size) for codec, held, _ in sources], 1)
        found = _turn(q, cos[-rows:], sin[-rows:]).flatten(1, 2) @ _turn(keys, *turns_of_keys).mT
        apart = it.at[-rows:, None] - where[:, None] >= far.near  # [K or 1, R, slots]
        return torch.where(apart.repeat(1, share, 1), found, scores)

    def experts(self, x: Tensor, weights: LayerWeights, experts: Experts) -> Tensor:
        assert weights.router is not None
        share, chosen = self._route(self.linear(x, weights.router), experts)
        out = torch.zeros_like(x)
        for e in chosen.unique().tolist():
            rows, place = (chosen == e).nonzero(as_tuple=True)
            inner = limited(self.linear(x[rows], weights.experts_up[e]), experts.mlp)
            inner = self.activate(inner, experts.mlp.activation, experts.mlp.gated)
            out.index_add_(0, rows, self.linear(inner, weights.experts_down[e]) * share[rows, place, None])
        return out

    def _route(self, logits: Tensor, experts: Experts) -> tuple[Tensor, Tensor]:
        """The shares of the chosen experts and their indices, both [T, top_k]."""
        chances = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
        chances, order = chances.sort(dim=-1, descending=True, stable=True)  # of equal ones the lowest expert first, unlike topk
        share, chosen = chances[:, : experts.top_k], order[:, : experts.top_k]
        if experts.renormalise:
            share = share / sum(share.split(1, -1))  # in a fixed order, for any number of rows
        return share.to(logits.dtype), chosen

    def cap(self, x: Tensor, limit: float) -> Tensor:
        return torch.tanh(x / limit) * limit

    def head(self, x: Tensor, weights: Weights, final: Norm, plan: TorchPlan, taps: Taps) -> ForwardResult:
        rows = x if plan.logit_rows.numel() == x.shape[0] else x.index_select(0, plan.logit_rows)
        logits = self.linear(self.norm(rows, weights.final_norm, final), weights.head)
        top_k = best_first(logits, taps.top_k) if taps.top_k else None
        return ForwardResult(argmax(logits), top_k, logits if taps.logits else None)


def _onednn_packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN can pack weights of this dtype. bfloat16 needs AVX-512."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))


_lent: list[int] = []  # the number of PyTorch threads, while another backend uses the processors


def lend_threads() -> None:
    """Limits PyTorch to one thread until take_threads_back()."""
    if not _lent:
        _lent.append(torch.get_num_threads())
    torch.set_num_threads(1)


def take_threads_back() -> None:
    if _lent:
        torch.set_num_threads(_lent.pop())


def _attended(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, layer: Attention, sink_logits: Tensor | None) -> Tensor:
    """Attention of q [S, K, R, D] over k and v [S, K, n, D], with an additive mask. R: those of a kv head's first query head come first."""
    if sink_logits is not None:  # one more slot: a key of zeros has score 0, to which the mask adds the logit
        k, v, share = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1)), layer.heads // layer.kv_heads
        column = sink_logits.to(mask.dtype).view(-1, share, 1).expand(-1, -1, q.shape[2] // share).reshape(1, -1, q.shape[2], 1)
        mask = torch.cat([part.expand(*q.shape[:2], -1, -1) for part in (mask, column)], -1)
    if layer.softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=layer.score_scale)
    scores = _settled((q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)), layer)
    return (scores + mask).softmax(-1).to(q.dtype) @ v


def _softmax(scores: Tensor, sink_logits: Tensor | None) -> Tensor:
    """The weights of scores [..., n]. sink_logits: [...], the score of one more slot, whose weight is left out."""
    if sink_logits is None:
        return scores.softmax(-1)
    return torch.cat([scores, sink_logits[..., None].to(scores.dtype)], -1).softmax(-1)[..., :-1]


def _settled(products: Tensor, layer: Attention) -> Tensor:
    """The scores of dot products, in place."""
    scores = products.mul_(layer.score_scale)
    return scores if layer.softcap is None else scores.div_(layer.softcap).tanh_().mul_(layer.softcap)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x with its leading dimensions rotated, as many as cos and sin have."""
    dim = cos.shape[-1]
    if dim == x.shape[-1]:
        return torch.addcmul(x * cos, x.roll(dim // 2, -1), sin)
    turned, rest = x.split([dim, x.shape[-1] - dim], -1)
    return torch.cat([torch.addcmul(turned * cos, turned.roll(dim // 2, -1), sin), rest], -1)


def _keys(codec: PageCodec, entries: Arrays) -> Tensor:
    """Entries [m, ...] of per-slot arrays -> keys [m, D] in the form that attention reads. Pads to units, because codecs decode units."""
    held = {name: F.pad(x, (0, 0) * (x.ndim - 1) + (0, -len(x) % PAGE)).unflatten(0, (-1, PAGE)) for name, x in entries.items()}
    return codec.decode(held)[0].flatten(0, 1)[: len(next(iter(entries.values())))]


def _scores(sources: list[PageSource], q: Tensor, units: int) -> Tensor:
    """q [K, R, D] -> [K, R, 32 units], for the leading units of all sources."""
    found = []
    for codec, held, count in sources:
        some = min(count, units)
        if some:
            found.append(codec.scores(held if some == count else {name: array[:, :some] for name, array in held.items()}, q))
        units -= some
    return torch.cat(found, -1) if len(found) > 1 else found[0]


def _mix(sources: list[PageSource], weights: Tensor) -> Tensor:
    """weights [K, R, slots] -> [K, R, D]"""
    parts = weights.split([count * PAGE for _, _, count in sources], -1)
    return torch.stack([codec.mix(held, part) for (codec, held, _), part in zip(sources, parts, strict=True)]).sum(0)
