"""Where the rows of a step are written and which slots they see, as index arrays in NumPy for the backends that read pages by unit."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from redraft.core.batch import Batch
from redraft.core.sequence import Lanes
from redraft.core.spec import ModelSpec, Rotary
from redraft.core.view import Far, Parallel, View, Watch, Window
from redraft.errors import Unsupported
from redraft.ops.arrays import cast, device, namespace, total
from redraft.ops.backend import WeightSums
from redraft.ops.format import PAGE


@dataclass
class Writer:
    """Where to write the rows of sequences that are attended alone, for one format: rows i64[n]; units, offsets i64[L, n, K]."""

    format: str
    rows: Any
    units: Any
    offsets: Any


@dataclass
class LoneSequence:
    """A sequence that is attended alone. If all lanes are equal, lengths and where are [1, 1, ...] instead of [L, K, ...].

    encoded, units: i64[L, K, m] and i64[L, K, n], the units of 32 (m + n) slots; lengths: i64[L, K, 1] committed slots; at: i64[R],
    positions of the rows; where: i64[L, K, slots], positions of the slots, None if not needed; tail: bool[R, 2 + tail], the slots of the
    tail that rows see, after a column for committed slots (True) and before a column for padding (False); window: None if it hides nothing
    in this step; far: None if no row of this step has a far key; parallel: None if no row of it attends a group; logs: f32[L, K, slots],
    the logarithms of the numbers of tokens that slots stand for, None if all are 0; near: the number of leading slots that contain all
    sinks to score with rotated queries; deepest: the largest position of a row; chain: chain rows of this step; first: the first watched
    row; last: i64[R], the last committed slot that each row sees, None for all; masks, turns, far_turns: caches shared by layers, far_turns
    for the keys of a lane and for the queries.
    """

    place: int
    rows: slice
    view: View
    encoded: Any
    units: Any
    lengths: Any
    at: Any
    where: Any | None
    tail: Any
    window: Window | None
    far: Far | None
    parallel: Parallel | None
    logs: Any | None
    near: int
    deepest: int
    chain: int
    watches: tuple[Watch, ...]
    first: int
    seen: WeightSums
    last: Any | None = None
    masks: dict[int | None, Any] = field(default_factory=dict)
    turns: dict[Rotary, tuple[Any, Any]] = field(default_factory=dict)
    far_turns: dict[tuple[Rotary, int], tuple[tuple[Any, Any], tuple[Any, Any]]] = field(default_factory=dict)

    @property
    def slots(self) -> int:
        return PAGE * (int(self.encoded.shape[2]) + int(self.units.shape[2]))


def writers(batch: Batch, lone: list[int], layers: int, heads: int) -> list[Writer]:
    """Where the rows of these sequences are written, for each format."""
    view = batch.pages
    of: dict[str, list[tuple[NDArray[np.integer], ...]]] = {}
    for s in lone:
        a, z = int(batch.starts[s]), int(batch.starts[s + 1])
        own = view.slots[s]
        slot = view.lengths[s][:, None] + view.tail[s] + np.arange(z - a) if own is None else np.tile(own, (len(view.lengths[s]), 1))
        pages = np.take_along_axis(view.pages[s], slot // PAGE - view.encoded[s].shape[1], 1)
        parts = units_of(pages, view.kinds[s], layers, heads), by_head(slot % PAGE, view.kinds[s], layers, heads)
        name = "" if (chosen := batch.views[s]) is None else chosen.format
        of.setdefault(name, []).append((np.arange(a, z), *(part.swapaxes(1, 2) for part in parts)))
    made = []
    for name, found in of.items():
        rows, units, offsets = zip(*found, strict=True)
        made.append(Writer(name, np.concatenate(rows), np.concatenate(units, 1), np.concatenate(offsets, 1)))
    return made


def alone(batch: Batch, s: int, spec: ModelSpec, watches: tuple[Watch, ...], first: int) -> LoneSequence:
    """What one sequence of a batch sees. first: its first row in `batch.visible`."""
    layers, heads, pages, chosen = len(spec.attention), spec.kv_heads, batch.pages, batch.views[s] or View()
    a, t, z = int(batch.starts[s]), int(batch.tree_starts[s]), int(batch.starts[s + 1])
    kind, lengths, chain, rows = pages.kinds[s], pages.lengths[s].astype(np.int64), pages.chain[s], t - a
    at, tail, again = batch.positions[a:z].astype(np.int64), pages.tentative(s, z - a), pages.slots[s]
    see = np.zeros((z - a, tail + 2), bool)
    see[:, 0] = True
    if again is None:
        see[:rows, 1 : rows + 1] = np.tri(rows, dtype=bool)
        see[rows:, 1 : chain + 1] = True
        see[rows:, chain + 1 : -1] = tree_bits(batch, first, z - t, tail - chain)
    deepest = int(at.max())
    window = chosen.window if chosen.window and deepest + 1 > chosen.window.size else None  # in force
    windows = window is not None or any(layer.window is not None and layer.window <= deepest for layer in spec.attention)
    far = chosen.far if chosen.far is not None and deepest >= chosen.far.near else None
    parallel = chosen.parallel if chosen.parallel is not None and deepest >= chosen.parallel.end else None
    located = windows or chosen.read is not None or far is not None or parallel is not None  # positions are needed
    positions = pages.positions[s] if located else None
    # lanes need separate entries only if their lengths or needed positions differ
    given, some = pages.logs[s], window is not None and window.heads is not None
    apart = some or len(set(lengths.tolist())) > 1 or ((positions is not None or given is not None) and kind != Lanes.SHARED)
    held = -(-(lengths + tail) // PAGE) - pages.encoded[s].shape[1]
    inside = np.arange(held.max()) < held[:, None]
    # padding must point at memory that this sequence owns
    table = np.where(inside, pages.pages[s][:, : held.max()], pages.pages[s][:, :1])
    slots = PAGE * (pages.encoded[s].shape[1] + table.shape[1])
    where, near = np.zeros((len(lengths) if apart else 1, slots if located else 0), np.int64), 0
    if located:
        for lane, (line, n) in enumerate(zip(where, lengths.tolist(), strict=False)):
            line[:n] = np.arange(n) if positions is None else positions[lane]
            line[n : n + tail] = batch.tails[s]
            if window is not None and window.turned and (line[: n + tail] < window.sinks).any():
                near = max(near, 1 + int(np.flatnonzero(line[: n + tail] < window.sinks)[-1]))
    logs = None if given is None else np.zeros((len(lengths) if apart else 1, slots), np.float32)
    if given is not None and logs is not None:
        for line, own in zip(logs, given, strict=False):
            line[: len(own)] = own
    head, own_kind = ((layers, heads), kind) if apart else ((1, 1), Lanes.SHARED)
    since = min((watch.since for watch in watches), default=0)
    shape = layers, heads, int(lengths.max()) + tail
    return LoneSequence(
        place=s, rows=slice(a, z), view=chosen,
        encoded=units_of(pages.encoded[s], kind, layers, heads), units=units_of(table, kind, layers, heads),
        lengths=by_head(lengths[:, None] if apart else lengths[:1, None], own_kind, *head), at=at,
        where=by_head(where, own_kind, *head) if located else None, tail=see, window=window, far=far, parallel=parallel,
        logs=None if logs is None else by_head(logs, own_kind, *head), near=near, deepest=deepest, chain=rows, watches=watches,
        first=min(max(0, since - int(at[0])), rows), last=None if again is None else again.astype(np.int64),
        seen=WeightSums(np.zeros(chain_shape(watches, rows, shape)), np.zeros((len(watches), z - t, *shape))),
    )  # fmt: skip


def chain_shape(watches: tuple[Watch, ...], rows: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of WeightSums.chain. rows: chain rows of the step; shape: (L, K, slots)."""
    each = {watch.each for watch in watches}
    assert len(each) < 2, "watches of one sequence add up chain rows, or none of them does"
    return (len(watches), rows, *shape) if True in each else (len(watches), *shape)


def grouped(index: int, scores: Any, picked: Any, it: LoneSequence) -> Any:
    """scores [K, G, R, slots] of the last R rows in layer `index`, changed for the keys that rows attend as a group. picked: bool
    [K or 1, G or 1, R, slots], the slots that rows read."""
    assert it.parallel is not None and it.where is not None
    xp, (spans, temperature, scale) = namespace(scores), it.parallel
    where = it.where[index if len(it.where) > 1 else 0][:, None, None]
    inside = where < 0
    for first, end in spans:
        inside = inside | ((where >= first) & (where < end))
    own = picked & inside & (it.at[-scores.shape[2] :, None] >= it.parallel.end)
    scores_of_group = scores / temperature
    shown = xp.where(own, scores_of_group, xp.asarray(-math.inf, dtype=scores.dtype, device=device(scores)))
    some = xp.any(own, axis=-1, keepdims=True)  # rows with a group; the others get 0
    most = xp.where(some, xp.max(shown, axis=-1, keepdims=True), xp.asarray(0.0, dtype=scores.dtype, device=device(scores)))
    logs = most + xp.log(total(xp.exp(shown - most)) + cast(~some, scores.dtype))
    return xp.where(own, scores_of_group + (scale * temperature - 1) * logs, scores)


def note(index: int, weights: Any, seen: Any, it: LoneSequence) -> None:
    """Adds the watched statistics of weights [K, G, R, slots] and bool seen [K or 1, R, slots] of the last R rows, in layer `index`."""
    xp, width, chain = namespace(weights), it.seen.nodes.shape[-1], it.chain - it.first
    weights, seen = weights[..., :width], seen[..., :width]
    for i, watch in enumerate(it.watches):
        own = weights
        if watch.heads is not None:
            counts = np.array(watch.heads[index]).reshape(*weights.shape[:2], 1, 1)
            own = own * xp.asarray(counts, dtype=own.dtype, device=device(own))
        slots = xp.sum(seen, axis=-1, keepdims=True)
        match watch.statistic:
            case "mass":
                found = xp.mean(own, axis=1)
            case "low":
                found = seen & (xp.mean(own, axis=1) < cast(1 / slots, own.dtype))
            case "above":
                found = seen & (xp.max(own, axis=1) > cast(watch.threshold / slots, own.dtype))
            case _:
                raise Unsupported(unknown(watch.statistic))
        found = cast(found, it.seen.chain.dtype) * cast(it.at[it.first :] >= watch.since, it.seen.chain.dtype)[:, None]
        if watch.each:
            it.seen.chain[i, it.first : it.chain, index] = found[:, :chain].swapaxes(0, 1)
        else:
            it.seen.chain[i, index] = xp.sum(found[:, :chain], axis=1)
        it.seen.nodes[i, :, index] = found[:, chain:].swapaxes(0, 1)


STATISTICS = "mass", "low", "above"  # of attention weights; see Watch


def unknown(statistic: str) -> str:
    return f"attention statistic {statistic!r} is unknown; use {', '.join(STATISTICS)}"


def tree_rows(batch: Batch) -> list[int]:
    """The first row of each sequence in `batch.visible`, and the end."""
    ends: list[int] = np.cumsum(batch.starts[1:] - batch.tree_starts).tolist()
    return [0, *ends]


def tree_bits(batch: Batch, first: int, rows: int, nodes: int) -> NDArray[np.bool_]:
    """bool[rows, nodes]: the ancestors of tree rows from `first` on."""
    own = batch.visible[first : first + rows]
    return np.unpackbits(own.astype("<u8").view(np.uint8), axis=1, bitorder="little")[:, :nodes].astype(bool)


def units_of(pages: NDArray[np.integer], kind: Lanes, layers: int, heads: int) -> NDArray[np.int64]:
    """The units i64[L, K, n] of pages [lanes, n]."""
    own = np.arange(layers * heads).reshape(layers, heads, 1)
    match kind:
        case Lanes.SHARED:
            return pages.astype(np.int64) * (layers * heads) + own
        case Lanes.PER_LAYER:
            return pages.astype(np.int64)[:, None] * heads + own[:1]
    return pages.astype(np.int64).reshape(layers, heads, -1)


def by_head(lanes: NDArray[Any], kind: Lanes, layers: int, heads: int) -> NDArray[Any]:
    """[lanes, n] -> [L, K, n]"""
    apart = {Lanes.SHARED: (1, 1), Lanes.PER_LAYER: (layers, 1), Lanes.PER_HEAD: (layers, heads)}[kind]
    return np.broadcast_to(lanes.reshape(*apart, -1), (layers, heads, lanes.shape[1]))
