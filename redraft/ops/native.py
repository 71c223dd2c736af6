"""Compiled kernels on the CPU (ops/cpu). They are bit-exact, and one call runs all layers of a step.

The page layout is that of the NumPy backend, whose operations do what no kernel does: page operations between steps, and codes of groups
that no kernel reads. The kernels attend every view: windows, codes of 8 and 4 bits, sparse reads. Only texts with far keys or groups of
keys are attended in NumPy, with products of the kernels. The result of a row does not depend on other rows or on the grouping into steps. A
sparse attention method selects slots in Python, from products that the kernels compute.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from redraft.core.batch import Batch
from redraft.core.noise import draw
from redraft.core.sequence import Lanes
from redraft.core.spec import Attention, Experts, LayerSpec, Mlp, ModelSpec, Norm
from redraft.core.taps import NO_TAPS, Taps
from redraft.core.tree import F64, I64
from redraft.core.view import Watch, Window
from redraft.errors import Unsupported
from redraft.ops import library, pytorch
from redraft.ops.arrays import BFLOAT16, Numbers, array, numpy_dtype
from redraft.ops.backend import (
    Feature,
    ForwardResult,
    LayerWeights,
    Linear,
    LinearWeights,
    LowRank,
    NormWeights,
    Weights,
    WeightSums,
    argmax,
    best_first,
)
from redraft.ops.cpu import abi
from redraft.ops.cpu.abi import address
from redraft.ops.format import CODE_BLOCKS, INT8_VECTORS, THIN_KEYS, Format
from redraft.ops.numpy_ops import Floats, NumpyOps
from redraft.ops.numpy_pool import Exact, FormatStore, NumpyPool, aligned, lines
from redraft.ops.places import STATISTICS, LoneSequence, Writer, chain_shape, tree_rows, unknown
from redraft.ops.quantized import Quantized

KINDS = {np.dtype(np.float32): abi.F32, BFLOAT16: abi.BF16}
LANES = {Lanes.SHARED: 0, Lanes.PER_LAYER: 1, Lanes.PER_HEAD: 2}
PARTS = [one[0] for one in abi.Pool._fields_ if one[1] is abi.SIZE and not one[0].endswith(("_bytes", "_block"))]  # arrays after the keys
HUGE = 1 << 21  # bytes of a huge memory page
ARRANGED = "scales", "lows", "factors", "offsets"  # arrays of groups, see kernels.h
NO_WINDOW = Window(0, 0, turned=False)
CONTENDERS = 16  # room for the places that rd_contenders finds, see kernels.h
# layouts that the kernels read; None: unencoded keys and values
LAYOUTS = {"": None, INT8_VECTORS: abi.I8, CODE_BLOCKS[2]: abi.I2, CODE_BLOCKS[4]: abi.I4, THIN_KEYS: abi.THIN}
COUNTS = {"key_left": "rank", "key_outliers": "outliers", "channels": "kept"}  # lengths of arrays that they must know


@dataclass(frozen=True, eq=False)
class Packed:
    """A linear layer in panels. panels: u8 [panels, steps, 64, 4]; extra: the other arrays that `c` points to, by field name."""

    c: abi.Linear
    panels: Numbers
    extra: dict[str, Numbers]

    @property
    def outs(self) -> int:
        return int(self.c.outs)

    @property
    def meta(self) -> bool:
        return False

    def rows(self, keep: NDArray[Any]) -> Linear | Quantized:
        """The layer with these outputs only, unpacked."""
        assert not self.c.gated, "gates and other outputs alternate, so rows cannot be selected"
        bias, own = self.extra["bias"][keep] if "bias" in self.extra else None, keep
        codes = self.panels
        if self.c.kind == abi.I4:
            both = np.stack([codes & 15, codes >> 4], 2)
            codes = both.reshape(len(codes), -1, *codes.shape[2:]).astype(np.int8) - np.int8(0 if self.c.lows else 8)
        dense = _flat(codes.swapaxes(1, 2))[own]
        dense = dense.reshape(len(dense), -1)
        if self.c.kind in (abi.I8, abi.I4, abi.G8):
            columns, side = (
                (self.extra["columns"].astype(np.int64), _of_outputs(self.extra["side"])[own]) if self.c.outliers else (None, None)
            )
            dense = dense.view(np.int8)[:, : self.c.ins]
            parts = {name: _of_outputs(self.extra[name])[own] for name in ARRANGED if name in self.extra}
            tops = {"scale": parts["factors"], "top": parts["scales"]} if self.c.factors else {"scale": parts.get("scales")}
            lows = {"low": parts["offsets"], "bottom": parts["lows"]} if self.c.offsets else {"low": parts.get("lows")}
            held = {"scale": self.extra["scale"][own]} if self.c.kind == abi.I8 else {**tops, **lows}
            return Quantized(
                dense, ins=self.c.ins, dtype=np.dtype(np.float32), group=self.c.group, bias=bias, columns=columns, side=side,
                wide=self.c.kind == abi.G8, per=self.c.per, **held,
            )  # fmt: skip
        dtype = np.dtype(np.float32) if self.c.kind == abi.F32 else BFLOAT16
        return Linear(np.ascontiguousarray(dense.view(dtype)[:, : self.c.ins]), None if bias is None else bias.astype(dtype))


@dataclass
class NativeGroup:
    """Sequences that are attended in one call. All their pages have one format, all their encoded pages another. readers: the sequences
    with a sparse read, as PyTorch plans them; writers: where to write the rows of formats with side data."""

    format: str
    encoded: str
    step: abi.Step
    attention: AttentionPlan  # the memory of step.plan
    readers: list[LoneSequence] = field(default_factory=list)
    writers: list[Writer] = field(default_factory=list)


class AttentionPlan:
    """The attention plan of a step, in the memory of the kernels."""

    def __init__(self, c: ctypes.CDLL, step: abi.Step, heads: int) -> None:
        self.c, self.at = c, c.rd_plan(step, heads)
        if not self.at:
            raise MemoryError("attention plan: out of memory")
        step.plan = self.at

    def __del__(self) -> None:
        self.c.rd_plan_free(self.at)


@dataclass
class NativeModel:
    """Data shared by all plans of a model. turns: id of a layer's Rotary -> its index among the distinct ones (hashing a Rotary is slow);
    rotaries, plain_rotaries: with and without their scales; pool: a pool without memory; pools: the same in each format."""

    spec: ModelSpec
    turns: dict[int, int]
    rotaries: abi.Rotaries
    plain_rotaries: abi.Rotaries
    pool: abi.Pool
    kept: list[Any]  # memory that the rotaries point to
    pools: dict[str, abi.Pool] = field(default_factory=dict)


@dataclass
class NativePlan:
    """turns: f32[rotaries, 2 (cos, sin), T, head_dim / 2]; lone: sequences with far keys or groups of keys, which belong to no group here;
    writers: where to write their rows; seen: statistics of the sequences, by index in the batch; kept: memory that the steps of the groups
    point to."""

    batch: Batch
    model: NativeModel
    turns: NDArray[np.float32]
    groups: list[NativeGroup] = field(default_factory=list)
    lone: list[LoneSequence] = field(default_factory=list)
    writers: list[Writer] = field(default_factory=list)
    seen: dict[int, WeightSums] = field(default_factory=dict)
    kept: list[Any] = field(default_factory=list)
    adapters: abi.Adapters | None = None


class NativeOps(NumpyOps):
    """The native backend. Raises Unsupported, with the reason, if the kernels do not support this dtype, device or machine."""

    name = "native"
    features: frozenset[Feature] = NumpyOps.features | {Feature.RUN, Feature.BIT_EXACT, Feature.GROUPED, Feature.KEPT}

    def __init__(self, dtype: Any = np.float32, device: Any = "cpu") -> None:
        serves, why = library.serves(numpy_dtype(dtype), device)
        loaded = library.load()
        if serves != self.name or loaded is None:
            raise Unsupported(f"backend 'native': {why}")
        super().__init__(dtype, device)
        self.library, self.c = loaded, abi.bind(loaded.c)
        self.kind = KINDS[self.dtype]
        self.inside = 0.0  # seconds spent in kernels so far
        self._layouts: dict[str, str] = {"": ""}  # name of a format -> its layout
        self._sided: set[str] = set()  # formats with side data
        self._segments: dict[int, Any] = {}
        self._terms: WeakKeyDictionary[Any, tuple[NDArray[np.int32], abi.Adapter]] = WeakKeyDictionary()
        self._mixtures: dict[tuple[int, Experts], abi.Experts | None] = {}
        self._models: dict[int, NativeModel] = {}
        self._wholes: dict[tuple[int, int], abi.Model | None] = {}
        self._pools: weakref.WeakKeyDictionary[FormatStore, abi.Pool] = weakref.WeakKeyDictionary()
        if pytorch.loaded() is not None:
            from redraft.ops.torch_ops import lend_threads

            lend_threads()  # two pools of spinning threads are 40 times slower

    @property
    def threads(self) -> int:
        return self.library.threads

    def use_threads(self, count: int) -> None:
        self.library.set_threads(count)

    def block_bytes(self, spec: ModelSpec) -> int:
        serves, why = library.serves(self.dtype, self.device, spec)
        if serves != self.name:
            raise Unsupported(f"backend 'native': {why}")
        return super().block_bytes(spec)

    def define(self, pool: NumpyPool, fmt: Format) -> int:
        layout = "" if fmt.codec is None else getattr(fmt.codec, "layout", "of its own")
        if layout not in LAYOUTS:
            raise Unsupported(f"codec {fmt.name!r}: backend 'native' has no attention kernel for its codes; use backend 'torch'")
        if self._layouts.setdefault(fmt.name, layout) != layout:
            raise Unsupported(f"format {fmt.name!r} has two layouts")
        if fmt.sides:
            self._sided.add(fmt.name)
        count = super().define(pool, fmt)
        if fmt.codec is None:
            pool.formats[fmt.name].codec = Exact(self.products)
        return count

    # ---- weights

    def pack(self, weights: LinearWeights, gated: bool = False) -> LinearWeights:
        if isinstance(weights, Quantized):
            return self._pack_codes(weights, gated)
        assert isinstance(weights, Linear)
        weight, bias = array(weights.weight), weights.bias
        c = abi.Linear(outs=weight.shape[0], ins=weight.shape[1], kind=self.kind, gated=gated)
        panels = self._panels(c)
        weight = np.ascontiguousarray(weight, self.dtype)
        self._call("rd_pack", c, address(weight), address(panels))
        return Packed(c, panels, self._floats(c, bias=bias))

    def _pack_codes(self, weights: Quantized, gated: bool) -> LinearWeights:
        if weights.group % 16:
            return super().pack(weights)  # groups that are no multiple of 16
        outs, ins = weights.shape
        kind = abi.I8 if not weights.grouped else abi.G8 if weights.wide else abi.I4
        c = abi.Linear(outs=outs, ins=ins, kind=kind, group=weights.group, gated=gated, per=weights.per)
        codes, panels = np.ascontiguousarray(array(weights.whole())), self._panels(c)
        extra = self._floats(c, bias=weights.bias)
        if weights.grouped:
            tops, lows = weights.top is not None, weights.bottom is not None
            extra |= self._arranged(
                c,
                scales=weights.top if tops else weights.scale,
                factors=weights.scale if tops else None,
                lows=weights.bottom if lows else weights.low,
                offsets=weights.low if lows else None,
            )
            self._call("rd_pack_groups", c, address(codes), address(panels))
        else:
            sums = lines((len(panels) * abi.PANEL,), np.int32)
            self._call("rd_pack_int8", c, address(codes), address(panels), address(sums))
            c.sums, extra["sums"] = address(sums), sums
            extra |= self._floats(c, scale=weights.scale)
        if weights.columns is not None and weights.side is not None:
            parts = [self._floats(c, side=part)["side"].reshape(-1, abi.PANEL) for part in array(weights.side).T]
            columns, side = array(weights.columns).astype(np.int32), np.stack(parts, 1)
            c.outliers, c.columns, c.side = len(columns), address(columns), address(side)
            extra |= {"columns": columns, "side": side}
        return Packed(c, panels, extra)

    @property
    def layout(self) -> str:
        return self.library.isa

    def kept(self, weights: LinearWeights) -> tuple[dict[str, int], dict[str, Numbers]] | None:
        if not isinstance(weights, Packed):
            return None
        return {name: int(getattr(weights.c, name)) for name in abi.SIZES}, {"panels": weights.panels, **weights.extra}

    def restored(self, numbers: Mapping[str, int], arrays: Mapping[str, Numbers]) -> Packed:
        c, extra = abi.Linear(**{name: numbers[name] for name in abi.SIZES}), dict(arrays)
        panels = extra.pop("panels")
        if panels.nbytes != self.c.rd_panel_bytes(c):
            raise ValueError(f"panels of {panels.nbytes} bytes: {self.c.rd_panel_bytes(c)} are needed")
        for name, numbers_of in arrays.items():
            setattr(c, name, address(numbers_of))
        return Packed(c, panels, extra)

    def _panels(self, c: abi.Linear) -> Numbers:
        """Memory for the panels, on huge pages if it fills at least one."""
        size = self.c.rd_panel_bytes(c)
        grain = HUGE if size >= HUGE else abi.LINE
        panels = aligned(size, grain)
        if size >= HUGE:
            self.c.rd_huge(address(panels), size)
        c.panels = address(panels)
        return panels.reshape(-(-c.outs // abi.PANEL), -1, abi.PANEL, 4)

    def _arranged(self, c: abi.Linear, **given: Any) -> dict[str, Numbers]:
        """Copies numbers [outs, n] to [panels, n, 64], in the order of the panels."""
        made = {}
        for name, values in given.items():
            if values is not None:
                values = np.ascontiguousarray(array(values))
                made[name] = lines((-(-c.outs // abi.PANEL), values.shape[1], abi.PANEL), values.dtype)
                at, count = address(made[name]), values.shape[1]
                self._call("rd_arrange", c, address(values), values.itemsize, count, at)
                setattr(c, name, at)
        return made

    def _floats(self, c: abi.Linear, **given: Any) -> dict[str, Numbers]:
        """Copies numbers of outputs to the order of the panels."""
        made = {}
        for name, values in given.items():
            if values is not None:
                values = np.ascontiguousarray(array(values), np.float32)
                made[name] = lines((-(-c.outs // abi.PANEL) * abi.PANEL,), np.float32)
                self._call("rd_pack_floats", c, address(values), address(made[name]))
                setattr(c, name, address(made[name]))
        return made

    # ---- the plan

    def plan(self, batch: Batch, spec: ModelSpec, taps: Taps = NO_TAPS) -> NativePlan:  # type: ignore[override]
        model = self._model(spec)
        turns = np.empty((model.rotaries.count, 2, len(batch.tokens), model.rotaries.half), np.float32)
        turns_at = turns.ctypes.data  # found once, because it takes long
        if turns.size:
            self._call("rd_turns", model.rotaries, batch.positions.tobytes(), len(batch.tokens), turns_at)
        plan = NativePlan(batch, model, turns)
        seqs, far = self._sequences(batch, plan.kept), self._far(batch, model, plan.kept)
        groups: dict[tuple[str, str, bool], list[int]] = {}
        if lone := [s for s, view in enumerate(batch.views) if view is not None and (view.far is not None or view.parallel is not None)]:
            first = tree_rows(batch)
            plan.lone = [self._alone(batch, s, spec, taps.attention.get(s, ()), first[s]) for s in lone]
            plan.writers = self._writers(batch, lone, len(spec.attention), spec.kv_heads)
            plan.seen |= {it.place: it.seen for it in plan.lone if it.watches}
        for s, view in enumerate(batch.views):
            if s in lone:
                continue
            groups.setdefault(("", "", False) if view is None else (view.format, view.encoded, view.read is not None), []).append(s)
        for (name, encoded, sparse), members in groups.items():
            own, kind = b"".join([seqs[s] for s in members]), self._kind_of(name, model)
            step = abi.Step(len(batch.tokens), len(members), own, kind, abi.Pool(), turns_at, far, model.rotaries.half, None, 0, None)
            watches = {i: taps.attention[s] for i, s in enumerate(members) if taps.attention.get(s)}
            seen = self._watch(step, plan.kept, batch, members, spec, watches) if watches else {}
            group = NativeGroup(name, encoded, step, AttentionPlan(self.c, step, spec.attention[0].heads))
            if sparse:
                rows = tree_rows(batch)
                group.readers = [self._alone(batch, s, spec, (), rows[s]) for s in members]
            if name in self._sided:  # also before the read starts, because later rows select by these side data
                group.writers = self._writers(batch, members, len(spec.attention), spec.kv_heads)
            plan.groups.append(group)
            plan.seen |= {members[i]: sums for i, sums in seen.items()}
        return plan

    def _model(self, spec: ModelSpec) -> NativeModel:
        if id(spec) not in self._models:
            every, first = [layer.rotary for layer in spec.attention if layer.rotary is not None], spec.attention[0]
            different = list(dict.fromkeys(every))
            frequencies = np.array([rotary.frequencies for rotary in different], np.float64, ndmin=2)
            scales = np.array([rotary.scales for rotary in different], np.float64, ndmin=2)
            ones = np.ones_like(scales)
            rotaries, bare = (abi.Rotaries(frequencies.ctypes.data, x.ctypes.data, *frequencies.shape) for x in (scales, ones))
            pool = abi.Pool(layers=len(spec.attention), kv_heads=first.kv_heads, size=first.head_dim, kind=self.kind)
            turns = {id(rotary): different.index(rotary) for rotary in every}
            self._models[id(spec)] = NativeModel(spec, turns, rotaries, bare, pool, [frequencies, scales, ones])
        return self._models[id(spec)]

    @staticmethod
    def _sequences(batch: Batch, kept: list[Any]) -> list[bytes]:
        """Each sequence in the form of the kernels. kept: gets the memory that they point to."""
        view, starts, tree_starts = batch.pages, batch.starts.tolist(), batch.tree_starts.tolist()
        parts = [batch.visible.tobytes(), batch.positions.tobytes()]  # the first needs addresses that are multiples of 8
        for pages, codes, lengths, tail in zip(view.pages, view.encoded, view.lengths, batch.tails, strict=True):
            parts += pages.tobytes(), codes.tobytes(), lengths.tobytes(), tail.tobytes()
        memory = np.frombuffer(b"".join(parts), np.uint8)  # one array, because each address takes long
        words = batch.visible.shape[1]
        bits: int = memory.ctypes.data
        where = bits + batch.visible.nbytes
        pages_at = where + batch.positions.nbytes
        kept.append(memory)
        seqs = []
        for s, (a, t, z) in enumerate(zip(starts[:-1], tree_starts, starts[1:], strict=True)):
            pages, codes, held = view.pages[s], view.encoded[s], view.positions[s]
            pointers = logs = windowed = slots_at = 0
            codes_at = pages_at + 4 * pages.size
            lengths_at = codes_at + 4 * codes.size
            tail_at = lengths_at + 4 * view.lengths[s].size
            window = (chosen.window if (chosen := batch.views[s]) else None) or NO_WINDOW
            if held is not None:
                pointers = _lanes([np.ascontiguousarray(lane, np.int32) for lane in held], kept)
            if (given := view.logs[s]) is not None:
                logs = _lanes([np.ascontiguousarray(lane, np.float32) for lane in given], kept)
            if (own := view.slots[s]) is not None:
                kept.append(slots := np.ascontiguousarray(own, np.int32))
                slots_at = address(slots)
            if window.heads is not None:
                kept.append(heads := np.array(window.heads, np.uint8))
                windowed = address(heads)
            seqs.append(
                abi.SEQ.pack(
                    a, z - a, t - a, view.tail[s], view.chain[s], LANES[view.kinds[s]], pages.shape[1], words, codes.shape[1], window.sinks,
                    window.recent, window.turned, pages_at, codes_at, lengths_at, pointers, bits, where + 4 * a, tail_at, windowed, logs,
                    slots_at,
                )
            )  # fmt: skip
            bits += 8 * words * (z - t)
            pages_at = tail_at + 4 * batch.tails[s].size
        return seqs

    def _kind_of(self, name: str, model: NativeModel) -> abi.Pool:
        """A pool of this format, without memory."""
        if name not in model.pools:
            found, kind = abi.Pool.from_buffer_copy(model.pool), LAYOUTS[self._layouts[name]]
            found.kind = self.kind if kind is None else kind
            model.pools[name] = found
        return model.pools[name]

    def _far(self, batch: Batch, model: NativeModel, kept: list[Any]) -> int | None:
        """The address of cosines and sines that rotate queries back by the number of hidden positions, to score sinks; None if there is
        no window."""
        if not any(view and view.window and view.window.turned for view in batch.views) or not model.rotaries.count:
            return None
        gone = np.zeros(len(batch.tokens), np.int32)
        for s, view in enumerate(batch.views):
            own = slice(int(batch.starts[s]), int(batch.starts[s + 1]))
            if view is not None and view.window is not None and view.window.turned:
                gone[own] = np.maximum(0, batch.positions[own] + 1 - view.window.size)
        far = np.empty((model.rotaries.count, 2, len(gone), model.rotaries.half), np.float32)
        if far.size:
            self._call("rd_turns", model.plain_rotaries, (-gone).tobytes(), len(gone), far.ctypes.data)
        kept.append(far)
        return int(far.ctypes.data)

    @staticmethod
    def _watch(
        step: abi.Step, kept: list[Any], batch: Batch, members: list[int], spec: ModelSpec, watches: Mapping[int, tuple[Watch, ...]]
    ) -> dict[int, WeightSums]:
        """Memory for statistics, by index in the group."""
        found, lines = {}, b""
        for member, wanted in watches.items():
            s = members[member]
            a, t, z = int(batch.starts[s]), int(batch.tree_starts[s]), int(batch.starts[s + 1])
            slots = batch.pages.held(s, z - a)
            shape = len(spec.attention), spec.kv_heads, slots
            chain, nodes = np.zeros(chain_shape(wanted, t - a, shape)), np.zeros((len(wanted), z - t, *shape))
            seen = found[member] = WeightSums(chain, nodes)
            for i, watch in enumerate(wanted):
                if watch.statistic not in STATISTICS:
                    raise Unsupported(unknown(watch.statistic))
                counts = None if watch.heads is None else np.array(watch.heads, np.uint8)
                kept.append(counts)
                of = watch.since, STATISTICS.index(watch.statistic), watch.each, watch.threshold, 0
                at = address(seen.chain[i]), address(seen.nodes[i]), 0 if counts is None else address(counts)
                lines += abi.WATCHED.pack(*at, slots, member, *of)
        watched = np.frombuffer(lines, np.uint8)
        kept.append(watched)
        step.watched, step.watches = watched.ctypes.data, len(lines) // abi.WATCHED.size
        return found

    # ---- the operations

    def draw(self, key: int, ids: I64, values: F64) -> int:
        ids, values = np.ascontiguousarray(ids, np.int64), np.ascontiguousarray(values, np.float64)
        places = np.empty(CONTENDERS, np.int64)
        found = self.c.rd_contenders(key, ids.ctypes.data, values.ctypes.data, len(ids), places.ctypes.data)
        if found == 1:
            return int(places[0])
        if not found:  # very many are near, which is rare
            return draw(key, ids, values)
        places = places[:found]
        return int(places[draw(key, ids[places], values[places])])  # with numpy's logarithm, as everywhere

    def embed(self, weights: Weights, plan: NativePlan) -> Floats:  # type: ignore[override]
        batch, x = plan.batch, self.rows(weights.embed, plan.batch.tokens)
        return x if weights.positions is None else x + array(weights.positions)[batch.positions]

    def rows(self, table: Any, ids: Numbers) -> Floats:
        if not isinstance(table, Packed):
            return super().rows(table, ids)
        x = np.empty((len(ids), table.c.ins), self.dtype)
        self._call("rd_rows", table.c, ids.tobytes(), len(ids), self.kind, address(x))
        return x

    def norm(self, x: Floats, weights: NormWeights, norm: Norm) -> Floats:
        out = np.empty(x.shape, x.dtype)
        if not x.size:
            return out
        flat, weight = np.ascontiguousarray(x).reshape(-1, x.shape[-1]), array(weights.weight)
        bias = None if weights.bias is None else address(array(weights.bias))
        to = self._rows(out.reshape(-1, x.shape[-1]))
        self._call("rd_norm", self._rows(flat), to, address(weight), bias, norm.eps, int(norm.kind == "rms"), KINDS[weight.dtype])
        return out

    def linear(self, x: Floats, weights: LinearWeights) -> Floats:
        if not isinstance(weights, Packed):
            return super().linear(x, weights)
        # Rows holds only an address, so x must live until the call returns
        x, out = np.ascontiguousarray(x), np.empty((len(x), weights.c.outs), x.dtype)
        if len(x):
            self._call("rd_linear", weights.c, self._rows(x), self._rows(out), abi.ACTIVATIONS["none"], 0)
        return out

    def logits(self, x: Floats, head: LinearWeights) -> Floats:
        """float32 [T, V]: unrounded sums, so rounding cannot make two logits equal."""
        if not isinstance(head, Packed):
            return self.linear(x, head)
        x, out = np.ascontiguousarray(x), np.empty((len(x), head.c.outs), np.float32)
        if len(x):
            self._call("rd_linear", head.c, self._rows(x), abi.Rows.of(out, abi.F32), abi.ACTIVATIONS["none"], 0)
        return out

    def add_low_rank(self, y: Floats, x: Floats, rows: I64, term: LowRank) -> None:
        x = np.ascontiguousarray(x)
        self._call("rd_low_rank", self._rows(x), self._rows(y), self._low_rank(term), address(rows), len(rows))

    def _low_rank(self, term: LowRank) -> abi.LowRank:
        (rank, ins), (_, outs) = term.a.shape, term.b.shape
        return abi.LowRank(address(term.a), address(term.b), ins, outs, term.first, rank, self.kind)

    def activate(self, x: Floats, activation: str, gated: bool) -> Floats:
        if activation not in abi.ACTIVATIONS:
            raise Unsupported(f"activation {activation!r}")
        x, out = np.ascontiguousarray(x), np.empty((len(x), x.shape[1] // 2 if gated else x.shape[1]), x.dtype)
        if len(x):
            self._call("rd_activate", self._rows(x), self._rows(out), abi.ACTIVATIONS[activation], int(gated))
        return out

    def experts(self, x: Floats, weights: LayerWeights, experts: Experts) -> Floats:
        key = id(weights), experts
        if key not in self._mixtures:
            self._mixtures[key] = _mixture(replace(experts, shared=None, gated=False), weights, self.dtype)
            weakref.finalize(weights, self._mixtures.pop, key, None)
        mixture = self._mixtures[key]
        if mixture is None:
            return super().experts(x, weights, experts)
        x, out = np.ascontiguousarray(x), np.empty(x.shape, x.dtype)
        if len(x):
            self._call("rd_experts", mixture, self._rows(x), self._rows(out))
        return out

    def _route(self, logits: Floats, experts: Experts) -> tuple[Floats, I64]:
        logits = np.ascontiguousarray(logits, np.float32)
        found = np.empty((len(logits), experts.top_k, 2), np.int32)  # in the layout of Best
        if len(logits):
            rows = abi.Rows.of(logits, abi.F32)
            self._call("rd_route", rows, experts.top_k, int(experts.renormalise), self.kind, address(found))
        return found[..., 0].view(np.float32).astype(self.dtype), found[..., 1].astype(np.int64)

    def rope(self, x: Floats, layer: Attention, plan: NativePlan) -> Floats:  # type: ignore[override]
        if layer.rotary is None:
            return x
        out = np.array(x, order="C")
        if len(x):
            cos, sin = plan.turns[plan.model.turns[id(layer.rotary)]]
            self._call("rd_rope", self._rows(out.reshape(len(x), -1)), x.shape[1], x.shape[2], cos.ctypes.data, sin.ctypes.data)
        return out

    def attend(  # type: ignore[override]
        self,
        index: int,
        layer: Attention,
        q: Floats,
        k: Floats,
        v: Floats,
        pool: NumpyPool,
        plan: NativePlan,
        sink_logits: Any = None,
    ) -> Floats:
        heads = _heads(layer, plan.model, sink_logits)
        out = np.empty((len(q), layer.heads * layer.head_dim), q.dtype)
        for group in plan.groups if len(q) else ():
            self._attend_group(index, layer, heads, q, k, v, out, pool, group)
        self._attend_lone(index, layer, q, k, v, out, pool, plan.lone, plan.writers, sink_logits)
        return out

    def _attend_group(
        self,
        index: int,
        layer: Attention,
        heads: abi.Heads,
        q: Floats,
        k: Floats,
        v: Floats,
        out: Floats,
        pool: NumpyPool,
        group: NativeGroup,
    ) -> None:
        """Attends the rows of the group's sequences."""
        for writer in group.writers:  # keys and side data must be written before a read selects by them
            self._write(index, k[writer.rows], v[writer.rows], pool.formats[writer.format], writer)
        picked, kept = self._picks(index, layer, q, pool, group) if group.readers else (None, None)
        q, k, v = (np.ascontiguousarray(x).reshape(len(x), -1) for x in (q, k, v))
        self._place(group, pool)
        rows = (self._rows(x) for x in (q, k, v, out))
        self._call("rd_attend", group.step, index, heads, picked, *rows)
        del kept

    def _picks(self, index: int, layer: Attention, q: Floats, pool: NumpyPool, group: NativeGroup) -> tuple[bytes, list[Any]]:
        """The slots that rows read, in the form of the kernels, and the memory that it points to."""
        heads, share = layer.kv_heads, layer.heads // layer.kv_heads
        lines, kept = b"", []
        for it in group.readers:
            rows = q[it.rows].reshape(-1, heads, share, layer.head_dim).transpose(1, 2, 0, 3)
            picked = self._picked(index, rows, self._seen(index, layer, it), pool, it).transpose(2, 0, 1, 3)
            bits = np.ascontiguousarray(np.packbits(picked, axis=-1, bitorder="little"))  # packbits keeps Fortran order
            lines += abi.PICKED.pack(bits.ctypes.data, bits.shape[-1] // 4, picked.shape[2])
            kept.append(bits)
        return lines, kept

    def cap(self, x: Floats, limit: float) -> Floats:
        x = np.ascontiguousarray(x, np.float32)
        out = np.empty(x.shape, x.dtype)
        if x.size:
            self._call("rd_cap", abi.Rows.of(x, abi.F32), abi.Rows.of(out, abi.F32), limit)
        return out

    def _dots(self, a: Floats, b: Floats) -> Floats:
        return self.products(a, b)

    def products(self, a: Floats, b: Floats) -> Floats:
        a, b = np.ascontiguousarray(a, np.float32), np.ascontiguousarray(b, np.float32)
        out = np.empty((len(a), a.shape[1], b.shape[1]), np.float32)
        if out.size:
            self._call("rd_products", address(a), address(b), *a.shape[:2], *b.shape[1:], address(out))
        return out

    def _place(self, group: NativeGroup, pool: NumpyPool) -> None:
        """Sets the addresses of the units of the group's formats."""
        group.step.pool = self._pool_of(pool, group.format, group.step.pool)
        if group.encoded:
            group.step.encoded = self._pool_of(pool, group.encoded, group.step.pool)

    def _pool_of(self, pool: NumpyPool, name: str, like: abi.Pool) -> abi.Pool:
        stored = pool.formats[name]
        found = self._pools.get(stored)
        if found is None:
            offsets, kind = stored.format.offsets(), LAYOUTS[self._layouts[name]]
            found = self._pools[stored] = abi.Pool(
                data=address(pool.data) + offsets["keys"], block_bytes=pool.data[0].nbytes, unit_bytes=stored.format.bytes,
                per_block=stored.per_block, layers=like.layers, kv_heads=like.kv_heads, size=like.size,
                kind=self.kind if kind is None else kind, numbers=self.kind,
                **{at: offsets[at] - offsets["keys"] for at in PARTS if at in offsets},
                **{count: stored.format.arrays[name].shape[0] for name, count in COUNTS.items() if name in offsets},
            )  # fmt: skip
        return found

    def watched(self, plan: NativePlan) -> Mapping[int, WeightSums]:  # type: ignore[override]
        return plan.seen

    def run(self, first: int, last: int, h: Floats, spec: ModelSpec, weights: Weights, pool: NumpyPool, plan: NativePlan) -> Floats | None:
        """Runs layers first..last (exclusive) in one call. Returns None if a layer or a sequence needs one operation at a time."""
        if not h.shape[0] or plan.lone or any(group.readers or group.writers for group in plan.groups):
            return None
        if plan.adapters is None:
            plan.adapters = self._adapters(plan.batch, plan.kept)
        segment, adapters = self._segment(spec, weights, plan.model), plan.adapters
        if segment is None or (adapters and any(layer.parallel for layer in spec.layers)):
            return None
        out = np.array(h, order="C") if first else h
        for group in plan.groups:
            self._place(group, pool)
        steps = [group.step for group in plan.groups]
        step = steps[0] if len(steps) == 1 else (abi.Step * len(steps))(*steps)
        self._call("rd_run", segment, first, last, step, len(steps), adapters, self._rows(out))
        return out

    def _adapters(self, batch: Batch, kept: list[Any]) -> abi.Adapters | None:
        """The adapters of a batch in the form of the kernels, None for none. kept: gets the memory that they point to."""
        if batch.adapters.count(None) == len(batch.adapters):
            return None
        distinct = list(dict.fromkeys(adapter for adapter in batch.adapters if adapter is not None))
        places = [-1 if adapter is None else distinct.index(adapter) for adapter in batch.adapters]
        of_row = np.repeat(np.array(places, np.int32), np.diff(batch.starts))
        every = (abi.Adapter * len(distinct))(*map(self._adapter, distinct))
        kept += of_row, every
        return abi.Adapters(of_row.ctypes.data, every)

    def _adapter(self, adapter: Any) -> abi.Adapter:
        if adapter not in self._terms:
            parts = [layer.get(name, ()) for layer in adapter.layers for name in ("qkv", "out", "up", "down")]
            terms = [self._low_rank(term) for part in parts for term in part]
            starts = np.cumsum([0, *map(len, parts)]).astype(np.int32)
            self._terms[adapter] = starts, abi.Adapter((abi.LowRank * len(terms))(*terms), starts.ctypes.data)
        return self._terms[adapter][1]

    def forward(self, batch: Batch, spec: ModelSpec, weights: Weights, pool: NumpyPool, taps: Taps) -> ForwardResult | None:
        """A whole pass in one call. Returns None if a tap, a sequence, an adapter, a row or the model needs more than one."""
        rows, last = len(batch.tokens), len(spec.layers) - 1
        if taps.hidden - {last} or taps.attention or not batch.plain or not rows:
            return None
        if batch.vectors is None and isinstance(weights.embed, Packed) and weights.embed is not weights.head:
            return None
        if batch.vectors is not None and len(batch.vectors[0]) < rows:
            return None  # some rows start from embeddings, others do not
        if any(adapter is not None and (adapter.embed is not None or adapter.head is not None) for adapter in batch.adapters):
            return None
        model, kept = self._whole(spec, weights, pool), list[Any]()
        adapters = self._adapters(batch, kept)
        if model is None or (adapters and any(layer.parallel for layer in spec.layers)):
            return None
        count, view = len(batch.logit_rows), batch.pages
        starts, nodes = batch.starts.tolist(), batch.visible
        parts = [
            abi.BATCH.pack(starts[-1], len(starts) - 1, count, *nodes.shape, 0),
            nodes.tobytes(), batch.tokens.tobytes(), batch.positions.tobytes(), batch.logit_rows.tobytes(),
        ]  # fmt: skip
        for s, (a, t) in enumerate(zip(starts, batch.tree_starts.tolist())):
            pages = view.pages[s]
            parts.append(abi.PLAIN.pack(starts[s + 1] - a, t - a, view.tail[s], view.chain[s], pages.size))
            parts += view.lengths[s].tobytes(), pages.tobytes(), batch.tails[s].tobytes()
        given = b"".join(parts)
        keep = min(max(1, taps.top_k), model.head.outs)
        found = np.empty(count * (keep + 1), np.int32)
        logits = np.empty((count, model.head.outs), np.float32) if taps.logits else None
        at = found.__array_interface__["data"][0]
        start = None if batch.vectors is None else np.ascontiguousarray(batch.vectors[1], self.dtype)
        states = np.empty((rows, spec.hidden), self.dtype) if taps.hidden else None
        into = (None if one is None else address(one) for one in (logits, start, states))
        self._call("rd_pass", model, given, adapters, keep, at, *into)
        hidden = {} if states is None else {last: states}
        return ForwardResult(found[:count], found[count:].reshape(count, keep) if taps.top_k else None, logits, hidden)

    def _whole(self, spec: ModelSpec, weights: Weights, pool: NumpyPool) -> abi.Model | None:
        """A model in the form of the kernels; None if they cannot run all of it."""
        key = id(weights), id(pool)
        if key not in self._wholes:
            self._wholes[key] = self._made(spec, weights, pool)
            for one in (weights, pool):
                weakref.finalize(one, self._wholes.pop, key, None)
        return self._wholes[key]

    def _made(self, spec: ModelSpec, weights: Weights, pool: NumpyPool) -> abi.Model | None:
        head, norm, embed, model = weights.head, weights.final_norm, weights.embed, self._model(spec)
        plain = isinstance(embed, np.ndarray) and embed.dtype == self.dtype and embed.flags.c_contiguous
        rows = address(embed) if plain else None
        if not isinstance(head, Packed) or weights.positions is not None or not (rows or isinstance(embed, Packed)):
            return None
        segment = self._segment(spec, weights, model)
        if segment is None:
            return None
        return abi.Model(
            segment, len(segment), norm.weight.size, rows, address(norm.weight),
            None if norm.bias is None else address(norm.bias), head.c, model.rotaries, self._pool_of(pool, "", model.pool),
            spec.final_norm.eps, float(self.dtype.type(spec.embed_scale)), int(spec.final_norm.kind == "rms"), self.kind,
            KINDS[norm.weight.dtype],
        )  # fmt: skip

    def _segment(self, spec: ModelSpec, weights: Weights, model: NativeModel) -> Any:
        """All layers in the form of the kernels, made once for each model; None if a weight of a layer is not packed."""
        if id(weights) not in self._segments:
            layers = [self._layer(layer, own, model) for layer, own in zip(spec.layers, weights.layers, strict=True)]
            found = [layer for layer in layers if layer is not None]
            self._segments[id(weights)] = (abi.Layer * len(layers))(*found) if len(found) == len(layers) else None
            weakref.finalize(weights, self._segments.pop, id(weights), None)
        return self._segments[id(weights)]

    def _layer(self, layer: LayerSpec, own: LayerWeights, model: NativeModel) -> abi.Layer | None:
        mixer, forward = layer.mixer, _feed_forward(layer.mlp, own, self.dtype)
        if forward is None or not isinstance(own.qkv, Packed) or not isinstance(own.out, Packed):
            return None
        assert isinstance(mixer, Attention)
        *parts, activation = forward

        norms = own.attn_norm, own.mlp_norm, own.attn_post_norm, own.mlp_post_norm, own.q_norm, own.k_norm
        kinds = {KINDS[norm.weight.dtype] for norm in norms if norm is not None}
        if len(kinds) != 1 or any(norm is not None and norm.bias is not None for norm in norms[2:]):
            return None

        def at(norm: NormWeights | None, bias: bool = False) -> int | None:
            found = None if norm is None else norm.bias if bias else norm.weight
            return None if found is None else address(found)

        before, after, heads = layer.norm or Norm(), layer.post_norm or Norm(), mixer.qk_norm or Norm()
        return abi.Layer(
            own.qkv.c, own.out.c, *parts,
            at(norms[0]), at(norms[0], True), at(norms[1]), at(norms[1], True), *map(at, norms[2:]),
            _heads(mixer, model, own.sink_logits), before.eps, heads.eps, after.eps, layer.residual,
            *(int(norm.kind == "rms") for norm in (before, heads, after)),
            int(mixer.norm_heads_together), int(mixer.norm_heads_apart), int(layer.parallel), *kinds, activation,
        )  # fmt: skip

    def head(self, x: Floats, weights: Weights, final: Norm, plan: NativePlan, taps: Taps) -> ForwardResult:  # type: ignore[override]
        head, norm, wanted, x = weights.head, weights.final_norm, plan.batch.logit_rows, np.ascontiguousarray(x)
        if not isinstance(head, Packed) or taps.logits:
            rows = x if len(wanted) == x.shape[0] else x[wanted]
            return self._result(self.logits(self.norm(rows, norm, final), head), taps)
        count, keep = len(wanted), min(max(1, taps.top_k), head.outs)
        found = np.empty(count * (keep + 1), np.int32)
        likeliest, best = found[:count], found[count:].reshape(count, keep)
        if count:
            bias, gains = None if norm.bias is None else address(norm.bias), KINDS[norm.weight.dtype]
            how = address(norm.weight), bias, final.eps, int(final.kind == "rms"), gains
            at: int = found.ctypes.data
            self._call("rd_head", self._rows(x), *how, head.c, wanted.tobytes(), count, keep, at + 4 * count, at)
        return ForwardResult(likeliest, best if taps.top_k else None)

    @staticmethod
    def _result(logits: Floats, taps: Taps) -> ForwardResult:
        if not taps.top_k:
            return ForwardResult(argmax(logits), None, logits if taps.logits else None)
        top_k = best_first(logits, taps.top_k)  # its first is the largest, and argmax would take as long again
        largest = logits[np.arange(len(top_k)), top_k[:, 0]]
        likeliest = np.where(largest < np.inf, top_k[:, 0], np.int32(-1))
        return ForwardResult(likeliest, top_k, logits if taps.logits else None)

    def _rows(self, x: Floats) -> abi.Rows:
        return abi.Rows.of(x, self.kind)

    def _call(self, name: str, *arguments: Any) -> None:
        began = perf_counter()
        failed = getattr(self.c, name)(*arguments)
        self.inside += perf_counter() - began
        if failed:
            raise MemoryError(f"{name}: out of memory") if failed == 1 else RuntimeError(f"{name}: invalid arguments")


def _lanes(lanes: list[NDArray[Any]], kept: list[Any]) -> int:
    """The address of the addresses of lanes. kept: gets the memory."""
    lines = np.array([address(lane) for lane in lanes], np.int64)
    kept += [lanes, lines]
    return address(lines)


def _heads(layer: Attention, model: NativeModel, sink_logits: Any) -> abi.Heads:
    """sink_logits must live as long as the result."""
    rotary, logits = -1 if layer.rotary is None else model.turns[id(layer.rotary)], None
    if sink_logits is not None:
        assert sink_logits.dtype == np.float32 and sink_logits.flags.c_contiguous
        logits = address(sink_logits)
    return abi.Heads(layer.heads, layer.window or 0, rotary, layer.score_scale, layer.softcap or 0.0, logits)


def _feed_forward(mlp: Mlp | Experts, own: LayerWeights, dtype: np.dtype[Any]) -> tuple[Any, ...] | None:
    """up, down, experts and activation of abi.Layer; None if the kernels cannot run them."""
    if isinstance(mlp, Experts):
        mixture = _mixture(mlp, own, dtype)
        return None if mixture is None else (abi.Linear(), abi.Linear(), ctypes.pointer(mixture), abi.ACTIVATIONS["none"])
    plain = _mlp(mlp, own.up, own.down)
    return None if plain is None else (*plain, None, abi.ACTIVATIONS[mlp.activation])


def _mlp(mlp: Mlp, up: LinearWeights | None, down: LinearWeights | None) -> tuple[abi.Linear, abi.Linear] | None:
    """up and down in the form of the kernels; None if these cannot run them."""
    if not isinstance(up, Packed) or not isinstance(down, Packed) or mlp.activation not in abi.ACTIVATIONS:
        return None
    same = mlp == Mlp(mlp.hidden, mlp.activation, mlp.gated, mlp.bias) and bool(up.c.gated) == mlp.gated  # no fields beside these
    return (up.c, down.c) if same else None


def _mixture(experts: Experts, own: LayerWeights, dtype: np.dtype[Any]) -> abi.Experts | None:
    """A mixture in the form of the kernels; None if these cannot run it."""
    mlp, shared, kind = experts.mlp, experts.shared, KINDS[dtype]
    known = Experts(experts.count, experts.top_k, mlp, experts.renormalise, shared, experts.gated, experts.router_bias)
    limit = math.inf if mlp.limit is None else float(dtype.type(mlp.limit))
    unlimited = replace(mlp, limit=None, shift=0.0)
    pairs = [_mlp(unlimited, up, down) for up, down in zip(own.experts_up, own.experts_down, strict=True)]
    pairs += [] if shared is None else [_mlp(shared, own.shared_up, own.shared_down)]
    found = [pair for pair in pairs if pair is not None]
    plain = [own.router, *([own.shared_gate] if experts.gated else [])]
    rows = [part.c for part in plain if isinstance(part, Packed) and part.c.kind == kind]
    forms = {tuple((c.kind, c.group, c.outliers) for c in pair) for pair in found[: experts.count]}
    if experts != known or len(found) < len(pairs) or len(rows) < len(plain) or len(forms) > 1:
        return None
    ups, downs = ((abi.Linear * len(found))(*part) for part in zip(*found, strict=True))
    return abi.Experts(
        ups, downs, rows[0], rows[1] if experts.gated else abi.Linear(), experts.count, experts.top_k, experts.renormalise,
        shared is not None, abi.ACTIVATIONS[mlp.activation], 0 if shared is None else abi.ACTIVATIONS[shared.activation],
        limit, mlp.shift,
    )  # fmt: skip


def _of_outputs(arranged: Numbers) -> Numbers:
    """[panels, n, 64] -> [panels * 64, n]"""
    return _flat(arranged.swapaxes(1, 2))


def _flat(x: Numbers) -> Numbers:
    """The first two dimensions as one."""
    return x.reshape(-1, *x.shape[2:])
