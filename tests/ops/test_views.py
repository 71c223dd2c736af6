"""The slots that rows see through views: torch_ops and numpy_ops against reference, and all against the definitions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from redraft.core.batch import Batch, PageView
from redraft.core.plan import Work
from redraft.core.sequence import Lanes, Space
from redraft.core.spec import Attention, LayerSpec, Mlp, ModelSpec, Norm, Rotary, WeightSource
from redraft.core.taps import NO_TAPS, Taps
from redraft.core.testing import sequence
from redraft.core.tree import EMPTY, TokenTree
from redraft.core.view import Far, Parallel, View, Watch, Window
from redraft.errors import Unsupported
from redraft.kv.quantization.int8 import Int8Units
from redraft.kv.quantization.kivi import CodeUnits
from redraft.kv.sparse_attention.sparse_attention import StatelessRead
from redraft.ops.backend import Products, WeightSums
from redraft.ops.format import PAGE, Array, Arrays, Format, plain
from redraft.ops.reference import Reference
from redraft.ops.torch_ops import TorchOps
from tests.ops.tensors import Faced, tensor

LAYERS, HEADS, SHARE, SIZE = 2, 2, 2, 8
BLOCKS = 60
CHUNK = 88  # with the chain of 3 and the path of 4 behind it, the last decoded row fills a page
Ops = Reference | TorchOps | Faced
FAST: dict[str, Callable[[torch.dtype], TorchOps | Faced]] = {"torch": TorchOps, "numpy": Faced}


def model(window: int | None = None, *, size: int = SIZE, scale: float = 1.0) -> ModelSpec:
    """Two layers with different rotary speeds, the second with a window."""
    layers = tuple(
        LayerSpec(
            Attention(HEADS * SHARE, HEADS, size, Rotary(tuple(theta ** (-2 * i / size) for i in range(size // 2)), scale), w), Mlp(8)
        )
        for theta, w in ((50.0, None), (200.0, window))
    )
    return ModelSpec(9, 8, 512, layers, Norm(), True, lambda name: WeightSource((name,)))


# ---- toys


@dataclass(frozen=True)
class Int8:
    """A toy codec with a scale for each slot, for keys and values."""

    dtype: torch.dtype

    def arrays(self) -> dict[str, Array]:
        codes, scale = Array((PAGE, SIZE), torch.int8), Array((PAGE,), torch.float32)
        return {"codes": codes, "scales": scale, "value_codes": codes, "value_scales": scale}

    def store(self, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        found = {}
        for name, x in (("", keys.float()), ("value_", values.float())):
            scale = x.abs().amax(-1).clamp(min=1e-6) / 127
            found[f"{name}codes"], found[f"{name}scales"] = (x / scale[..., None]).round().to(torch.int8), scale
        return found

    def pack(self, keys: Tensor, values: Tensor, lanes: Any = None) -> dict[str, Tensor]:
        return self.store(keys, values)

    def scores(self, held: Arrays, q: Tensor) -> Tensor:
        return q @ held["codes"].flatten(1, 2).to(q.dtype).mT * held["scales"].flatten(1)[:, None].to(q.dtype)

    def mix(self, held: Arrays, weights: Tensor) -> Tensor:
        scaled = weights * held["value_scales"].flatten(1)[:, None].to(weights.dtype)
        return scaled @ held["value_codes"].flatten(1, 2).to(weights.dtype)

    def decode(self, held: Arrays) -> tuple[Tensor, Tensor]:
        keys, values = (held[f"{n}codes"].to(self.dtype) * held[f"{n}scales"][..., None].to(self.dtype) for n in ("", "value_"))
        return keys, values


@dataclass(frozen=True)
class Blocks:
    """A toy codec of whole pages: keys have a scale for each channel of a page."""

    dtype: torch.dtype

    def arrays(self) -> dict[str, Array]:
        codes = Array((PAGE, SIZE), torch.int8)
        return {"k": codes, "channel": Array((SIZE,), torch.float32, whole=True), "v": Array((PAGE, SIZE), self.dtype)}

    def store(self, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        raise AssertionError("rows are never written into encoded pages")

    def pack(self, keys: Tensor, values: Tensor, lanes: Any = None) -> dict[str, Tensor]:
        channel = keys.float().abs().amax(-2).clamp(min=1e-6) / 7
        return {"k": (keys.float() / channel[:, None]).round().to(torch.int8), "channel": channel, "v": values}

    def scores(self, held: Arrays, q: Tensor) -> Tensor:
        turned = q[:, None] * held["channel"].to(q.dtype)[:, :, None]  # [K, n, R, D]
        return (turned @ held["k"].to(q.dtype).mT).transpose(1, 2).flatten(2)

    def mix(self, held: Arrays, weights: Tensor) -> Tensor:
        return weights @ held["v"].flatten(1, 2).to(weights.dtype)

    def decode(self, held: Arrays) -> tuple[Tensor, Tensor]:
        return held["k"].to(self.dtype) * held["channel"][..., None, :].to(self.dtype), held["v"]


@dataclass(frozen=True)
class Even(StatelessRead):
    """Reads every `every`th position, the newest, and, by side data, slots with a large first channel and pages with a large key."""

    every: int = 2
    by_head: bool = False
    labels: bool = True

    def arrays(self, head_dim: int, dtype: torch.dtype) -> dict[str, Array]:
        return {"label": Array((PAGE,), dtype), "peak": Array((1,), dtype, whole=True)} if self.labels else {}

    def fill(self, index: int, keys: Tensor) -> dict[str, Tensor]:
        return {"label": keys[..., 0] * (1 + index)}

    def summarize(self, keys: Tensor) -> dict[str, Tensor]:
        return {"peak": keys.flatten(1).amax(1, keepdim=True)}

    def select(self, index: int, q: Tensor, held: Arrays, seen: Tensor, where: Tensor, at: Tensor, products: Products) -> Tensor:
        wanted = (where % self.every == 0)[:, None]
        if self.labels:
            peaks = held["peak"].expand(-1, -1, PAGE).flatten(1) > 2.5
            wanted = wanted & (held["label"].flatten(1) < 1.5 * (1 + index))[:, None] | (peaks & (where % 3 == 1))[:, None]
        wanted = wanted | (where[:, None] == at[:, None])
        found = (seen & wanted)[:, None]
        if self.by_head:  # a query head whose first channel is negative reads a quarter less
            found = found & ((q[..., :1] > 0) | (where % 4 != 0)[:, None, None] | (where[:, None] == at[:, None])[:, None])
        return found


def formats(dtype: torch.dtype, read: Even | None, shipped: bool = False, size: int = SIZE) -> dict[str, Format]:
    """The formats of the toy codecs, or of the shipped codecs, which compiled kernels can read."""
    side = read.arrays(size, dtype) if read else {}
    sides = (read,) if side else ()
    made = {"labelled": Format("labelled", plain(dtype, size) | side, None, sides)}
    if shipped:
        blocks = {"blocks": CodeUnits(size, dtype, PAGE, 4)}
        if size % 4 == 0:
            blocks["2-bit blocks"] = CodeUnits(size, dtype, PAGE, 2)
        opened: dict[str, Any] = {"int8": Int8Units(size, dtype), **blocks}
        codecs: list[tuple[str, Any, Any]] = [(name, codec, codec.arrays) for name, codec in opened.items()]
    else:
        codecs = [(name, toy, toy.arrays()) for name, toy in (("int8", Int8(dtype)), ("blocks", Blocks(dtype)))]
    return made | {name: Format(name, {**arrays, **side}, codec, sides) for name, codec, arrays in codecs}


# ---- one text, by hand: a chunk, then eviction or encoding, then a tree whose tail grows, then a decode


@dataclass(frozen=True)
class Case:
    kind: Lanes = Lanes.SHARED
    format: str = ""
    encoded: str = ""
    window: Window | None = None
    layer: int | None = None  # the second layer's window
    read: Even | None = None
    watch: tuple[Watch, ...] = ()
    evict: bool = False
    scale: float = 1.0
    shipped: bool = False  # codecs
    late: bool = False  # the chunk reads all
    sink_logits: tuple[float, ...] = ()  # of query heads
    merged: bool = False  # some kept slots stand for several tokens
    far: Far | None = None
    parallel: Parallel | None = None

    def view(self, stored: int) -> View | None:
        view = View(self.format, self.encoded, self.window, self.read if stored or not self.late else None, self.far, self.parallel)
        return None if view == View() else view


@dataclass
class Text:
    """The lanes of one sequence in the pool of one backend."""

    case: Case
    pages: list[list[int]]
    lengths: list[int]
    positions: list[list[int]]
    encoded: list[list[int]] = field(default_factory=list)
    stored: int = 0
    edited: bool = False

    def view(self, tail: int, chain: int, rows: int) -> tuple[Any, ...]:
        """The kind, pages, lengths, tail, chain, positions, encoded pages and logarithms of a PageView."""
        positions = [np.array(p, np.int32) for p in self.positions] if self.edited else None
        held = [-(-(n + tail + rows) // PAGE) - len(c) for n, c in zip(self.lengths, self.encoded, strict=True)]
        width = max(held)
        pages = [own[:n] + [10**6] * (width - n) for own, n in zip(self.pages, held, strict=True)]  # what lies behind is not ours
        return (
            self.case.kind, np.array(pages, np.int32), np.array(self.lengths, np.int32), tail, chain, positions,
            np.array(self.encoded, np.int32).reshape(len(self.pages), -1), self.logs(),
        )  # fmt: skip

    def logs(self) -> list[Any] | None:
        """Every third slot that an eviction kept stands for several tokens, others in every lane."""
        if not self.edited or not self.case.merged:
            return None
        where = [np.array(p) for p in self.positions]
        return [np.where((p < CHUNK) & (p % 3 == i % 2), np.log(2 + p % 5 + 3 * i), 0).astype(np.float32) for i, p in enumerate(where)]


class World:
    """One backend with the same memory and the same steps as another."""

    def __init__(self, ops: Ops, case: Case, rounded: torch.dtype = torch.float64) -> None:
        self.ops, self.case, self.rounded = ops, case, rounded
        self.spec = model(case.layer, scale=case.scale)
        self.pool = ops.allocate(self.spec, BLOCKS)
        self.pool.data[...] = math.nan  # nothing may be read that was not zeroed or written
        self.per_block = {Space(Lanes.SHARED): 1, Space(Lanes.PER_HEAD): LAYERS * HEADS, Space(Lanes.PER_LAYER): LAYERS}
        for name, fmt in formats(ops.dtype, case.read, case.shipped).items():
            self.per_block[Space(Lanes.PER_HEAD, name)] = ops.define(self.pool, fmt)
        self.dice = torch.Generator().manual_seed(7)
        self.block = 0
        lanes = {Lanes.SHARED: 1, Lanes.PER_LAYER: LAYERS, Lanes.PER_HEAD: LAYERS * HEADS}[case.kind]
        self.main = Text(case, self.take(Space(case.kind, case.format), lanes, 6), [0] * lanes, [[] for _ in range(lanes)])
        self.main.encoded = [[] for _ in range(lanes)]
        self.other = Text(Case(), self.take(Space(), 1, 5), [0], [[]], [[]])
        self.found: list[Tensor] = []
        wide = torch.promote_types(ops.dtype, torch.float32)
        self.sink_logits = torch.tensor(case.sink_logits, dtype=wide) if case.sink_logits else None

    def take(self, space: Space, lanes: int, count: int) -> list[list[int]]:
        """`count` zeroed pages for each lane, in mixed order."""
        per = self.per_block[space]
        blocks = -(-lanes * count // per)
        pages = list(range(self.block * per, (self.block + blocks) * per))
        self.block += blocks
        assert self.block <= BLOCKS
        Random(3).shuffle(pages)
        self.ops.zero(self.pool, [(space, page) for page in pages])
        return [pages[i * count : (i + 1) * count] for i in range(lanes)]

    def rand(self, *shape: int) -> Tensor:
        """The same random numbers in every dtype."""
        made = torch.randn(*shape, generator=self.dice, dtype=torch.float64)
        return made.to(self.rounded).to(self.ops.dtype)

    def forward(self, texts: list[Text], rows: list[int], trees: list[TokenTree], first: int = 0) -> list[Tensor]:
        """The attention outputs [T, H D] of all layers for random queries, keys and values; statistics are recorded."""
        work, views = [], []
        for text, n, tree in zip(texts, rows, trees, strict=True):
            seq = sequence([0] * (text.stored + n), stored=text.stored)
            work.append(Work(seq, n, first))
            tail = n + first if first else 0
            views.append(text.view(tail, n, len(tree) - first if first else n + len(tree)))
        kinds, pages, lengths, tails, chains, positions, encoded, logs = map(list, zip(*views, strict=True))
        batch = Batch.pack(work, trees, PageView(kinds, pages, lengths, tails, chains, [], positions, encoded, logs, [None] * len(texts)))
        batch = replace(batch, views=[text.case.view(text.stored) for text in texts])
        watches = {s: text.case.watch for s, text in enumerate(texts) if text.case.watch}
        plan = self.ops.plan(batch, self.spec, Taps(attention=watches))
        outs, total = [], len(batch.tokens)
        for i, layer in enumerate(self.spec.attention):
            q, k, v = (self.rand(total, heads, SIZE) for heads in (HEADS * SHARE, HEADS, HEADS))
            outs.append(self.ops.attend(i, layer, 2 * q, k, v, self.pool, plan, self.sink_logits))
        self.found += outs
        noted = self.ops.watched(plan)
        assert set(noted) == set(watches)
        for seen in noted.values():
            self.found += [seen.chain, seen.nodes]
        return outs

    def commit(self, text: Text, rows: int, path: list[int]) -> None:
        """Commits the chain rows and the nodes of `path`."""
        src, dst = [], []
        for lane, n in enumerate(text.lengths):
            for k, node in enumerate(path):
                src.append(place(text, lane, n + rows + node))
                dst.append(place(text, lane, n + rows + k))
            text.positions[lane] += range(text.stored, text.stored + rows + len(path))
            text.lengths[lane] += rows + len(path)
        self.move(text, src, dst)
        text.stored += rows + len(path)

    def move(self, text: Text, src: list[int], dst: list[int]) -> None:
        if src:
            self.ops.move(self.pool, Space(text.case.kind, text.case.format), np.array(src, np.int32), np.array(dst, np.int32))

    def evict(self, text: Text, seed: int) -> None:
        """Lanes keep different slots, and different numbers of them. With a window they keep the slots that it shows."""
        dice, src, dst = Random(seed), [], []
        window = text.case.window
        for lane, n in enumerate(text.lengths):
            keep = [i for i in range(n) if dice.random() < 0.5 + 0.1 * (lane % 5) or i == n - 1]
            if window is not None:
                heads = None if window.heads is None else [hold for layer in window.heads for hold in layer]
                some = [i for i in range(n) if i < window.sinks or text.stored - i < window.recent + lane % 3]
                keep = list(range(n)) if heads is not None and not heads[lane % len(heads)] else some
            src += [place(text, lane, slot) for slot in keep]
            dst += [place(text, lane, k) for k in range(len(keep))]
            text.positions[lane] = [text.positions[lane][slot] for slot in keep]
            text.lengths[lane] = len(keep)
        text.edited = True
        self.move(text, src, dst)

    def encode(self, text: Text, count: int) -> None:
        """Moves the first `count` full pages of every lane to the format of encoded pages."""
        target = Space(text.case.kind, text.case.encoded)
        fresh = self.take(target, len(text.pages), count)
        src = [page for lane in text.pages for page in lane[:count]]
        made = np.array([page for lane in fresh for page in lane], np.int32)
        lanes = np.repeat(np.arange(len(text.pages), dtype=np.int32), count)
        self.ops.encode(self.pool, Space(text.case.kind, text.case.format), target, np.array(src, np.int32), made, lanes)
        text.encoded = [old + new for old, new in zip(text.encoded, fresh, strict=True)]
        text.pages = [lane[count:] for lane in text.pages]

    def summarize(self, text: Text) -> None:
        """Folds the full pages of every lane."""
        pages = [page for lane, n in zip(text.pages, text.lengths, strict=True) for page in lane[: n // PAGE]]
        assert text.case.read is not None
        self.ops.summarize(self.pool, Space(text.case.kind, text.case.format), np.array(pages, np.int32), text.case.read)


def place(text: Text, lane: int, slot: int) -> int:
    return text.pages[lane][slot // PAGE - len(text.encoded[lane])] * PAGE + slot % PAGE


TREE = TokenTree.build([1, 2, 3, 4, 5, 6, 7], [-1, 0, -1, 0, 3, 2, 4], vocab=9, rows=7, depth=7)  # node 6 is 4 deep


def program(ops: Ops, case: Case, rounded: torch.dtype = torch.float64) -> World:
    world = World(ops, case, rounded)
    both = [world.main, world.other]
    world.forward(both, [CHUNK, 50], [EMPTY, EMPTY])
    for text, rows in zip(both, (CHUNK, 50), strict=True):
        world.commit(text, rows, [])
    if case.read is not None and case.read.labels:
        world.summarize(world.main)
    if case.encoded:
        world.encode(world.main, 1)
    if case.evict:
        world.evict(world.main, seed=5)
    world.forward([world.other, world.main], [1, 3], [EMPTY, TokenTree(TREE.tokens[:4], TREE.parents[:4], TREE.kinds[:5])])
    world.forward([world.main], [3], [TREE], first=4)
    world.commit(world.main, 3, [0, 3, 4, 6])
    world.commit(world.other, 1, [])
    if case.encoded:
        world.encode(world.main, 1)
    world.forward(both, [1, 1], [EMPTY, EMPTY])
    return world


@cache
def defined(case: Case, dtype: torch.dtype) -> World:
    return program(Reference(), case, dtype)


def compare(case: Case, fast: TorchOps | Faced, tolerance: float) -> None:
    right = program(fast, case, fast.dtype).found
    left = defined(case, fast.dtype).found
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.shape == other.shape
        if one.numel():  # statistics are of float32 or better
            limit = tolerance if other.dtype == fast.dtype else 1e-5
            assert (one - other.double()).abs().max() <= limit * max(1.0, float(one.abs().max()))


MASS, LOW = Watch("mass"), Watch("low", since=20)
ABOVE, COUNT = Watch("above"), ((True, False, False, True), (False, False, True, True))
PER_HEAD = Lanes.PER_HEAD
GROUPS = Parallel(((3, 20), (33, 50)), 0.7, 0.6)
SOME = Window(3, 18, turned=False, heads=((True, False), (False, True)))
CASES = {
    "per head": Case(PER_HEAD),
    "per head, evicted": Case(PER_HEAD, evict=True),
    "per layer, evicted, window": Case(Lanes.PER_LAYER, evict=True, window=Window(2, 9), watch=(MASS,)),
    "shared, evicted, watched": Case(evict=True, watch=(LOW, MASS, Watch("mass", since=CHUNK + 1))),
    "shared, window": Case(window=Window(4, 20)),
    "shared, window, evicted": Case(window=Window(4, 20), evict=True, scale=1.2),
    "shared, no sinks": Case(window=Window(0, 20), evict=True, watch=(MASS,)),
    "per head, window, evicted, watched": Case(PER_HEAD, window=Window(3, 18), evict=True, watch=(MASS, LOW)),
    "per head, layer window": Case(PER_HEAD, layer=12, evict=True, watch=(LOW,)),
    "shared, both windows": Case(layer=12, window=Window(2, 20), watch=(MASS, LOW)),
    "a window that the last row of the chunk reaches past": Case(window=Window(4, CHUNK - 5)),
    "a layer's window that it reaches past": Case(PER_HEAD, layer=CHUNK - 1),
    "int8": Case(PER_HEAD, "int8", watch=(MASS, LOW)),
    "int8, evicted, window": Case(PER_HEAD, "int8", window=Window(4, 20), evict=True),
    "encoded pages": Case(PER_HEAD, "", "blocks", watch=(MASS, LOW)),
    "encoded pages, window": Case(PER_HEAD, "", "blocks", window=Window(4, 40), layer=30),
    "int8, encoded pages": Case(PER_HEAD, "int8", "blocks"),
    "read by position": Case(read=Even(8, labels=False), watch=(MASS, LOW)),
    "read": Case(PER_HEAD, "labelled", read=Even(), evict=True),
    "read behind the chunk": Case(PER_HEAD, "labelled", read=Even(), late=True),
    "read behind the chunk, int8": Case(PER_HEAD, "int8", read=Even(), late=True),
    "read, few, by query head": Case(PER_HEAD, "labelled", read=Even(16, by_head=True, labels=False)),
    "read, window": Case(PER_HEAD, "labelled", read=Even(by_head=True), window=Window(4, 30), evict=True, watch=(MASS, LOW)),
    "read of int8": Case(PER_HEAD, "int8", read=Even(by_head=True), evict=True),
    "read of int8, few": Case(PER_HEAD, "int8", read=Even(16, labels=False)),
    "read of encoded pages": Case(PER_HEAD, "labelled", "blocks", read=Even()),
    "read of int8 and encoded pages, both windows": Case(
        PER_HEAD, "int8", "blocks", window=Window(4, 40), layer=60, read=Even(by_head=True), watch=(MASS,)
    ),
    "some heads": Case(PER_HEAD, window=SOME, evict=True, watch=(MASS, LOW)),
    "some heads, turned": Case(PER_HEAD, window=SOME._replace(turned=True), evict=True, watch=(MASS,)),
    "some heads, shared": Case(window=SOME, layer=12),
    "some heads, read": Case(PER_HEAD, "labelled", read=Even(by_head=True), window=SOME, evict=True, watch=(MASS, LOW)),
    "some heads, int8": Case(PER_HEAD, "int8", "blocks", window=SOME._replace(recent=40)),
    "not turned": Case(window=Window(4, 20, turned=False), evict=True),
    "merged": Case(PER_HEAD, evict=True, merged=True, watch=(MASS, LOW)),
    "merged, shared": Case(evict=True, merged=True, layer=12),
    "merged, some heads": Case(PER_HEAD, window=SOME, evict=True, merged=True),
    "merged, turned": Case(PER_HEAD, window=Window(3, 18), evict=True, merged=True),
    "merged, int8": Case(PER_HEAD, "int8", evict=True, merged=True, watch=(MASS,)),
    "merged, read, few": Case(PER_HEAD, "labelled", read=Even(16, by_head=True, labels=False), evict=True, merged=True),
    "watched above": Case(PER_HEAD, evict=True, watch=(Watch("above", since=20, threshold=2.0), MASS)),
    "watched one by one": Case(PER_HEAD, window=SOME, evict=True, watch=(ABOVE._replace(each=True), MASS._replace(each=True, since=25))),
    "some heads watched": Case(evict=True, watch=(MASS._replace(heads=COUNT), LOW._replace(heads=COUNT), ABOVE._replace(heads=COUNT))),
    "far": Case(far=Far(9, 9), watch=(MASS, LOW)),
    "far, from the middle of the chunk on": Case(far=Far(CHUNK - 5, 3), scale=1.2),
    "far, evicted, layer window": Case(PER_HEAD, far=Far(16, 40), evict=True, layer=30, watch=(MASS,)),
    "far, window": Case(PER_HEAD, far=Far(10, 12), window=SOME, evict=True, merged=True),
    "far, read": Case(PER_HEAD, "labelled", read=Even(by_head=True), far=Far(9, 9), evict=True, watch=(MASS, LOW)),
    "far, read, few": Case(read=Even(16, by_head=True, labels=False), far=Far(9, 30)),
    "far, int8, encoded pages": Case(PER_HEAD, "int8", "blocks", far=Far(9, 9)),
    "groups": Case(parallel=GROUPS, watch=(MASS, LOW)),
    "groups, from the middle of the chunk on": Case(PER_HEAD, parallel=Parallel(((3, CHUNK - 30),), 0.5, 1.0), layer=12),
    "groups, evicted": Case(PER_HEAD, parallel=GROUPS, evict=True, merged=True, watch=(MASS,)),
    "groups, read, few": Case(read=Even(16, by_head=True, labels=False), parallel=GROUPS),
    "groups, int8, far": Case(PER_HEAD, "int8", "blocks", parallel=GROUPS, far=Far(9, 30)),
    "no view": Case(layer=12),
}
LEARNED = (
    "no view", "shared, evicted, watched", "shared, both windows", "per head, window, evicted, watched", "int8", "encoded pages, window",
    "merged", "read by position", "read, few, by query head", "read, window", "read of int8, few", "far", "groups",
)  # fmt: skip
CASES |= {f"{name}, sink logits": replace(CASES[name], sink_logits=(0.5, -30.0, 2.0, 40.0)) for name in LEARNED}


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("name", CASES)
def test_a_backend_computes_what_the_reference_defines(name: str, backend: str) -> None:
    compare(CASES[name], FAST[backend](torch.float64), 1e-12)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "blocks" in case.encoded or case.format == "int8"])
def test_with_the_codecs_that_are_shipped(name: str, backend: str) -> None:
    compare(replace(CASES[name], shipped=True), FAST[backend](torch.float64), 1e-12)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(
    "name", ["per head, window, evicted, watched", "int8, evicted, window", "encoded pages, window", "read by position", "far", "groups"]
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_other_dtypes(name: str, dtype: torch.dtype, tolerance: float, backend: str) -> None:
    """Both get the same keys and values, rounded to the dtype. Weights near 1 / t may fall on either side of it."""
    case = CASES[name]
    compare(replace(case, watch=tuple(w for w in case.watch if w.statistic == "mass")), FAST[backend](dtype), tolerance)


FAULTS: dict[str, tuple[str, Callable[[Any], dict[str, Any]]]] = {
    "sinks are not turned": ("shared, window", lambda it: {"near": 0}),
    "one sink too few": ("shared, window", lambda it: {"window": it.window and Window(it.window.sinks - 1, it.window.recent)}),
    "one slot too many in the window": ("shared, no sinks", lambda it: {"window": it.window and Window(0, it.window.recent + 1)}),
    "one key too many is far": ("far", lambda it: {"far": it.far and Far(it.far.near - 1, it.far.distance)}),
    "far keys at another distance": ("far", lambda it: {"far": it.far and Far(it.far.near, it.far.distance + 1)}),
    "one key too many is in a group": (
        "groups",
        lambda it: {"parallel": it.parallel and it.parallel._replace(spans=((3, 21), (33, 50)))},
    ),
    "a group of another weight": ("groups", lambda it: {"parallel": it.parallel and it.parallel._replace(scale=0.7)}),
    "positions by slot": (
        "per head, layer window",
        lambda it: {"where": it.where if it.where is None else torch.arange(it.where.shape[-1]).expand(it.where.shape)},
    ),
    "lengths of the first head": ("per head, evicted", lambda it: {"lengths": it.lengths[:, :1].expand(it.lengths.shape)}),
    "pages of the other layer": ("per head", lambda it: {"units": it.units.flip(0)}),
    "encoded pages swapped": ("encoded pages", lambda it: {"encoded": it.encoded.flip(1)}),
    "a sibling is seen": ("per head", lambda it: {"tail": torch.cat([it.tail[:, :-1].cummax(0).values, it.tail[:, -1:]], 1)}),
    "watched one too late": ("int8", lambda it: {"watches": tuple(Watch(w.statistic, w.since + 1) for w in it.watches)}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_comparison_has_power(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, wrong = FAULTS[fault]
    honest = TorchOps._alone
    monkeypatch.setattr(TorchOps, "_alone", lambda *args: replace(it := honest(*args), **wrong(it)))
    with pytest.raises(AssertionError):
        compare(CASES[name], TorchOps(torch.float64), 1e-9)


@pytest.mark.parametrize("name", LEARNED)
def test_the_logits_of_heads_are_seen(name: str) -> None:
    """Those of two query heads of a kv head swapped."""
    case = CASES[f"{name}, sink logits"]
    swapped = program(TorchOps(torch.float64), replace(case, sink_logits=(-30.0, 0.5, 2.0, 40.0))).found
    right = defined(case, torch.float64).found
    assert max(float((one - other).abs().max()) for one, other in zip(right, swapped, strict=True) if one.numel()) > 0.1


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("name", ["per head, evicted", "int8, evicted, window", "read", "read of int8", "read of encoded pages"])
def test_pages_hold_what_the_reference_says(name: str, backend: str) -> None:
    """Codes, scales, side data and whole arrays are equal after writes, moves, encoding and summaries."""
    fast, slow = program(FAST[backend](torch.float64), CASES[name]), defined(CASES[name], torch.float64)
    for fmt, pages in ((fast.case.format, fast.main.pages), (fast.case.encoded, fast.main.encoded)):
        units = torch.tensor(pages, dtype=torch.long).flatten()
        left, right = fast.pool.formats[fmt], slow.pool.formats[fmt]
        for array, held in left.take(left.arrays, units.numpy() if backend == "numpy" else units).items():
            held = tensor(held)
            assert torch.equal(held, right.arrays[array][units]) and (held.any() or array == "peak" or not len(units)), array


@pytest.mark.parametrize("name", ["read, few, by query head", "read of int8, few", "read by position"])
def test_few_slots_are_gathered_and_many_are_not(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    honest = TorchOps._gathered
    monkeypatch.setattr(TorchOps, "_gathered", lambda self, *args: used.append(args[2].shape[2]) or honest(self, *args))
    program(TorchOps(torch.float64), CASES[name])
    assert used[-LAYERS:] == [1] * LAYERS and max(used) <= 3  # the decoded row, some nodes; neither the chunk nor the whole tree


# ---- the same bits


def attention(spec: ModelSpec, dtype: torch.dtype, kind: Lanes, view: View | None, taps: Taps = NO_TAPS) -> list[Tensor]:
    """A chunk, a chunk longer than MAX_GROUPED_ROWS, a tree and a decode of one sequence; 64 channels, so kernels work in blocks."""
    ops, lanes = TorchOps(dtype), 1 if kind is Lanes.SHARED else LAYERS * HEADS
    pool, dice = ops.allocate(spec, 8), torch.Generator().manual_seed(1)
    pool.data.fill_(math.nan)
    pages = np.arange(lanes * 8, dtype=np.int32).reshape(8, lanes).T  # the first block is the first page of all lanes
    ops.zero(pool, [(Space(kind), int(page)) for page in pages.ravel()])
    found, stored = [], 0
    for rows, tree in ((40, EMPTY), (100, EMPTY), (1, TREE), (1, EMPTY)):
        seq, total = sequence([0] * (stored + rows), stored=stored), rows + len(tree)
        held = [pages[:, : -(-(stored + total) // PAGE)]]
        paged = PageView(
            [kind], held, [np.full(lanes, stored, np.int32)], [0], [rows], [], [None], [np.zeros((lanes, 0), np.int32)], [None], [None]
        )
        batch = replace(Batch.pack([Work(seq, rows)], [tree], paged), views=[view])
        plan = ops.plan(batch, spec, taps)
        for i, layer in enumerate(spec.attention):
            q, k, v = (torch.randn(total, n, layer.head_dim, generator=dice).to(dtype) for n in (layer.heads, HEADS, HEADS))
            found.append(ops.attend(i, layer, q, k, v, pool, plan))
        stored += rows
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer", [None, 30])
def test_what_changes_nothing_changes_no_bit(dtype: torch.dtype, layer: int | None) -> None:
    spec = model(layer, size=64)
    fast = attention(spec, dtype, Lanes.SHARED, None)
    same = {
        "per head": attention(spec, dtype, PER_HEAD, None),
        "a window that nothing leaves": attention(spec, dtype, PER_HEAD, View(window=Window(4, 142))),  # deepest position 145
        "watched": attention(spec, dtype, Lanes.SHARED, None, Taps(attention={0: (MASS, LOW)})),
        "watched per head": attention(spec, dtype, PER_HEAD, None, Taps(attention={0: (MASS, LOW)})),
    }
    for name, found in same.items():
        assert all(map(torch.equal, fast, found)), name
    felt = attention(spec, dtype, PER_HEAD, View(window=Window(4, 130)))
    assert not all(map(torch.equal, fast, felt))


def test_reading_all_changes_no_bit() -> None:
    spec = model(size=64)
    fast = attention(spec, torch.float32, Lanes.SHARED, None)
    every = attention(spec, torch.float32, Lanes.SHARED, View(read=Even(1, labels=False)))
    assert all(map(torch.equal, fast, every))


# ---- what the words say


def turn(x: Tensor, rotary: Rotary, by: float) -> Tensor:
    """x [..., D] as complex numbers times e^(i angle): half-split pairs."""
    angles = by * torch.tensor(rotary.frequencies, dtype=torch.float64)
    made = torch.complex(*x.double().chunk(2, -1)) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([made.real, made.imag], -1) * rotary.scale


@pytest.mark.parametrize("ops", [TorchOps(torch.float64), Reference(), Faced(torch.float64)], ids=["torch", "reference", "numpy"])
@pytest.mark.parametrize("scale", [1.0, 1.3])
def test_a_window_is_a_cache_whose_keys_are_numbered_anew(ops: Ops, scale: float) -> None:
    """Form 5 of StreamingLLM against form 3: keys stored unrotated; at every step the i-th key of the cache is rotated to i, the query to
    the position of the last one. A chunk, then a decode after the hidden slots were freed."""
    spec, sinks, recent, total = model(scale=scale), 4, 12, 41
    layer, pool = spec.attention[0], ops.allocate(spec, 2)
    rotary = layer.rotary
    assert rotary is not None
    dice = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(total, heads, SIZE, generator=dice, dtype=torch.float64) for heads in (HEADS * SHARE, HEADS, HEADS))
    ops.zero(pool, [(Space(), 0), (Space(), 1)])

    def attend(first: int, rows: int, length: int, positions: list[np.ndarray] | None) -> Tensor:
        work = Work(sequence([0] * (first + rows), stored=first), rows)
        lengths = [np.array([length], np.int32)]
        pages = PageView(
            [Lanes.SHARED],
            [np.array([[0, 1]], np.int32)],
            lengths,
            [0],
            [rows],
            [],
            [positions],
            [np.zeros((1, 0), np.int32)],
            [None],
            [None],
        )
        batch = replace(Batch.pack([work], [EMPTY], pages), views=[View(window=Window(sinks, recent))])
        plan, own = ops.plan(batch, spec), slice(first, first + rows)
        return ops.attend(0, layer, ops.rope(q[own], layer, plan), ops.rope(k[own], layer, plan), v[own], pool, plan)

    chunk = attend(0, total - 1, 0, None)
    kept = [p for p in range(total - 1) if p < sinks or total - 1 - p < recent]
    ops.move(pool, Space(), np.array(kept, np.int32), np.arange(len(kept), dtype=np.int32))
    found = torch.cat([chunk, attend(total - 1, 1, len(kept), [np.array(kept, np.int32)])]).view(total, HEADS * SHARE, SIZE)
    for p in range(total):
        cache = [j for j in range(p + 1) if j < sinks or p - j < recent]
        assert len(cache) <= sinks + recent
        for h in range(HEADS * SHARE):
            keys = torch.stack([turn(k[j, h // SHARE], rotary, i) for i, j in enumerate(cache)])
            weights = (keys @ turn(q[p, h], rotary, len(cache) - 1) / math.sqrt(SIZE)).softmax(0)
            assert (weights @ v[cache, h // SHARE] - found[p, h]).abs().max() < 1e-12


@pytest.mark.parametrize("ops", [TorchOps(torch.float64), Reference(), Faced(torch.float64)], ids=["torch", "reference", "numpy"])
def test_far_keys_are_unrotated_and_at_one_distance(ops: Ops) -> None:
    """A chunk, then decoded rows, against keys and queries before their rotation."""
    spec, near, distance, total = model(scale=1.3), 7, 11, 41
    layer, pool = spec.attention[0], ops.allocate(spec, 2)
    rotary = layer.rotary
    assert rotary is not None
    dice = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(total, heads, SIZE, generator=dice, dtype=torch.float64) for heads in (HEADS * SHARE, HEADS, HEADS))
    ops.zero(pool, [(Space(), 0), (Space(), 1)])
    found = []
    for first, rows in ((0, 30), (30, 10), (40, 1)):
        work, pages = Work(sequence([0] * (first + rows), stored=first), rows), [np.array([[0, 1]], np.int32)]
        none, length = [np.zeros((1, 0), np.int32)], [np.array([first], np.int32)]
        view = PageView([Lanes.SHARED], pages, length, [0], [rows], [], [None], none, [None], [None])
        batch = replace(Batch.pack([work], [EMPTY], view), views=[View(far=Far(near, distance))])
        plan, own = ops.plan(batch, spec), slice(first, first + rows)
        found.append(ops.attend(0, layer, ops.rope(q[own], layer, plan), ops.rope(k[own], layer, plan), v[own], pool, plan))
    got = torch.cat(found).view(total, HEADS * SHARE, SIZE)
    for p in range(total):
        for h in range(HEADS * SHARE):
            scores = []
            for j in range(p + 1):
                far = p - j >= near
                key = k[j, h // SHARE].double() * rotary.scale if far else turn(k[j, h // SHARE], rotary, j)
                scores.append(key @ turn(q[p, h], rotary, distance if far else p))
            weights = (torch.stack(scores) / math.sqrt(SIZE)).softmax(0)
            assert (weights @ v[: p + 1, h // SHARE] - got[p, h]).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [(Reference, torch.float64), *((fast, dtype) for fast in FAST.values() for dtype in (torch.float64, torch.float32))],
)
@pytest.mark.parametrize("delta", [3, -5, 100_003])
def test_keys_that_move_by_delta_are_keys_of_that_position(backend: type[Ops], dtype: torch.dtype, delta: int) -> None:
    """A key has the factor of YaRN once, angles are exact at large positions, and values and layers without rotary do not change."""
    spec = model(scale=1.25)
    spec = replace(spec, layers=(*spec.layers, replace(spec.layers[0], mixer=replace(spec.attention[0], rotary=None))))
    ops = backend(dtype)
    pool, at = ops.allocate(spec, 2), 40
    raw = torch.randn(3, HEADS, 2, 3, SIZE, generator=torch.Generator().manual_seed(4), dtype=torch.float64)

    def turned(position: int) -> Tensor:
        made = raw.clone()
        for i, layer in enumerate(spec.attention):
            if layer.rotary is not None:
                for n in range(3):
                    made[i, :, 0, n] = turn(raw[i, :, 0, n], layer.rotary, position + n)
        return made

    pool.data[0, :, :, :, 4:7] = turned(at).to(dtype)
    ops.move(pool, Space(), np.array([4, 5, 6], np.int32), np.array([5, 6, 32], np.int32), delta)
    found = torch.cat([pool.data[0, :, :, :, 5:7], pool.data[1, :, :, :, :1]], -2)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-6  # an angle of 1e5 has an error of 1e-11 itself
    assert (found.double() - turned(at + delta)).abs().max() < tolerance
    assert torch.equal(found[:, :, 1], raw[:, :, 1].to(dtype)) and torch.equal(found[2], raw[2].to(dtype))


@pytest.mark.parametrize("ops", [TorchOps(torch.float64), Reference(), Faced(torch.float64)], ids=["torch", "reference", "numpy"])
def test_a_codec_is_attention_over_what_it_gives_back(ops: Ops) -> None:
    """int8 pages against plain pages that hold the decoded keys and values."""
    spec, fmt, codec = model(), formats(torch.float64, None)["int8"], Int8(torch.float64)
    dice = torch.Generator().manual_seed(6)
    q, k, v = (torch.randn(37, heads, SIZE, generator=dice, dtype=torch.float64) for heads in (HEADS * SHARE, HEADS, HEADS))
    decoded = [x.view(k.shape) for x in codec.decode(codec.store(k.view(-1, SIZE), v.view(-1, SIZE)))]
    assert 1e-3 < (decoded[0] - k).abs().max() < 2e-2
    found = []
    for view, keys, values in ((View("int8"), k, v), (None, *decoded)):
        pool = ops.allocate(spec, 4)
        ops.define(pool, fmt)
        space = Space(PER_HEAD, view.format if view else "")
        ops.zero(pool, [(space, page) for page in range(8)])
        pages = np.arange(8, dtype=np.int32).reshape(4, 2)
        batch = Batch.pack(
            [Work(sequence([0] * 37), 37)], [EMPTY],
            PageView([PER_HEAD], [pages], [np.zeros(4, np.int32)], [0], [37], [], [None], [np.zeros((4, 0), np.int32)], [None], [None]),
        )  # fmt: skip
        plan = ops.plan(replace(batch, views=[view]), spec)
        found.append(ops.attend(1, spec.attention[1], q, keys, values, pool, plan))
    assert (found[0] - found[1]).abs().max() < 1e-13


# ---- memory


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_units_of_a_format_do_not_overlap(dtype: torch.dtype) -> None:
    """Every slot of every unit holds its own number in all arrays; all read back, and zeroing a unit affects no other."""
    ops = TorchOps(dtype)
    pool = ops.allocate(model(), 3)
    for name, fmt in formats(dtype, Even()).items():
        count = ops.define(pool, fmt)
        stored, units = pool.formats[name], torch.arange(3 * count)
        assert count == ops.block_bytes(model()) // fmt.bytes > 1
        assert fmt.bytes * count < ops.block_bytes(model())  # units of different blocks are not evenly spaced

        def number(array: Array, i: int, units: Tensor = units) -> Tensor:
            slots = torch.zeros(1) if array.whole else torch.arange(PAGE)
            made = (units + 1 + i)[:, None] + slots
            return made.view(*made.shape, *(1,) * (len(array.shape) - 1)).expand(-1, *array.shape).to(array.dtype).clone()

        stored.put({key: number(array, i) for i, (key, array) in enumerate(fmt.arrays.items())}, units)

        def check(zeroed: int, stored: Any = stored, fmt: Format = fmt, units: Tensor = units) -> None:
            for i, (key, array) in enumerate(fmt.arrays.items()):
                want = number(array, i)
                want[units == zeroed] = 0
                assert torch.equal(stored.take([key], units)[key], want), key
                assert torch.equal(stored.arrays[key][stored.at(units)], want), key
                for offset in () if array.whole else (0, 13, 31):
                    assert torch.equal(stored.pick([key], units, torch.full_like(units, offset))[key], want[:, offset]), key

        check(-1)
        ops.zero(pool, [(Space(PER_HEAD, name), count)])
        check(count)


def test_plain_units_are_the_pages_of_the_lane_kinds() -> None:
    ops, spec = TorchOps(torch.float32), model()
    pool = ops.allocate(spec, 3)
    pool.data.copy_(torch.randn(pool.data.shape))
    got = pool.formats[""].take(["keys", "values"], torch.arange(3 * LAYERS * HEADS))
    assert torch.equal(torch.stack([got["keys"], got["values"]], 1).view(pool.data.shape), pool.data)


@pytest.mark.parametrize("ops", [TorchOps(torch.float32), Reference(), Faced(torch.float32)], ids=["torch", "reference", "numpy"])
def test_a_unit_larger_than_a_block_is_refused_by_name(ops: Ops) -> None:
    pool = ops.allocate(model(), 2)
    with pytest.raises(Unsupported, match="format 'huge': a unit takes 512000 bytes"):
        ops.define(pool, Format("huge", {"keys": Array((PAGE, 4000), torch.float32)}))


def test_an_unknown_statistic_is_refused_by_name() -> None:
    for ops in (TorchOps(torch.float64), Reference(), Faced(torch.float64)):
        with pytest.raises(Unsupported, match="statistic 'variance'"):
            program(ops, Case(watch=(Watch("variance"),)))


@pytest.mark.parametrize("backend", FAST)
def test_mass_adds_up_to_the_rows(backend: str) -> None:
    """A chunk of 88 rows gives a sum of 88 to the slots of each head, a row of the tree 1."""
    world = program(FAST[backend](torch.float64), Case(PER_HEAD, watch=(MASS,)))
    seen = [WeightSums(*pair) for pair in zip(world.found[2::4], world.found[3::4], strict=True)]
    assert [s.nodes.shape[1] for s in seen] == [0, 4, 3, 0]
    for noted, rows in zip(seen, (CHUNK, 3, 0, 1), strict=True):
        assert torch.allclose(noted.chain.sum(-1), torch.tensor(float(rows), dtype=torch.float64))
        assert torch.allclose(noted.nodes.sum(-1), torch.ones((), dtype=torch.float64))
