"""NumPy on the CPU, without compiled kernels and without PyTorch: slow, for any machine.

It computes in float32 or better and rounds each operation once. It is bit-exact: a sum of products is an einsum, which adds the products
of an element in one order whatever the number of rows, and not a matrix product of a BLAS library; attention adds the terms of a row in
slot order, so slots that the row does not see change nothing; norms reduce rows of one length; exp, tanh and other functions give an
element the same bits at every place of an array (tests/ops/test_numpy.py checks this on the machine that runs it). Matrix products of
quantized weights are exact sums of integers. One thread computes.

Every sequence is attended alone, with the index arrays of ops/places.py. A sparse read selects slots, but all are multiplied. Weights may
be tensors of PyTorch, whose memory is then shared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from redraft.core.batch import Batch
from redraft.core.noise import draw
from redraft.core.sequence import Space
from redraft.core.spec import Attention, Experts, ModelSpec, Norm, Rotary
from redraft.core.taps import NO_TAPS, Taps
from redraft.core.tree import F64, I32, I64
from redraft.core.view import Far
from redraft.errors import Unsupported
from redraft.ops import places
from redraft.ops.arrays import Numbers, array, cast, dots, mixed, numpy_dtype, total, wide, widened
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
from redraft.ops.library import PORTABLE_DTYPES
from redraft.ops.numpy_pool import FormatStore, NumpyPool, lines
from redraft.ops.places import LoneSequence, Writer, tree_rows
from redraft.ops.quantized import Quantized, product

Floats = Any  # an array of numbers of the backend's dtype or better
BLOCK = 1 << 17  # numbers of a weight that are widened and multiplied at once; they fit into a cache

PageSource = tuple[PageCodec, Arrays, int]  # the codec, the arrays [K, units, ...] and the number of units of pages of one format


@dataclass
class NumpyPlan:
    """A step of T rows. tokens, positions: i64[T]; logit_rows: i64[R], the rows with logits; writers: where the rows are written; lone: the
    sequences; turns: cos and sin of each rotary, for all rows."""

    tokens: I64
    positions: I64
    logit_rows: I64
    writers: list[Writer]
    lone: list[LoneSequence]
    turns: dict[Rotary, tuple[Floats, Floats]] = field(default_factory=dict)


class NumpyOps:
    """The NumPy backend; see NumpyPool for the memory layout."""

    name = "numpy"
    features: frozenset[Feature] = frozenset({Feature.PER_LAYER, Feature.PER_HEAD, Feature.BIT_EXACT})
    mixers: frozenset[type] = frozenset({Attention})

    def __init__(self, dtype: Any = np.float32, device: Any = "cpu") -> None:
        """dtype: of NumPy or PyTorch, or its name."""
        name = dtype.__name__ if isinstance(dtype, type) else str(dtype).removeprefix("torch.")
        if name not in PORTABLE_DTYPES or str(device) != "cpu":
            raise Unsupported(f"backend 'numpy' computes in {', '.join(PORTABLE_DTYPES)} on the CPU only, not {name} on {device}")
        self.dtype: np.dtype[Any] = numpy_dtype(name)
        self.device = "cpu"

    def mode(self) -> np.errstate:
        return np.errstate(all="ignore")

    def block_bytes(self, spec: ModelSpec) -> int:
        return len(spec.attention) * spec.kv_heads * 2 * PAGE * spec.head_dim * self.dtype.itemsize

    def allocate(self, spec: ModelSpec, blocks: int, room: Room | None = None) -> NumpyPool:
        # not zeroed, because each page is zeroed when it is allocated, and untouched memory costs nothing
        shape = blocks, len(spec.attention), spec.kv_heads, 2, PAGE, spec.head_dim
        held = lines(shape, self.dtype) if room is None else room(blocks * self.block_bytes(spec)).view(self.dtype).reshape(shape)
        pool = NumpyPool(held, spec)
        self.define(pool, Format("", plain(self.dtype, spec.head_dim)))
        return pool

    def define(self, pool: NumpyPool, fmt: Format) -> int:
        pool.formats[fmt.name] = FormatStore(pool.data, fmt)
        return pool.formats[fmt.name].per_block

    def zero(self, pool: NumpyPool, pages: list[tuple[Space, int]]) -> None:
        for space, page in pages:
            if space == Space():
                pool.data[page] = 0  # one piece of memory
            else:
                stored = pool.formats[space.format]
                stored.bytes[stored.at(pool.units(space, np.array([page], np.int32)))] = 0

    def move(self, pool: NumpyPool, space: Space, src: I32, dst: I32, delta: int = 0) -> None:
        assert not delta or space == Space(), f"{space}: keys are rotated in plain shared pages only"
        stored = pool.formats[space.format]
        here, there = pool.units(space, src // PAGE), pool.units(space, dst // PAGE)
        of, to = (src % PAGE)[:, None], (dst % PAGE)[:, None]
        for name, held in stored.arrays.items():
            if not stored.format.arrays[name].whole:
                got = held[(*stored.at(here), of)]  # a copy: all are read before any is written
                if delta and name == "keys":
                    got = self._turned_keys(got, pool.spec, delta)
                held[(*stored.at(there), to)] = got

    def _turned_keys(self, got: Floats, spec: ModelSpec, delta: int) -> Floats:
        """Keys [moves, L * K, D], rotated by `delta` positions."""
        keys = got.reshape(len(got), len(spec.attention), -1, got.shape[-1])
        for i, layer in enumerate(spec.attention):
            if layer.rotary is not None:
                turns = self._turns(layer.rotary, np.array([delta]), [1.0] * len(layer.rotary.frequencies))
                keys[:, i] = _turn(keys[:, i], *turns)
        return keys.reshape(got.shape)

    def read(self, pool: NumpyPool, space: Space, pages: I32) -> Arrays:
        if space == Space():
            return {"page": pool.data[pages]}  # one piece of memory each
        return self.contents(pool, space, pages)

    def contents(self, pool: NumpyPool, space: Space, pages: I32) -> Arrays:
        stored = pool.formats[space.format]
        return stored.take(stored.arrays, pool.units(space, pages))

    def write(self, pool: NumpyPool, space: Space, pages: I32, arrays: Arrays) -> None:
        if space == Space():
            pool.data[pages] = arrays["page"]
        else:
            pool.formats[space.format].put(arrays, pool.units(space, pages))

    def encode(self, pool: NumpyPool, source: Space, target: Space, src: I32, dst: I32, lanes: I32) -> None:
        old, new = pool.formats[source.format], pool.formats[target.format]
        here, there = pool.units(source, src).ravel(), pool.units(target, dst).ravel()
        new.put(new.codec.pack(*old.codec.decode(old.take(old.codes, here)), lanes), there)
        new.put(old.take([name for name in new.arrays if name not in new.codes and name in old.arrays], here), there)

    def summarize(self, pool: NumpyPool, space: Space, pages: I32, read: Select) -> None:
        stored, units = pool.formats[space.format], pool.units(space, pages).ravel()
        stored.put(read.summarize(stored.codec.decode(stored.take(stored.codes, units))[0]), units)

    # ---- the plan

    def plan(self, batch: Batch, spec: ModelSpec, taps: Taps = NO_TAPS) -> NumpyPlan:
        every, first = list(range(len(batch.tree_starts))), tree_rows(batch)
        lone = [self._alone(batch, s, spec, taps.attention.get(s, ()), first[s]) for s in every]
        writers = self._writers(batch, every, len(spec.attention), spec.kv_heads)
        tokens, positions, logit_rows = (x.astype(np.int64) for x in (batch.tokens, batch.positions, batch.logit_rows))
        return NumpyPlan(tokens, positions, logit_rows, writers, lone)

    def _writers(self, batch: Batch, lone: list[int], layers: int, heads: int) -> list[Writer]:
        return places.writers(batch, lone, layers, heads)

    def _alone(self, batch: Batch, s: int, spec: ModelSpec, watches: tuple[Any, ...], first: int) -> LoneSequence:
        return places.alone(batch, s, spec, watches, first)

    # ---- the operations

    @property
    def threads(self) -> int:
        return 1

    def use_threads(self, count: int) -> None:
        if count != 1:
            raise Unsupported(f"threads = {count}: backend 'numpy' computes with one thread")

    def draw(self, key: int, ids: I64, values: F64) -> int:
        return draw(key, ids, values)

    def place(self, given: Any) -> Any:
        return array(given)

    def pack(self, weights: LinearWeights, gated: bool = False) -> LinearWeights:
        """Arrays, with the memory of tensors of PyTorch."""
        if isinstance(weights, Quantized):
            halved = weights.halved()
            held: dict[str, Any] = {name: array(part) for name, part in halved.arrays.items()}
            return replace(halved, **held)
        assert isinstance(weights, Linear)
        own: list[Any] = [None if part is None else np.ascontiguousarray(cast(array(part), self.dtype)) for part in weights]
        return Linear(*own)

    def embed(self, weights: Weights, plan: NumpyPlan) -> Floats:
        x = self.rows(weights.embed, plan.tokens)
        return x if weights.positions is None else x + array(weights.positions)[plan.positions]

    def rows(self, table: Any, ids: Numbers) -> Floats:
        found: Floats = array(table)[ids]
        return found

    @np.errstate(all="ignore")
    def norm(self, x: Floats, weights: NormWeights, norm: Norm) -> Floats:
        gains = widened(array(weights.weight))
        rows = np.ascontiguousarray(x, gains.dtype)
        if norm.kind == "layer":
            rows = rows - rows.mean(-1, keepdims=True)
        rows = rows / np.sqrt(np.square(rows).mean(-1, keepdims=True) + gains.dtype.type(norm.eps)) * gains
        if weights.bias is not None:
            rows = rows + array(weights.bias)
        return rows.astype(x.dtype)

    @np.errstate(all="ignore")
    def linear(self, x: Floats, weights: LinearWeights) -> Floats:
        if isinstance(weights, Adapted):
            return array(weights.product(x, self))
        if isinstance(weights, Quantized):
            return array(product(x, weights))
        assert isinstance(weights, Linear), "a weight in the form of another backend"
        weight, bias = array(weights.weight), weights.bias
        outs, ins = weight.shape
        rows, step = np.ascontiguousarray(widened(x)), max(1, BLOCK // ins)
        y = np.empty((len(x), outs), rows.dtype)
        for at in range(0, outs, step):
            y[:, at : at + step] = dots(rows, cast(weight[at : at + step], rows.dtype))
        if bias is not None:
            y += array(bias)
        return y.astype(x.dtype, copy=False)

    def logits(self, x: Floats, head: LinearWeights) -> Floats:
        return self.linear(x, head)

    def add_low_rank(self, y: Floats, x: Floats, rows: Any, term: LowRank) -> None:
        own, a, b = array(rows), array(term.a), array(term.b)
        added = mixed(dots(widened(x[own]), widened(a)), widened(b))
        part = y[:, term.first : term.first + b.shape[1]]
        part[own] = (widened(part[own]) + added).astype(y.dtype)

    @np.errstate(all="ignore")
    def activate(self, x: Floats, activation: str, gated: bool) -> Floats:
        half = x.shape[-1] // 2 if gated else x.shape[-1]
        gate, up = widened(x[..., :half]), widened(x[..., half:])
        match activation:
            case "silu":
                out = gate * _sigmoid(gate)
            case "gelu":
                exact = gate.astype(np.float64)
                out = (0.5 * exact * (1 + _erf(exact / math.sqrt(2)))).astype(gate.dtype)
            case "gelu_tanh":
                inner = gate + 0.044715 * gate * gate * gate
                out = gate * _sigmoid(2 * math.sqrt(2 / math.pi) * inner)  # sigmoid(2 y) = (1 + tanh(y)) / 2
            case "quick_gelu":
                out = gate * _sigmoid(1.702 * gate)
            case "relu":
                out = np.maximum(gate, 0)
            case "sigmoid":
                out = _sigmoid(gate)
            case _:
                raise Unsupported(f"activation {activation!r}")
        return (out * up if gated else out).astype(x.dtype, copy=False)

    def rope(self, x: Floats, layer: Attention, plan: NumpyPlan) -> Floats:
        rotary = layer.rotary
        if rotary is None:
            return x
        if rotary not in plan.turns:
            cos, sin = self._turns(rotary, plan.positions, rotary.scales)
            plan.turns[rotary] = cos[:, None], sin[:, None]
        return _turn(x, *plan.turns[rotary])

    def _turns(self, rotary: Rotary, positions: I64, scales: Seq[float]) -> tuple[Floats, Floats]:
        """cos and sin [T, dim / 2] of the pairs of a head, times the scale of each pair; the angles are in float64."""
        angles = positions.astype(np.float64)[:, None] * np.array(rotary.frequencies, np.float64)
        factors = np.array(scales, np.float64)
        return (np.cos(angles) * factors).astype(wide(self.dtype)), (np.sin(angles) * factors).astype(wide(self.dtype))

    @np.errstate(all="ignore")
    def attend(
        self,
        index: int,
        layer: Attention,
        q: Floats,
        k: Floats,
        v: Floats,
        pool: NumpyPool,
        plan: NumpyPlan,
        sink_logits: Any = None,
    ) -> Floats:
        out = np.empty((len(q), layer.heads * layer.head_dim), q.dtype)
        self._attend_lone(index, layer, q, k, v, out, pool, plan.lone, plan.writers, sink_logits)
        return out

    def _attend_lone(
        self,
        index: int,
        layer: Attention,
        q: Floats,
        k: Floats,
        v: Floats,
        out: Floats,
        pool: NumpyPool,
        lone: list[LoneSequence],
        writers: list[Writer],
        sink_logits: Any,
    ) -> None:
        """Attends the rows of these sequences."""
        heads, size = layer.kv_heads, layer.head_dim
        logits = None if sink_logits is None else array(sink_logits)
        for writer in writers:
            self._write(index, k[writer.rows], v[writer.rows], pool.formats[writer.format], writer)
        for it in lone:
            rows = q[it.rows].reshape(-1, heads, layer.heads // heads, size).transpose(1, 2, 0, 3)
            out[it.rows] = self._attend_alone(index, layer, rows, pool, it, logits).transpose(2, 0, 1, 3).reshape(-1, out.shape[1])

    def _dots(self, a: Floats, b: Floats) -> Floats:
        """a [K, R, D] times b [K, n, D], in float32 or better -> [K, R, n]"""
        return np.asarray(dots(a, b))

    def products(self, a: Floats, b: Floats) -> Floats:
        return np.asarray(dots(np.ascontiguousarray(widened(a)), np.ascontiguousarray(widened(b))))

    def watched(self, plan: NumpyPlan) -> Mapping[int, WeightSums]:
        return {it.place: it.seen for it in plan.lone if it.watches}

    def _write(self, index: int, k: Floats, v: Floats, stored: FormatStore, writer: Writer) -> None:
        """Writes k and v [rows, K, D] of layer `index`, with their side data."""
        at, shape = (*stored.at(writer.units[index]), writer.offsets[index]), k.shape[:2]
        made = stored.codec.store(k.reshape(-1, k.shape[-1]), v.reshape(-1, v.shape[-1]))
        entries = {name: entry.reshape(*shape, *entry.shape[1:]) for name, entry in made.items()}
        if stored.format.sides and not stored.exact:  # side data are computed from keys in the form that attention reads
            k = _keys(stored.codec, made).reshape(k.shape)
        for side in stored.format.sides:
            entries |= side.fill(index, k)
        for name, entry in entries.items():
            stored.arrays[name][at] = entry

    def _attend_alone(
        self, index: int, layer: Attention, q: Floats, pool: NumpyPool, it: LoneSequence, sink_logits: Floats | None
    ) -> Floats:
        """q [K, G, R, D] -> the same shape."""
        seen = self._seen(index, layer, it)
        picked = seen[:, None] if it.view.read is None else self._picked(index, q, seen, pool, it)
        sources = self._sources(index, pool, it)
        weights = self._weights(index, layer, q, picked, sources, it, sink_logits)
        heads, share, rows, slots = weights.shape
        out = _mix(sources, weights.reshape(heads, share * rows, slots))
        if it.watches and it.first < rows:
            places.note(index, weights[:, :, it.first :], seen[:, it.first :], it)
        return out.reshape(q.shape).astype(q.dtype)

    def _seen(self, index: int, layer: Attention, it: LoneSequence) -> NDArray[np.bool_]:
        """bool [K or 1, R, slots]: the slots that rows see."""
        reach = None if layer.window is None or it.deepest < layer.window else layer.window
        if reach in it.masks and len(it.lengths) == 1:
            return np.asarray(it.masks[reach])
        lane = index if len(it.lengths) > 1 else 0
        column = np.clip(np.arange(it.slots) - it.lengths[lane] + 1, 0, it.tail.shape[1] - 1)
        seen = it.tail[:, column].transpose(1, 0, 2)
        if it.last is not None:
            seen = seen & (np.arange(it.slots) <= it.last[:, None])
        if it.where is not None:
            where = it.where[lane][:, None]
            distance = it.at[:, None] - where
            if reach is not None:
                seen = seen & (distance < reach)
            if it.window is not None:
                inside = (where < it.window.sinks) | (distance < it.window.recent)
                if it.window.heads is not None:
                    inside = inside | ~np.array(it.window.heads[index])[:, None, None]
                seen = seen & inside
        it.masks[reach] = seen
        return np.asarray(seen)

    def _picked(self, index: int, q: Floats, seen: NDArray[np.bool_], pool: NumpyPool, it: LoneSequence) -> NDArray[np.bool_]:
        """bool [K, G or 1, R, slots]: the slots that `read` selects."""
        read: Any = it.view.read
        stored, heads = pool.formats[it.view.format], len(q)
        names = list(read.arrays(q.shape[-1], self.dtype))
        held = stored.take(names, it.units[index])
        if it.encoded.size:
            front = pool.formats[it.view.encoded].take(names, it.encoded[index])
            held = {name: np.concatenate([front[name], held[name]], 1) for name in names}
        assert it.where is not None
        where = it.where[index if len(it.where) > 1 else 0]
        seen, where = np.broadcast_to(seen, (heads, *seen.shape[1:])), np.broadcast_to(where, (heads, where.shape[-1]))
        return np.asarray(read.select(index, q, held, seen, where, it.at, self.products))

    def _sources(self, index: int, pool: NumpyPool, it: LoneSequence) -> list[PageSource]:
        found = [(it.view.encoded, it.encoded[index])] if it.encoded.size else []
        formats = [(pool.formats[name], units) for name, units in [*found, (it.view.format, it.units[index])]]
        return [(stored.codec, stored.take(stored.codes, units), units.shape[1]) for stored, units in formats]

    def _weights(
        self,
        index: int,
        layer: Attention,
        q: Floats,
        picked: NDArray[np.bool_],
        sources: list[PageSource],
        it: LoneSequence,
        sink_logits: Floats | None,
    ) -> Floats:
        """Attention weights [K, G, R, slots], in float32 or better."""
        heads, share, rows, size = q.shape
        q = widened(q)
        scores = _scores(sources, q.reshape(heads, -1, size), it.slots // PAGE)
        if it.near and layer.rotary is not None:
            assert it.window is not None and it.where is not None
            if layer.rotary not in it.turns:
                gone = np.maximum(it.at + 1 - it.window.size, 0)
                ones = [1.0] * len(layer.rotary.frequencies)  # q already has the scales of its rotary
                it.turns[layer.rotary] = self._turns(layer.rotary, -gone, ones)
            far = _turn(q, *it.turns[layer.rotary]).reshape(heads, -1, size)
            turned = _scores(sources, far, -(-it.near // PAGE))
            near = turned.shape[-1]
            sinks = it.where[index if len(it.where) > 1 else 0][:, None, :near] < it.window.sinks
            if it.window.heads is not None:
                sinks = sinks & np.array(it.window.heads[index])[:, None, None]
            scores[..., :near] = np.where(sinks, turned, scores[..., :near])
        if it.far is not None and layer.rotary is not None:
            scores = self._with_far(index, layer.rotary, it.far, q, scores, sources, it)
        scores = scores.reshape(heads, share, rows, -1) * scores.dtype.type(layer.score_scale)
        if layer.softcap is not None:
            scores = self.cap(scores, layer.softcap)
        if it.logs is not None:
            scores = scores + it.logs[index if len(it.logs) > 1 else 0][:, None, None].astype(scores.dtype)
        if it.parallel is not None:
            scores = places.grouped(index, scores, picked, it)
        sinks = None if sink_logits is None else sink_logits.reshape(heads, share, 1, 1).astype(scores.dtype)
        return _softmax(np.where(picked, scores, scores.dtype.type(-np.inf)), sinks)

    def _with_far(
        self, index: int, rotary: Rotary, far: Far, q: Floats, scores: Floats, sources: list[PageSource], it: LoneSequence
    ) -> Floats:
        """scores [K, G R, slots] with those of far keys at their one distance."""
        heads, share, _, size = q.shape
        assert it.where is not None
        lane = index if len(it.where) > 1 else 0
        where, ones = it.where[lane], [1.0] * len(rotary.frequencies)  # both have the scales of their rotary
        if (rotary, lane) not in it.far_turns:
            back = [part.reshape(*where.shape, -1) for part in self._turns(rotary, -where.ravel(), ones)]
            it.far_turns[rotary, lane] = (back[0], back[1]), self._turns(rotary, far.distance - it.at, ones)
        turns_of_keys, turns_of_rows = it.far_turns[rotary, lane]
        decoded = (widened(array(codec.decode(held)[0])) for codec, held, _ in sources)
        keys = np.concatenate([part.reshape(heads, -1, size) for part in decoded], 1)
        found = self._dots(_turn(q, *turns_of_rows).reshape(heads, -1, size), _turn(keys, *turns_of_keys))
        apart = it.at[:, None] - where[:, None] >= far.near  # [K or 1, R, slots]
        return np.where(np.tile(apart, (1, share, 1)), found, scores)

    def experts(self, x: Floats, weights: LayerWeights, experts: Experts) -> Floats:
        assert weights.router is not None
        share, chosen = self._route(self.linear(x, weights.router), experts)
        out = np.zeros_like(x)
        for e in np.unique(chosen).tolist():
            rows, place = np.nonzero(chosen == e)
            inner = array(limited(self.linear(x[rows], weights.experts_up[e]), experts.mlp))
            inner = self.activate(inner, experts.mlp.activation, experts.mlp.gated)
            out[rows] += self.linear(inner, weights.experts_down[e]) * share[rows, place, None]
        return out

    def _route(self, logits: Floats, experts: Experts) -> tuple[Floats, I64]:
        """The shares of the chosen experts and their indices, both [T, top_k]."""
        chances = _softmax(widened(logits), None)
        chosen = np.argsort(-chances, axis=-1, kind="stable")[:, : experts.top_k]  # of equal ones the lowest expert first
        share = np.take_along_axis(chances, chosen, -1)
        if experts.renormalise:
            share = share / total(share)
        return share.astype(logits.dtype), chosen

    def cap(self, x: Floats, limit: float) -> Floats:
        rows = widened(x)
        return np.asarray(np.tanh(rows / rows.dtype.type(limit)) * rows.dtype.type(limit))

    def head(self, x: Floats, weights: Weights, final: Norm, plan: NumpyPlan, taps: Taps) -> ForwardResult:
        logits: Any = self.logits(self.norm(x[plan.logit_rows], weights.final_norm, final), weights.head)
        top_k = best_first(logits, taps.top_k) if taps.top_k else None
        return ForwardResult(argmax(logits), top_k, logits if taps.logits else None)


def _erf(x: F64) -> F64:
    return np.array([math.erf(number) for number in x.ravel().tolist()]).reshape(x.shape)


def _sigmoid(x: Floats) -> Floats:
    return np.asarray(1 / (1 + np.exp(-x)))


def _softmax(scores: Floats, sink_logits: Floats | None) -> Floats:
    """The weights of scores [..., n]. sink_logits: [..., 1], the score of one more slot, whose weight is left out."""
    largest = scores.max(-1, keepdims=True)
    if sink_logits is not None:
        largest = np.maximum(largest, sink_logits)
    found = np.exp(scores - largest)
    every = total(found)
    return np.asarray(found / (every if sink_logits is None else every + np.exp(sink_logits - largest)))


def _turn(x: Floats, cos: Floats, sin: Floats) -> Floats:
    """x with its leading dimensions rotated: pairs (i, i + n) with cos and sin [..., n]; rounded once."""
    half = cos.shape[-1]
    a, b = widened(x[..., :half]), widened(x[..., half : 2 * half])
    return np.concatenate([(a * cos - b * sin).astype(x.dtype), (b * cos + a * sin).astype(x.dtype), x[..., 2 * half :]], -1)


def _keys(codec: PageCodec, entries: Arrays) -> Any:
    """Entries [m, ...] of per-slot arrays -> keys [m, D] in the form that attention reads. Pads to units, because codecs decode units."""
    held, count = {}, len(next(iter(entries.values())))
    for name, x in entries.items():
        padded: Any = np.zeros((-(-count // PAGE) * PAGE, *x.shape[1:]), x.dtype)
        padded[:count] = x
        held[name] = padded.reshape(-1, PAGE, *x.shape[1:])
    keys = codec.decode(held)[0]
    return keys.reshape(-1, keys.shape[-1])[:count]


def _scores(sources: list[PageSource], q: Floats, units: int) -> Floats:
    """q [K, R, D] -> [K, R, 32 units], for the leading units of all sources."""
    found: list[Any] = []
    for codec, held, count in sources:
        some = min(count, units)
        if some:
            found.append(codec.scores({name: x[:, :some] for name, x in held.items()}, q))
        units -= some
    return np.concatenate(found, -1)


def _mix(sources: list[PageSource], weights: Floats) -> Floats:
    """weights [K, R, slots] -> [K, R, D]"""
    found, at = np.zeros((*weights.shape[:2], 1), weights.dtype), 0
    for codec, held, count in sources:
        part: Any = weights[..., at : at + count * PAGE]
        found, at = found + array(codec.mix(held, part)), at + count * PAGE
    return found
