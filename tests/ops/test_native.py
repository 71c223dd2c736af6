"""native against reference, the definition, and against itself: no bit of a row depends on other rows or on the grouping into steps."""

from __future__ import annotations

import itertools
import math
import os
import random
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from redraft import LLM
from redraft.config import SamplingParams
from redraft.core.batch import Batch, PageView
from redraft.core.layers import Layers
from redraft.core.noise import draw
from redraft.core.plan import Accepted, Work
from redraft.core.sequence import PLAIN, CachePlan, Lanes, Request, Sequence, Space
from redraft.core.spec import Attention, Experts, LayerSpec, Mlp, ModelSpec, Norm, Rotary, WeightSource
from redraft.core.taps import Taps
from redraft.core.testing import view, work
from redraft.core.tree import EMPTY, TokenTree
from redraft.core.view import View, Watch, Window
from redraft.errors import Unsupported
from redraft.kv.slots import Kept, Merged
from redraft.models.runner import Runner
from redraft.ops import library
from redraft.ops.backend import ForwardResult, LayerWeights, Linear, LinearWeights, NormWeights, Weights, WeightSums
from redraft.ops.numpy_ops import NumpyOps
from redraft.ops.quantized import Quantized, product
from redraft.ops.reference import Reference, quantized_row
from redraft.ops.torch_arrays import as_tensor
from redraft.ops.torch_ops import TorchOps
from tests.arrays import by_group, by_output
from tests.checkpoints import tiny_llama
from tests.ops import test_backends, test_views

if why_not := library.why_not():
    pytest.skip(f"no native kernels: {why_not}", allow_module_level=True)

from redraft.ops.native import Packed
from tests.ops.tensors import Tensors as NativeOps
from tests.ops.tensors import arrays, tensors

F32, BF16 = torch.float32, torch.bfloat16
DTYPES = pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
HALF = {F32: 2.0**-23, BF16: 2.0**-8}  # of a number, that one rounding may change; bfloat16's twice
KERNELS = 2.0**-21  # of the sum of absolute terms, that float32 arithmetic may change
SIZES = [1, 8, 40, 63, 64, 65, 100, 130]
FORMS = ["", "wide", "low", "tops", "low tops", "wide tops", "wide low tops"]
FEW = settings(max_examples=25, derandomize=True, deadline=None, database=None)


def few(examples: int) -> settings:
    return settings(FEW, max_examples=examples)


@pytest.fixture(autouse=True)
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads, and restores it afterwards."""
    loaded = library.load()
    assert loaded is not None
    before, torchs = loaded.threads, torch.get_num_threads()
    yield loaded.set_threads
    loaded.set_threads(before)
    torch.set_num_threads(torchs)


def randn(seed: int, *shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ---- operations against the definition


def within(found: Tensor, expected: Tensor, dtype: torch.dtype, terms: Tensor | float = 0.0) -> None:
    """expected: float64, rounded once to the dtype; terms: the sum of the absolute terms of the float32 arithmetic."""
    assert found.dtype == dtype and found.shape == expected.shape
    allowed = HALF[dtype] * expected.abs() + KERNELS * terms + 1e-30
    assert ((found.double() - expected).abs() <= allowed).all(), float(((found.double() - expected).abs() - allowed).max())


@DTYPES
@few(40)
@given(st.integers(1, 40), st.sampled_from(SIZES), st.sampled_from(SIZES), st.booleans(), st.booleans(), st.integers(0, 99))
@example(33, 65, 100, True, True, 0)
@example(1, 1, 1, False, False, 0)
def test_linear(dtype: torch.dtype, rows: int, outs: int, ins: int, biased: bool, gated: bool, seed: int) -> None:
    ops, outs = NativeOps(dtype), outs * 2 if gated else outs
    x, weight = randn(seed, rows, ins, dtype=dtype), randn(seed + 1, outs, ins, dtype=dtype)
    bias = randn(seed + 2, outs, dtype=dtype) if biased else None
    found = ops.linear(x, ops.pack(Linear(weight, bias), gated))
    exact = Linear(weight.double(), None if bias is None else bias.double())
    within(found, Reference().linear(x.double(), exact), dtype, x.double().abs() @ weight.double().abs().T + 5)
    if gated:  # how panels lie changes no bit
        assert torch.equal(found, ops.linear(x, ops.pack(Linear(weight, bias))))
    strided = randn(seed, rows, ins + 3, dtype=dtype)
    strided[:, 1 : ins + 1] = x
    assert torch.equal(found, ops.linear(strided[:, 1 : ins + 1], ops.pack(Linear(weight, bias), gated)))


@DTYPES
@pytest.mark.parametrize("kind", ["rms", "layer"])
@few(20)
@given(st.integers(1, 40), st.sampled_from(SIZES), st.sampled_from([0.0, 30.0]), st.integers(0, 99))
def test_norm(kind: Any, dtype: torch.dtype, rows: int, size: int, middle: float, seed: int) -> None:
    x, weight = (3 * randn(seed, rows, size) + middle).to(dtype), randn(seed + 1, size, dtype=dtype)
    norm = Norm(kind, 1e-5)
    for bias in (randn(seed + 2, size, dtype=dtype), None):
        own = NormWeights(weight, bias)
        exact = Reference().norm(x.double(), NormWeights(*(None if part is None else part.double() for part in own)), norm)
        spread = (x.double() - (x.double().mean(-1, keepdim=True) if kind == "layer" else 0)).pow(2).mean(-1, keepdim=True).sqrt()
        terms = x.double().abs().amax(-1, keepdim=True) / (spread + 1e-3) * weight.double().abs() + 3
        within(NativeOps(dtype).norm(x, own, norm), exact, dtype, terms)
    heads = x[:, None].expand(rows, 3, size)  # as for queries and keys
    assert torch.equal(NativeOps(dtype).norm(heads, NormWeights(weight), norm)[:, 2], NativeOps(dtype).norm(x, NormWeights(weight), norm))


@DTYPES
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "quick_gelu", "relu"])
def test_activate(activation: str, gated: bool, dtype: torch.dtype) -> None:
    for rows, size in ((1, 1), (7, 40), (33, 65)):
        x = (4 * randn(rows, rows, size * (1 + gated))).to(dtype)
        x[0, 0] = -100.0
        x[-1, -1] = 90.0
        gate, up = x.double().chunk(2, -1) if gated else (x.double(), torch.tensor(1.0))
        terms = (gate.abs().clamp(max=10) + gate.abs() / 8) * up.abs()
        within(NativeOps(dtype).activate(x, activation, gated), Reference().activate(x.double(), activation, gated), dtype, terms)


def test_an_unknown_activation_is_refused_by_name() -> None:
    with pytest.raises(Unsupported, match="swish"):
        NativeOps().activate(torch.zeros(1, 2), "swish", True)


@DTYPES
@pytest.mark.parametrize(("heads", "size"), [(1, 2), (3, 8), (5, 12), (2, 64), (1, 100)])
def test_rope(heads: int, size: int, dtype: torch.dtype) -> None:
    """Also at large positions, because angles are in float64."""
    turn = Rotary(tuple(500.0 ** (-2 * i / size) for i in range(size // 2)), 1.2)
    layer = Attention(heads, heads, size, turn)
    spec = ModelSpec(9, 8, 512, (LayerSpec(layer, Mlp(8)),), Norm(), True, lambda name: WeightSource((name,)))
    positions = np.array([0, 1, 31, 77_777, 1_000_003], np.int32)
    works = [work([1]) for _ in positions]
    plan = NativeOps(dtype).plan(replace(Batch.pack(works, [EMPTY] * 5, view(works)), positions=positions), spec)
    x = randn(3, 5, heads + 2, size, dtype=dtype)[:, 1 : heads + 1]  # a part of the projections
    before = x.clone()
    exact = Reference().rope(x.double(), layer, SimpleNamespace(positions=torch.tensor(positions).double()))  # type: ignore[arg-type]
    half = torch.cat([x.double().abs()[..., size // 2 :], x.double().abs()[..., : size // 2]], -1)
    within(NativeOps(dtype).rope(x, layer, plan), exact, dtype, 2 * (x.double().abs() + half))
    assert torch.equal(x, before)


@DTYPES
@pytest.mark.parametrize("workers", [1, 3])
def test_head(workers: int, dtype: torch.dtype, threads: Callable[[int], None]) -> None:
    """argmax, top_k and logits of some rows: the lowest id of equal logits, also across panels and threads; rows with NaN."""
    threads(workers)
    ops, ref, vocab, hidden = NativeOps(dtype), Reference(), 300, 40
    weight = randn(1, vocab, hidden, dtype=dtype)
    for same in ((3, 299), (63, 64, 250), (130, 131)):
        weight[list(same)] = 3 * weight[same[0]]
    x = randn(2, 9, hidden, dtype=dtype)
    for i, same in enumerate((3, 63, 130)):
        x[i] = weight[same]
    x[8, 7] = math.nan
    norm, gain = Norm(), NormWeights(1 + 0.1 * randn(3, hidden, dtype=dtype))
    weights = Weights(weight, ops.pack(Linear(weight)), gain, ())
    rows = [0, 1, 2, 4, 5, 8]
    plan: Any = SimpleNamespace(batch=SimpleNamespace(logit_rows=np.array(rows, np.int32)))
    best, all_of_them = ops.head(x, weights, norm, plan, Taps()), ops.head(x, weights, norm, plan, Taps(logits=True, top_k=5))
    assert best.logits is None and all_of_them.logits is not None and all_of_them.top_k is not None
    exact = Weights(weight.double(), Linear(weight.double()), NormWeights(gain.weight.double()), ())
    definition = ref.head(
        x.double(),
        exact,
        norm,
        SimpleNamespace(batch=SimpleNamespace(logit_rows=np.array(rows))),
        Taps(logits=True),  # type: ignore[arg-type]
    )
    assert definition.logits is not None
    assert best.argmax.tolist() == all_of_them.argmax.tolist()
    assert best.argmax.tolist()[:3] == [3, 63, 130] and best.argmax.tolist()[5] == -1
    assert best.argmax.tolist()[:5] == all_of_them.logits.argmax(-1).tolist()[:5]
    assert all_of_them.top_k[:5, 0].tolist() == best.argmax.tolist()[:5]
    if dtype == F32:
        assert best.argmax.tolist()[:5] == definition.argmax.tolist()[:5]
    error = (all_of_them.logits[:5].double() - definition.logits[:5]).abs().max()
    assert error <= (1e-4 if dtype == F32 else 0.1) * definition.logits[:5].abs().max()
    assert all_of_them.logits[5].isnan().all()


@DTYPES
@pytest.mark.parametrize("group", [None, 0, 32], ids=["plain", "int8", "int4"])
@few(12)
@given(st.integers(1, 20), st.integers(1, 20), st.sampled_from(SIZES), st.sampled_from(SIZES), st.booleans(), st.integers(0, 99))
@example(20, 1, 130, 40, True, 0)
def test_the_head_in_one_call_is_its_parts(
    group: int | None, dtype: torch.dtype, rows: int, count: int, outs: int, ins: int, biased: bool, seed: int
) -> None:
    """Norm, linear and order bit for bit; rows in any order, some twice."""
    ops, dice = NativeOps(dtype), random.Random(seed)
    x, wanted = randn(seed, rows, ins, dtype=dtype), [dice.randrange(rows) for _ in range(count)]
    if count == rows:  # a batch with so many logit rows has all rows in order
        wanted = list(range(rows))
    weight = Linear(randn(seed + 1, outs, ins), randn(seed + 2, outs) if biased else None)
    head = ops.pack(weight if group is None else codes(outs, ins, group, biased, seed))
    own = NormWeights(randn(seed + 3, ins, dtype=dtype), randn(seed + 4, ins, dtype=dtype) if biased else None)
    norm = Norm(dice.choice(["rms", "layer"]), 1e-5)
    assert isinstance(head, Packed)
    weights, plan = Weights(x, head, own, ()), SimpleNamespace(batch=SimpleNamespace(logit_rows=np.array(wanted, np.int32)))
    logits = ops.head(x, weights, norm, plan, Taps(logits=True)).logits  # type: ignore[arg-type]
    assert logits is not None and logits.dtype == F32
    assert torch.equal(logits.to(dtype), ops.linear(ops.norm(x, own, norm), head)[wanted])  # the same sums, not rounded
    order = logits.double().sort(descending=True, stable=True).indices
    for k in (0, 1, 7):
        found = ops.head(x, weights, norm, plan, Taps(top_k=k))  # type: ignore[arg-type]
        assert found.argmax.tolist() == order[:, 0].tolist()
        assert (found.top_k is None) == (k == 0) and (found.top_k is None or found.top_k.tolist() == order[:, :k].tolist())


@DTYPES
def test_one_logit_that_is_no_number_is_reported(dtype: torch.dtype) -> None:
    """Rows of only minus infinity give the lowest id."""
    ops, weight = NativeOps(dtype), randn(1, 200, 8, dtype=dtype)
    plan: Any = SimpleNamespace(batch=SimpleNamespace(logit_rows=np.arange(3, dtype=np.int32)))
    for bias in (math.nan, math.inf):
        shift = torch.zeros(200, dtype=dtype)
        shift[77] = shift[190] = bias
        weights = Weights(weight, ops.pack(Linear(weight, shift)), NormWeights(torch.ones(8, dtype=dtype)), ())
        assert ops.head(randn(2, 3, 8, dtype=dtype), weights, Norm(), plan, Taps()).argmax.tolist() == [-1] * 3
    low = ops.pack(Linear(weight, torch.full((200,), -math.inf, dtype=dtype)))
    weights = Weights(weight, low, NormWeights(torch.ones(8, dtype=dtype)), ())
    assert ops.head(randn(2, 3, 8, dtype=dtype), weights, Norm(), plan, Taps()).argmax.tolist() == [0] * 3


WATCHES = Watch("mass"), Watch("mass", since=test_views.CHUNK + 1), Watch("low", since=20)
VIEWS = {name: replace(case, shipped=True) for name, case in test_views.CASES.items()} | {
    "per head, evicted, narrow layer": test_views.Case(
        Lanes.PER_HEAD, layer=2, evict=True, shipped=True
    ),  # a path is longer than its window
    "int8, narrow layer": test_views.Case(Lanes.PER_HEAD, "int8", layer=2, shipped=True),
    "2-bit pages": test_views.Case(Lanes.PER_HEAD, "", "2-bit blocks", window=test_views.Window(4, 40), layer=30, shipped=True),
}
DEFINED = [
    "shared, window, evicted",
    "per head, window, evicted, watched",
    "shared, both windows",
    "int8, narrow layer",
    "encoded pages, window",
    "2-bit pages",
]
DEFINED += [f"{name}, sink logits" for name in ("no view", "shared, both windows", "int8", "read, window")]
DEFINED += ["read, window", "read of encoded pages", "read behind the chunk, int8", "far, read"]


def near(found: test_views.World, expected: test_views.World, statistics: float = 1e-5) -> None:
    """The attention outputs and statistics of all steps."""
    for mine, other in zip(found.found, expected.found, strict=True):
        assert mine.shape == other.shape
        limit = 0.01 if mine.dtype == BF16 else statistics
        assert not mine.numel() or (mine.double() - other.double()).abs().max() <= limit * max(1.0, float(other.abs().max()))


@pytest.mark.parametrize("name", VIEWS)
@DTYPES
def test_every_view(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, threads: Callable[[int], None]) -> None:
    """Next to a sequence without a view, in memory full of NaN, with a growing tail. PyTorch attends nothing, and pages hold the bits
    that its backend writes. In bfloat16, weights near 1 / t may fall on either side, and processors that multiply such numbers read
    queries that were rounded once more where they were turned for sinks."""
    case = replace(VIEWS[name], watch=WATCHES if dtype == F32 else WATCHES[:2])
    torchs = test_views.program(TorchOps(dtype), case, dtype)
    monkeypatch.setattr(NumpyOps, "attend", lambda *_: pytest.fail("NumPy attended"))
    threads(2)
    mine = test_views.program(NativeOps(dtype), case, dtype)
    near(mine, torchs, 1e-5 if dtype == F32 else 0.01)
    for form, pages in ((case.format, mine.main.pages), (case.encoded, mine.main.encoded)):
        left, right, units = mine.pool.formats[form], torchs.pool.formats[form], torch.tensor(pages, dtype=torch.long).flatten()
        for array, held in left.take(left.arrays, units.numpy()).items():
            assert torch.equal(as_tensor(held), right.take([array], units)[array]), array


@pytest.mark.parametrize("name", DEFINED)
def test_views_as_the_reference_defines_them(name: str) -> None:
    case = replace(VIEWS[name], watch=WATCHES)
    near(test_views.program(NativeOps(F32), case, F32), test_views.program(Reference(), case, F32))


def test_codecs_that_no_kernel_reads_are_refused_by_name() -> None:
    ops, toys, shipped = NativeOps(), test_views.formats(F32, None), test_views.formats(F32, None, shipped=True)
    pool = ops.allocate(test_views.model(), 2)
    for name in ("int8", "blocks"):
        with pytest.raises(Unsupported, match=f"codec '{name}': backend 'native' has no attention kernel.*use backend 'torch'"):
            ops.define(pool, toys[name])
    ops.define(pool, shipped["int8"])
    with pytest.raises(Unsupported, match="format 'int8' has two layouts"):
        ops.define(pool, replace(shipped["blocks"], name="int8"))


@DTYPES
def test_picks_may_lie_in_memory_in_any_order(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    case, honest = VIEWS["read, few, by query head"], test_views.Even.select
    expected = test_views.program(NativeOps(dtype), case, dtype)
    monkeypatch.setattr(test_views.Even, "select", lambda *of: honest(*of).permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0))
    found = test_views.program(NativeOps(dtype), case, dtype)
    assert all(map(torch.equal, found.found, expected.found))


def test_terms_of_zero_leave_a_sum_as_it_is() -> None:
    """Wherever they are: so texts with far keys have the same bits with and without slots that they do not see."""
    ops, dice = NativeOps(F32), np.random.default_rng(4)
    weights, values = dice.random((2, 3, 1000), np.float32), dice.standard_normal((2, 20, 1000)).astype(np.float32)
    places = np.sort(dice.choice(1000, 88))
    more, wider = np.insert(weights, places, 0, axis=2), np.insert(values, places, 9, axis=2)
    assert np.array_equal(ops.products(weights, values), ops.products(more, wider))
    assert np.array_equal(ops.products(weights[:, 1:2], values), ops.products(weights, values)[:, 1:2])


@DTYPES
def test_vectors_become_the_codes_that_pytorch_makes(dtype: torch.dtype) -> None:
    """Also pages without a usable scale."""
    layer = Attention(2, 1, 20)
    spec = ModelSpec(9, 8, 512, (LayerSpec(layer, Mlp(8)),), Norm(), True, lambda name: WeightSource((name,)))
    x = randn(1, 2, 64, 1, 20) * 10 ** torch.linspace(-30, 30, 64)[:, None, None]
    for row, odd in enumerate((0.0, 1e-40, 3e-38, 3.4028234e38, math.inf, -math.inf, math.nan)):
        x[:, row] = odd if abs(odd) < 1e-30 else x[:, row]
        x[:, row, 0, 17] = odd
    x[:, 7] = torch.arange(20) * 2.0 - 11.5  # half steps
    x[:, 7, 0, 0] = 63.5
    taken = []
    for ops in (NativeOps(dtype), TorchOps(dtype)):
        pool, fmt = ops.allocate(spec, 8), test_views.formats(dtype, None, shipped=True, size=20)["int8"]
        ops.define(pool, fmt)
        pages = PageView(
            [Lanes.PER_HEAD],
            [np.array([[1, 4, 2]], np.int32)],
            [np.array([5], np.int32)],
            [0],
            [64],
            [],
            [None],
            [np.zeros((1, 0), np.int32)],
            [None],
            [None],
        )
        ops.zero(pool, [(Space(Lanes.PER_HEAD, "int8"), page) for page in (1, 2, 4)])
        batch = replace(Batch.pack([work([1] * 69, stored=5)], [EMPTY], pages), views=[View("int8")])
        keys, values = x.to(dtype)
        ops.attend(0, layer, torch.zeros(64, 2, 20, dtype=dtype), keys, values, pool, ops.plan(batch, spec))
        units: Any = torch.tensor([1, 4, 2])
        held = pool.formats["int8"].take(fmt.arrays, units if isinstance(ops, TorchOps) else units.numpy())
        taken.append({name: as_tensor(array) for name, array in held.items()})
    for name, array in taken[1].items():
        assert torch.equal(taken[0][name].nan_to_num(7), array.nan_to_num(7)), name
        assert torch.equal(taken[0][name].isnan(), array.isnan())


def test_an_unknown_statistic_is_refused_by_name() -> None:
    spec, batch = model("llama")[0], Batch.pack([work([1])], [EMPTY], view([work([1])]))
    with pytest.raises(Unsupported, match=r"'high' is unknown; use mass, low, above$"):
        NativeOps().plan(batch, spec, Taps(attention={0: (Watch("high"),)}))


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize(("dtype", "tolerance"), [(F32, 1e-5), (BF16, 0.12)])
def test_whole_models(dtype: torch.dtype, tolerance: float, window: int | None) -> None:
    """Chunks, trees with growing tails and decodes through two layers; both backends run every step."""
    spec, weights = test_backends.model(window=window)
    ops = NativeOps(dtype)
    left, right = Runner(spec, weights, Reference(), 40), Runner(spec, cast(weights, ops), ops, 40)
    for one, other in test_backends.program(left, right, seed=1):
        assert one.shape == other.shape
        assert (one - other.double()).abs().max() <= tolerance * one.abs().max()


# ---- models of all shapes


class Shape(NamedTuple):
    """The differences between the families that the kernels run."""

    heads: int
    kv_heads: int
    size: int
    hidden: int
    mlp: Mlp
    norm: Norm = Norm()
    qk_norm: bool = False
    biases: bool = False
    window: int | None = None
    learned: bool = False
    experts: int = 0
    still: bool = False  # the middle layer is not rotated
    shared: Mlp | None = None  # an expert of all rows
    gated: bool = True  # it has a gate
    router_bias: bool = False
    post_norm: Norm | None = None
    layer: Mapping[str, Any] = MappingProxyType({})  # other fields of the layers
    mixer: Mapping[str, Any] = MappingProxyType({})  # and of their attention
    spec: Mapping[str, Any] = MappingProxyType({})  # and of the model


FAMILIES = {
    "llama": Shape(4, 2, 8, 40, Mlp(52)),
    "qwen3": Shape(6, 2, 12, 36, Mlp(50), qk_norm=True, biases=True),
    "gpt2": Shape(3, 3, 10, 30, Mlp(100, "gelu_tanh", gated=False, bias=True), Norm("layer"), biases=True, learned=True),
    "mistral": Shape(4, 1, 16, 64, Mlp(33), window=11),
    "mixtral": Shape(4, 2, 8, 40, Mlp(36), experts=5),
    "smollm3": Shape(4, 2, 8, 40, Mlp(52), still=True),
    "starcoder2": Shape(6, 2, 12, 36, Mlp(100, "gelu_tanh", gated=False, bias=True), Norm("layer"), biases=True, window=11),
}
ONE = Norm(eps=1e-6, above_one=True)
FAMILIES |= {
    "gemma": Shape(
        4, 2, 8, 40, Mlp(52, "gelu_tanh"), ONE, qk_norm=True, window=11, post_norm=ONE, mixer={"scale": 0.4, "softcap": 2.0},
        spec={"embed_scale": 3.3, "logit_softcap": 300.0, "logit_scale": 0.5},
    ),
    "olmo": Shape(6, 2, 12, 36, Mlp(50), qk_norm=True, post_norm=Norm(), layer={"norm": None}, mixer={"norm_heads_together": True}),
    "granite": Shape(4, 2, 8, 40, Mlp(52), layer={"residual": 0.4}, mixer={"scale": 0.2}, spec={"embed_scale": 3.0}),
    "neox": Shape(3, 3, 10, 30, Mlp(100, "gelu", gated=False, bias=True), Norm("layer"), biases=True, layer={"parallel": True}),
    "shared": Shape(4, 2, 8, 40, Mlp(36), experts=5, shared=Mlp(28)),
    "beside": Shape(
        4, 2, 8, 40, Mlp(36, "gelu_tanh", bias=True), experts=5, shared=Mlp(28, "gelu"), gated=False, layer={"parallel": True}
    ),
    "granite-moe": Shape(4, 2, 8, 40, Mlp(36, "relu", gated=False), experts=3, post_norm=Norm(), layer={"residual": 0.4}),
    "stablelm": Shape(
        6, 2, 12, 36, Mlp(50), Norm("layer", biased=False), qk_norm=True, layer={"parallel": True}, mixer={"norm_heads_apart": True}
    ),
    "sinks": Shape(4, 2, 8, 40, Mlp(52), window=11, mixer={"sink_logits": True}),
    "gpt-oss": Shape(
        6, 2, 12, 36, Mlp(30, "quick_gelu", bias=True, limit=1.5, shift=1.0), biases=True, window=11, experts=5, router_bias=True,
        mixer={"sink_logits": True},
    ),
    "cohere": Shape(4, 2, 8, 40, Mlp(52), Norm("layer", biased=False), layer={"parallel": True}, spec={"logit_scale": 0.3}),
}  # fmt: skip
VOCAB, CONTEXT, LAYERS = 133, 700, 3
SEVERAL = (551, Lanes.PER_HEAD), (551, Lanes.SHARED), (551, Lanes.PER_LAYER)  # tokens of texts, and their lanes


def model(family: str, seed: int = 0) -> tuple[ModelSpec, Weights]:
    shape = FAMILIES[family]
    generator = torch.Generator().manual_seed(seed)

    def rand(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator) / math.sqrt(sizes[-1])

    def weigh(size: int, norm: Norm) -> NormWeights:
        return NormWeights(1 + 0.3 * rand(size), 0.3 * rand(size) if norm.bias else None)

    def linear(outs: int, ins: int, bias: bool, size: float = 1.0) -> Linear:
        return Linear(size * rand(outs, ins), rand(outs) if bias else None)

    def mlps(outs: int, ins: int) -> tuple[Linear, ...]:
        return tuple(linear(outs, ins, shape.mlp.bias) for _ in range(shape.experts or 1))

    def rotary(base: float) -> Rotary | None:
        return None if shape.learned else Rotary(tuple(base ** (-2 * i / shape.size) for i in range(shape.size // 2)))

    near, far = rotary(100.0), None if shape.still else rotary(900.0 if shape.window else 100.0)
    gated = shape.shared is not None and shape.gated
    mlp: Mlp | Experts = shape.mlp
    if shape.experts:
        mlp = Experts(shape.experts, 2, shape.mlp, shared=shape.shared, gated=gated, router_bias=shape.router_bias)
    qk = replace(shape.norm, eps=1e-6) if shape.qk_norm else None
    layers = tuple(
        LayerSpec(
            Attention(
                shape.heads, shape.kv_heads, shape.size, far if i == 1 else near, None if i == 1 else shape.window,
                shape.biases, shape.biases, qk, **shape.mixer,
            ), mlp, **{"norm": shape.norm, "post_norm": shape.post_norm, **shape.layer},
        )
        for i in range(LAYERS)
    )  # fmt: skip
    spec = ModelSpec(
        VOCAB, shape.hidden, CONTEXT, layers, shape.norm, False, lambda name: WeightSource((name,)), CONTEXT if shape.learned else None,
        **shape.spec,
    )  # fmt: skip

    def layer_of(layer: Attention) -> LayerWeights:
        before, after = spec.layers[0].norm, shape.post_norm
        wide = (shape.heads, shape.kv_heads) if layer.norm_heads_together or layer.norm_heads_apart else (1, 1)
        made = LayerWeights(
            **{"attn_norm": weigh(shape.hidden, before)} if before else {},
            qkv=linear(layer.qkv_rows, shape.hidden, shape.biases, 3.0),
            out=linear(shape.hidden, shape.heads * shape.size, shape.biases),
            **{"mlp_norm": weigh(shape.hidden, before)} if before else {},
            **{f"{name}_post_norm": weigh(shape.hidden, after) for name in ("attn", "mlp") if after},
            **{f"{name}_norm": weigh(shape.size * heads, qk) for name, heads in zip("qk", wide, strict=True) if qk},
            **{"sink_logits": 4 * rand(shape.heads)} if layer.sink_logits else {},
        )
        ups, downs = mlps(shape.mlp.hidden * (1 + shape.mlp.gated), shape.hidden), mlps(shape.hidden, shape.mlp.hidden)
        if not shape.experts:
            return replace(made, up=ups[0], down=downs[0])
        made = replace(made, router=linear(shape.experts, shape.hidden, shape.router_bias, 3.0), experts_up=ups, experts_down=downs)
        if shape.shared is None:
            return made
        up, down = linear(2 * shape.shared.hidden, shape.hidden, False), linear(shape.hidden, shape.shared.hidden, False)
        return replace(made, shared_up=up, shared_down=down, shared_gate=linear(1, shape.hidden, False, 3.0) if gated else None)

    made = [layer_of(layer) for layer in spec.attention]
    positions = rand(CONTEXT, shape.hidden) * 3 if shape.learned else None
    head = linear(VOCAB, shape.hidden, False, 3.0)
    return spec, Weights(rand(VOCAB, shape.hidden) * 5, head, weigh(shape.hidden, shape.norm), tuple(made), positions)


def quantized(weights: Linear, quant: str) -> LinearWeights:
    if quant == "outliers":
        return by_output(weights, torch.arange(0, weights.weight.shape[1], 7))
    if quant in FORMS[1:]:
        made = of_form(by_group(weights, 16), quant.split(), 0)
        return replace(made, **{name: getattr(made, name) / 40 for name in ("top", "bottom") if getattr(made, name) is not None})
    return by_output(weights) if quant == "int8" else by_group(weights, 32) if quant == "int4" else weights


NORMS = "attn_norm", "mlp_norm", "attn_post_norm", "mlp_post_norm", "q_norm", "k_norm"


def cast(weights: Weights, ops: NativeOps, quant: str = "", norm: Norm | None = None) -> Weights:
    """The weights in the dtype of the backend, quantized if requested, in panels. norm: the kind of all norms."""

    def typed(part: Any) -> Any:
        return None if part is None else type(part)(*(None if one is None else one.to(ops.dtype) for one in part))

    def normed(part: Any) -> Any:  # gains above one stay wide
        return part if norm is not None and norm.above_one else typed(part)

    def packed(part: Any, gated: bool = False) -> Any:
        return None if part is None else ops.pack(quantized(typed(part), quant), gated)

    layers = []
    for own in weights.layers:
        up, down = own.up or own.experts_up[0], own.down or own.experts_down[0]
        assert isinstance(up, Linear) and isinstance(down, Linear)
        gated = len(up.weight) == 2 * down.weight.shape[1]
        parts = {name: normed(getattr(own, name)) for name in NORMS}
        parts |= {name: packed(getattr(own, name)) for name in ("qkv", "out", "down")} | {"up": packed(own.up, gated)}
        parts |= {name: None if (one := getattr(own, name)) is None else ops.pack(typed(one)) for name in ("router", "shared_gate")}
        parts |= {"shared_up": packed(own.shared_up, True), "shared_down": packed(own.shared_down)}
        parts |= {"experts_up": tuple(packed(one, gated) for one in own.experts_up), "experts_down": tuple(map(packed, own.experts_down))}
        layers.append(LayerWeights(**parts, sink_logits=own.sink_logits))
    positions = None if weights.positions is None else weights.positions.to(ops.dtype)
    return Weights(weights.embed.to(ops.dtype), packed(weights.head), normed(weights.final_norm), tuple(layers), positions)


class Switched(NativeOps):
    """Counts whole passes as well as segments in `segments`. Refuses both unless `whole` is set, and passes unless `passes` is."""

    whole, passes, segments = True, True, 0

    def forward(self, *args: Any) -> ForwardResult | None:
        done = super().forward(*args) if self.whole and self.passes else None
        self.segments += done is not None
        return done

    def run(self, *args: Any) -> Tensor | None:
        done = super().run(*args) if self.whole else None
        self.segments += done is not None
        return done

    def experts(self, *args: Any) -> Tensor:
        return super().experts(*args) if self.whole else tensors(NumpyOps.experts(self.inner, *map(self.arrays, args)))


# ---- bits


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int16 if x.dtype == BF16 else torch.int32) if x.numel() else x


@dataclass(eq=False)
class Text:
    """A text in a runner. kept: the slots that each lane keeps once `cut` tokens are stored, None without an eviction. With a format of
    encoded pages, full pages are encoded there. The context of a text ends there or never. layers: those that run behind the context;
    merged: new contents of kept slots."""

    seq: Sequence
    cut: int = 0
    kept: list[list[int]] | None = None
    layers: Layers | None = None
    merged: Merged | None = None

    def sibling(self, tokens: list[int]) -> Text:
        own = self.seq
        return Text(text_of(99, tokens, own.cache, own.context), self.cut, self.kept, self.layers, self.merged)

    def work(self, rows: int, first: int = 0) -> Work:
        self.seq.layers = self.layers if self.seq.stored >= self.seq.context else None
        return Work(self.seq, rows, first)


def text_of(number: int, tokens: list[int], cache: CachePlan = PLAIN, context: int = 0) -> Sequence:
    """A sequence of which all rows give logits, like those of a prompt. A read of `cache` applies after the context."""
    request = Request("test", tokens, SamplingParams(prompt_logprobs=0), context=context)
    seq = Sequence(number, request, 0, list(tokens), 1 << 20, seed=0, sync_point=1 << 30)
    seq.cache = cache
    return seq


class Bench:
    """A runner with its results for every prefix of every text, and a second runner for the same prefix alone."""

    def __init__(self, family: str, dtype: torch.dtype, quant: str = "", *, sharing: bool = True, blocks: int = 60) -> None:
        self.spec, weights = model(family)
        self.ops = Switched(dtype)
        self.weights = cast(weights, self.ops, quant, FAMILIES[family].norm)
        self.runner = Runner(self.spec, self.weights, self.ops, blocks, sharing=sharing)
        self.single = Runner(self.spec, self.weights, self.ops, 24, sharing=False)
        for runner in (self.runner, self.single):
            for form in test_views.formats(dtype, LABELS, shipped=True, size=self.spec.head_dim).values():
                runner.memory.paged.define(form)
        self.results: list[tuple[Text, tuple[int, ...], Tensor | None, int]] = []  # the prefix, its logits, its argmax

    def step(self, texts: list[Text], rows: list[int], trees: list[TokenTree], first: list[int], taps: Taps) -> None:
        work = [text.work(n, cut) for text, n, cut in zip(texts, rows, first, strict=True)]
        view = self.runner.memory.reserve(work, trees)
        batch = Batch.pack(work, trees, view)
        out = self.runner.forward(batch, taps)
        logit_of = {row: i for i, row in enumerate(batch.logit_rows.tolist())}
        for s, (text, n, tree, cut) in enumerate(zip(texts, rows, trees, first, strict=True)):
            start, nodes, end = int(batch.starts[s]), int(batch.tree_starts[s]), int(batch.starts[s + 1])
            for row in range(start, end):
                if row not in logit_of:
                    continue
                prefix = text.seq.tokens[: text.seq.stored + (row - start + 1 if row < nodes else n)]
                if row >= nodes:
                    prefix = prefix + [int(tree.tokens[node]) for node in path_to(tree, cut + row - nodes)]
                i = logit_of[row]
                self.results.append((text, tuple(prefix), None if out.logits is None else out.logits[i], int(out.argmax[i])))

    def alone(self, text: Text, tokens: list[int], chunks: Callable[[], int]) -> dict[int, Tensor]:
        """Length of a prefix -> logits, of a text that runs alone and without trees."""
        sibling, table, found = text.sibling(tokens), self.single.memory.paged.table, {}
        table.open(sibling.seq)
        while sibling.seq.pending:
            n = min(sibling.seq.pending, chunks(), rows_to_cut(sibling))
            work = [sibling.work(n)]
            view = table.reserve(work, [EMPTY])
            self.single.memory.paged.store.zero(view.fresh)
            batch = Batch.pack(work, [EMPTY], view)
            out = self.single.forward(batch, Taps(logits=True))
            assert out.logits is not None
            for i, row in enumerate(batch.logit_rows.tolist()):
                found[sibling.seq.stored + row + 1] = out.logits[i]
            self.single.memory.paged.store.move(table.commit(work, [Accepted()]))
            evict(self.single, sibling)
        table.free(sibling.seq)
        return found

    def check(self, dice: random.Random) -> int:
        """Compares all results with those of the text alone, bit for bit. Returns the number of rows."""
        self.ops.whole = self.ops.passes = True
        ways = [lambda: 1000, lambda: 1, lambda: dice.choice([1, 2, 7, 33])]
        for text in {id(text): text for text, *_ in self.results}.values():
            line = self.alone(text, text.seq.tokens, ways[1])  # decoded one by one
            for chunks in (ways[0], ways[2]):
                for length, logits in self.alone(text, text.seq.tokens, chunks).items():
                    assert torch.equal(bits(logits), bits(line[length])), f"{length} tokens, another chunking"
            paths: dict[tuple[int, ...], Tensor] = {}  # of trees; the longest first, which gives the others too
            for own, prefix, logits, best in sorted(self.results, key=lambda result: -len(result[1])):
                if own is not text:
                    continue
                if prefix == tuple(text.seq.tokens[: len(prefix)]) and len(prefix) in line:
                    expected = line[len(prefix)]
                else:
                    if prefix not in paths:
                        found = self.alone(text, list(prefix), ways[0])
                        paths.update((prefix[:length], row) for length, row in found.items())
                    expected = paths[prefix]
                assert best == int(expected.argmax())
                assert logits is None or torch.equal(bits(logits), bits(expected)), f"{len(prefix)} tokens of {len(text.seq.tokens)}"
        return len(self.results)


def path_to(tree: TokenTree, node: int) -> list[int]:
    path = [node]
    while (parent := int(tree.parents[path[-1]])) >= 0:
        path.append(parent)
    return path[::-1]


def rows_to_cut(text: Text) -> int:
    """The number of rows up to the place where slots are evicted, pages are encoded or the context ends; no chunk crosses it."""
    left = text.cut - text.seq.stored
    return left if (text.kept is not None or text.seq.cache.encoded or text.seq.context) and left > 0 else 1000


def evict(runner: Runner, text: Text) -> None:
    if text.seq.stored != text.cut:
        return
    if text.kept is not None:
        runner.memory.paged.keep(text.seq, Kept(text.kept, text.merged))
    if text.seq.cache.encoded:
        runner.memory.paged.encode(text.seq)


def random_tree(dice: random.Random, largest: int) -> TokenTree:
    n = dice.randint(0, largest)
    deep = dice.random() < 0.4  # long paths among siblings
    parents = [dice.randint(max(-1, i - 3), i - 1) if deep else dice.randint(-1, i - 1) for i in range(n)]
    return TokenTree.build([dice.randrange(VOCAB) for _ in range(n)], parents, vocab=VOCAB, rows=largest, depth=largest)


def random_path(dice: random.Random, tree: TokenTree) -> list[int]:
    path: list[int] = []
    while kids := [i for i in range(len(tree)) if tree.parents[i] == (path[-1] if path else -1)]:
        if dice.random() < 0.15:
            break
        path.append(dice.choice(kids))
    return path


@dataclass(frozen=True)
class Reading(test_views.Even):
    """Every third key, and others by their labels."""

    every: int = 3
    dense_up_to: int = field(default=0)


LABELS, UNLABELLED = Reading(), Reading(8, labels=False)


def merged(kept: list[list[int]], size: int, dice: random.Random) -> Merged:
    """Random contents of some kept slots."""
    pairs = [(lane, slot) for lane, slots in enumerate(kept) for slot in range(len(slots)) if dice.random() < 0.2]
    lanes, slots = np.array(pairs, np.int32).reshape(-1, 2).T
    keys, values = np.random.default_rng(dice.randrange(99)).standard_normal((2, len(pairs), size), np.float32)
    return Merged(lanes, slots, keys, values, np.array([dice.randint(1, 9) for _ in pairs], np.int32))


def random_texts(bench: Bench, dice: random.Random) -> list[Text]:
    """Texts with common prefixes, all kinds of lanes, some evictions and all kinds of views; one may skip a layer."""
    stem = [dice.randrange(VOCAB) for _ in range(100)]
    two_bits = [] if bench.spec.head_dim % 4 else ["2-bit blocks"]
    lanes = [Lanes.SHARED, Lanes.SHARED, dice.choice(list(Lanes)), dice.choice([Lanes.PER_LAYER, Lanes.PER_HEAD]), Lanes.PER_HEAD]
    texts = []
    for i, kind in enumerate(lanes):
        tokens = stem[: dice.choice([0, 40, 70, 100])] + [dice.randrange(VOCAB) for _ in range(dice.choice([1, 5, 30]))]
        form, encoded = "", ""
        if kind is Lanes.PER_HEAD:
            form, encoded = (
                dice.choice(["", "int8", "labelled"]),
                dice.choice(["", "blocks", *two_bits]),
            )
        some = tuple(tuple(dice.random() < 0.5 for _ in range(bench.spec.kv_heads)) for _ in range(LAYERS))
        apart = Window(dice.choice([0, 3]), 20, turned=dice.random() < 0.3, heads=some)
        window = dice.choice([None, Window(3, 20), Window(0, 9), Window(40, 30), apart]) if i else None
        read = dice.choice([None, UNLABELLED, replace(UNLABELLED, by_head=True)]) if i else None
        if form == "labelled" or (form and dice.random() < 0.5):
            read = dice.choice([LABELS, replace(LABELS, by_head=True)])
        context = dice.choice([0, 0, len(tokens)])
        cache = CachePlan(lanes=kind, format=form, encoded=encoded, window=window, read=read)
        text = Text(text_of(i, tokens, cache, context), len(tokens))
        if kind is not Lanes.SHARED and not encoded and dice.random() < 0.7 and len(tokens) > 3:
            count = LAYERS * (bench.spec.kv_heads if kind is Lanes.PER_HEAD else 1)
            text.kept = [sorted(dice.sample(range(len(tokens)), dice.randint(1, len(tokens)))) for _ in range(count)]
            if kind is Lanes.PER_HEAD and dice.random() < 0.5:
                text.merged = merged(text.kept, bench.spec.head_dim, dice)
        texts.append(text)
    if dice.random() < 0.3:
        texts[-1].layers = Layers.whole({0, 2})
    for text in texts:
        if (own := text.seq.cache).lanes is not Lanes.SHARED or own.window or own.read or text.layers:
            text.seq.shareable_tokens = 0
    return texts


def program(bench: Bench, seed: int, set_threads: Callable[[int], None], steps: int = 5) -> None:
    """Texts start one by one and run in random batches, with chunks and trees, random threads, taps and segments of layers."""
    dice = random.Random(seed)
    texts, table = random_texts(bench, dice), bench.runner.memory.paged.table
    waiting, running = list(texts), []
    for number in range(steps):
        while waiting and (not running or dice.random() < 0.5):
            text = waiting.pop(0)
            table.open(text.seq)
            if text.seq.shareable_tokens:
                table.attach(text.seq, table.match(text.seq.tokens, ""))
            running.append(text)
        some = [text for text in running if dice.random() < 0.8] or running[:1]
        dice.shuffle(some)
        rows = [min(text.seq.pending, rows_to_cut(text), dice.choice([1, 2, 7, 33, 64])) for text in some]
        done = [n == text.seq.pending for text, n in zip(some, rows, strict=True)]
        trees = [
            random_tree(dice, 70 if dice.random() < 0.1 else 9) if end and rows_to_cut(t) == 1000 else EMPTY
            for t, end in zip(some, done, strict=True)
        ]
        cuts = [dice.randint(1, len(tree)) if len(tree) and dice.random() < 0.4 else len(tree) for tree in trees]
        workers = dice.choice([1, 2, 3])
        bench.ops.whole, bench.ops.passes = dice.random() < 0.7, dice.random() < 0.5
        set_threads(workers if bench.ops.whole else max(1, workers - 1))  # for each operation, workers that other processes delay wait
        hidden = frozenset(i for i in range(LAYERS) if dice.random() < 0.4) if dice.random() < 0.4 else frozenset[int]()
        watches = {s: (Watch("mass", dice.randrange(50)),) for s in range(len(some)) if dice.random() < 0.3}
        taps = Taps(hidden, logits=dice.random() < 0.8, attention=watches)
        heads = [TokenTree(tree.tokens[:cut], tree.parents[:cut], tree.kinds[: cut + 1]) for tree, cut in zip(trees, cuts, strict=True)]
        bench.step(some, rows, heads, [0] * len(some), taps)
        grown = [s for s in range(len(some)) if cuts[s] < len(trees[s])]
        if grown:
            later = replace(taps, attention={i: watches[s] for i, s in enumerate(grown) if s in watches})
            bench.step(*([part[s] for s in grown] for part in (some, rows, trees, cuts)), later)  # type: ignore[arg-type]
        paths = [random_path(dice, tree) for tree in trees]
        accepted = [
            Accepted(tuple(path), (*(int(tree.tokens[i]) for i in path), dice.randrange(VOCAB))) if end else Accepted()
            for path, tree, end in zip(paths, trees, done, strict=True)
        ]
        works = [Work(text.seq, n) for text, n in zip(some, rows, strict=True)]
        bench.runner.memory.paged.store.move(table.commit(works, accepted))
        for text in some:
            evict(bench.runner, text)
            table.publish(text.seq)
        table.check()
        if number == steps - 2 and running[0].seq.cache.lanes is Lanes.SHARED:  # pages of a text that is gone are found again
            table.free(running.pop(0).seq)
    set_threads(1)
    assert bench.check(dice) > 12
    for text in running:
        table.free(text.seq)


@pytest.mark.parametrize("family", FAMILIES)
@DTYPES
def test_a_row_has_the_bits_that_it_has_alone(family: str, dtype: torch.dtype, threads: Callable[[int], None]) -> None:
    bench = Bench(family, dtype)
    program(bench, zlib.crc32(f"{family} {dtype}".encode()), threads)
    assert bench.ops.segments


@pytest.mark.parametrize(
    ("family", "quant"),
    [
        *(("llama", quant) for quant in ("int8", "int4", "outliers", "low tops")),
        *(("mixtral", "outliers"), ("gemma", "wide"), ("shared", "int8"), ("mixtral", "int4"), ("shared", "low tops")),
        *(("gpt-oss", ""), ("gpt-oss", "int8")),
    ],
)
@DTYPES
def test_a_row_of_codes_has_the_bits_that_it_has_alone(family: str, quant: str, dtype: torch.dtype, threads: Callable[[int], None]) -> None:
    bench = Bench(family, dtype, quant)
    program(bench, zlib.crc32(f"{family} {quant} {dtype}".encode()), threads)
    assert bench.ops.segments


@DTYPES
def test_a_long_shared_prefix_is_read_once_with_the_same_bits(dtype: torch.dtype, threads: Callable[[int], None]) -> None:
    """Whole groups of 16 pages are attended for all sequences together; groups of one row by different threads."""
    bench, dice = Bench("llama", dtype, blocks=90), random.Random(1)
    stem = [dice.randrange(VOCAB) for _ in range(555)]
    texts = [Text(text_of(i, [*stem[: 555 - i], dice.randrange(VOCAB)])) for i in range(3)]
    texts.append(Text(text_of(3, stem[:490] + [dice.randrange(VOCAB) for _ in range(60)])))  # leaves the others in the group's last page
    table = bench.runner.memory.paged.table
    for text in texts:
        table.open(text.seq)
        table.attach(text.seq, table.match(text.seq.tokens, ""))
        while text.seq.pending:
            n = min(text.seq.pending, 300)
            threads(2)
            bench.step([text], [n], [EMPTY], [0], Taps(logits=True))
            bench.runner.memory.paged.store.move(
                table.commit([Work(text.seq, n)], [Accepted((), (dice.randrange(VOCAB),)) if n == text.seq.pending else Accepted()])
            )
            table.publish(text.seq)
            if n < 250:
                break
    shared = [table.reserve([Work(text.seq, 1)], [EMPTY]).pages[0][0, :16].tolist() for text in texts]
    for text in texts:
        table.discard(text.seq)
    assert shared[0] == shared[1] == shared[2], "nothing was shared"
    assert shared[3][:15] == shared[0][:15] and shared[3][15] != shared[0][15]
    for workers in (1, 2, 3):
        threads(workers)
        tree = random_tree(dice, 9)
        bench.step(texts, [1] * 4, [tree, EMPTY, random_tree(dice, 9), EMPTY], [0] * 4, Taps(logits=True))
        for text in texts:
            table.discard(text.seq)
    threads(1)
    bench.check(dice)


@DTYPES
@pytest.mark.parametrize(
    ("family", "quant"),
    [
        *((family, "") for family in ("llama", "qwen3", "gpt2", "mixtral", "shared", "gemma", "olmo", "granite", "neox", "cohere")),
        *((family, "") for family in ("beside", "granite-moe", "stablelm", "sinks")),
        *(("mixtral", "int8"), ("shared", "int4"), ("mixtral", "outliers"), ("shared", "wide low tops")),
        *(("mistral", "int8"), ("llama", "int4"), ("gemma", "int8"), ("granite", "low"), ("cohere", "wide tops"), ("olmo", "int4")),
    ],
)
def test_a_pass_in_one_call_gives_the_same_bits(family: str, quant: str, dtype: torch.dtype, threads: Callable[[int], None]) -> None:
    """Chunks of prompts, decodes, and trees whose tail an earlier pass began; one call for all layers and the head, several, or one for
    each operation."""
    bench, dice = Bench(family, dtype, quant), random.Random(8)
    table = bench.runner.memory.paged.table
    texts = [text_of(i, [dice.randrange(VOCAB) for _ in range(n)]) for i, n in enumerate((70, 40, 3, 550))]
    for seq in texts:
        table.open(seq)

    every = [Taps(), Taps(top_k=5), Taps(logits=True), Taps(top_k=3, logits=True)]

    def compare(rows: list[int], trees: list[TokenTree], first: int = 0, asked: list[Taps] = every) -> None:
        works = [Work(seq, n, first) for seq, n in zip(texts, rows, strict=True)]
        pages = table.reserve(works, trees)
        bench.runner.memory.paged.store.zero(pages.fresh)
        batch = Batch.pack(works, trees, pages)
        threads(1)
        bench.ops.whole, bench.ops.passes, before = False, False, bench.ops.segments
        apart = bench.runner.forward(batch, Taps(top_k=5, logits=True))
        assert bench.ops.segments == before and apart.top_k is not None and apart.logits is not None
        for taps in asked:
            for bench.ops.whole, bench.ops.passes in ((True, True), (True, False)):
                before = bench.ops.segments
                threads(dice.choice([1, 2, 3]))
                one = bench.runner.forward(batch, taps)
                assert bench.ops.segments - before == 1, "not one call"
                assert one.argmax.tolist() == apart.argmax.tolist() and len(one.argmax) == len(batch.logit_rows)
                assert (one.top_k is None) == (not taps.top_k) and (one.logits is None) == (not taps.logits)
                assert one.top_k is None or np.array_equal(one.top_k, apart.top_k[:, : taps.top_k])
                assert one.logits is None or torch.equal(bits(one.logits), bits(apart.logits))

    compare([69, 38, 2, 300], [EMPTY] * 4, asked=every[-1:])
    table.commit([Work(seq, n) for seq, n in zip(texts, [69, 38, 2, 300], strict=True)], [Accepted()] * 4)
    grown = [tree for tree in (random_tree(dice, 70) for _ in range(30)) if len(tree) > 2][:2]
    rows, trees = [1, 2, 1, 250], [grown[0], EMPTY, grown[1], EMPTY]
    heads = [TokenTree(tree.tokens[:2], tree.parents[:2], tree.kinds[:3]) if len(tree) else EMPTY for tree in trees]
    compare(rows, heads)
    texts, rows, trees = [texts[0], texts[2]], [1, 1], grown
    compare(rows, trees, 2)


@DTYPES
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_stay_as_they_were_reported(family: str, dtype: torch.dtype) -> None:
    """Hidden states of a layer, although later layers run too; segments and single operations give the same."""
    bench, reported = Bench(family, dtype), []
    tokens = [random.Random(5).randrange(VOCAB) for _ in range(9)]
    for whole in (True, False):
        bench.ops.whole = whole
        for layers in ({0, 1, 2}, {0}, {1}):
            text = Text(text_of(len(reported), tokens))
            bench.runner.memory.open(text.seq)
            work = [Work(text.seq, 9)]
            pages = bench.runner.memory.reserve(work, [EMPTY])
            hidden = bench.runner.forward(Batch.pack(work, [EMPTY], pages), Taps(frozenset(layers))).hidden
            assert set(hidden) == layers
            reported.append(hidden)
    assert bench.ops.segments == 3 + 2 + 2
    for hidden in reported:
        for layer, states in hidden.items():
            assert torch.equal(bits(states), bits(reported[-3][layer]))
    assert not torch.equal(reported[0][0], reported[0][1])


@DTYPES
def test_statistics_depend_on_nothing_beside_them(dtype: torch.dtype, threads: Callable[[int], None]) -> None:
    """The same bits with other threads, batches and watches, and if layers run operation by operation."""
    bench, dice = Bench("mistral", dtype, blocks=90), random.Random(2)
    table, watch = bench.runner.memory.paged.table, Watch("mass", 40)
    texts = [Text(text_of(i, [dice.randrange(VOCAB) for _ in range(n)], CachePlan(lanes=kind))) for i, (n, kind) in enumerate(SEVERAL)]
    for text in texts:
        table.open(text.seq)

    def step(some: list[Text], rows: int, tree: TokenTree, watches: tuple[Watch, ...]) -> WeightSums:
        works, trees = [Work(text.seq, rows) for text in some], [tree] * len(some)
        pages = table.reserve(works, trees)
        bench.runner.memory.paged.store.zero(pages.fresh)
        mine = some.index(texts[0])
        taps = Taps(attention={s: watches if s == mine else (Watch("low"),) for s in range(len(some)) if s == mine or s % 2})
        out = bench.runner.forward(Batch.pack(works, trees, pages), taps)
        assert set(out.attention) == set(taps.attention)
        return out.attention[mine]

    tree = random_tree(random.Random(4), 9)
    for rows, nodes in ((550, EMPTY), (1, tree)):
        found = []
        for some in (texts[:1], texts, texts[::-1]):
            for whole, watches in ((True, (watch,)), (False, (watch,)), (True, (watch, Watch("low")))):
                bench.ops.whole, before = whole, bench.ops.segments
                threads(dice.choice([1, 2, 3]) if whole else 1)
                found.append(step(some, rows, nodes, watches))
                assert (bench.ops.segments > before) == whole, "a watched batch is one call"
                for text in some:
                    table.discard(text.seq)
        for seen in found[1:]:
            assert torch.equal(bits(seen.chain[0]), bits(found[0].chain[0])) and torch.equal(bits(seen.nodes[0]), bits(found[0].nodes[0]))
        reported = torch.tensor(max(0, rows - 40) if nodes is EMPTY else rows).double()
        totals = found[0].chain[0].sum(-1), found[0].nodes[0].sum(-1)
        torch.testing.assert_close(totals[0], reported.expand_as(totals[0]), rtol=1e-5, atol=0)
        torch.testing.assert_close(totals[1], torch.ones_like(totals[1]), rtol=1e-5, atol=0)
        step(texts, rows, EMPTY, (watch,))
        bench.runner.memory.paged.store.move(table.commit([Work(text.seq, rows) for text in texts], [Accepted() for _ in texts]))


@pytest.mark.parametrize("family", FAMILIES)
def test_models_compute_what_the_reference_defines(family: str) -> None:
    spec, weights = model(family)
    bench, dice = Bench(family, F32), random.Random(3)
    tokens = [dice.randrange(VOCAB) for _ in range(70)]
    found = bench.alone(Text(text_of(0, tokens)), tokens, lambda: 33)

    def exact(part: Any) -> Any:
        if isinstance(part, LayerWeights | Weights):
            return type(part)(**{name: exact(value) for name, value in vars(part).items()})
        if isinstance(part, tuple):
            return type(part)(*map(exact, part)) if hasattr(part, "_fields") else tuple(map(exact, part))
        return None if part is None else part.double()

    runner = Runner(spec, exact(weights), Reference(), 4)
    seq = text_of(0, tokens)
    runner.memory.open(seq)
    work = [Work(seq, 70)]
    view = runner.memory.reserve(work, [EMPTY])
    out = runner.forward(Batch.pack(work, [EMPTY], view), Taps(logits=True))
    assert out.logits is not None
    mine = torch.stack([found[n] for n in range(1, 71)])
    assert (mine.double() - out.logits).abs().max() <= 1e-5 * out.logits.abs().max()
    assert (mine.argmax(-1) == out.logits.argmax(-1)).all()


# ---- mixtures of experts


def mixture_of(ops: Any, seed: int, quant: str = "", gated: bool = True, router: Linear | None = None) -> LayerWeights:
    """Nine experts, hidden size 33, of experts 20."""
    shapes = (1, (9, 40 if gated else 20, 33)), (2, (9, 33, 20))
    ups, downs = ([quantized(Linear(part), quant) for part in randn(seed + i, *shape, dtype=ops.dtype) / 5] for i, shape in shapes)
    router = router or Linear(randn(seed + 3, 9, 33, dtype=ops.dtype))
    packed = tuple(ops.pack(one, gated) for one in ups), tuple(map(ops.pack, downs))
    return LayerWeights(router, router, router=ops.pack(router), experts_up=packed[0], experts_down=packed[1])


@DTYPES
@few(12)
@given(
    st.integers(1, 70),
    st.integers(1, 9),
    st.booleans(),
    st.sampled_from(["", "int8", "int4", "outliers", *FORMS[1:]]),
    st.booleans(),
    st.integers(0, 99),
    st.integers(1, 3),
)
@example(3, 4, True, "outliers", True, 5, 2)
def test_experts(dtype: torch.dtype, rows: int, top_k: int, renormalise: bool, quant: str, gated: bool, seed: int, workers: int) -> None:
    """The bits of a row are those that it has alone and in single operations, whichever rows chose its experts: experts are added in
    ascending order."""
    ops, mlp = NativeOps(dtype), Mlp(20, "silu" if gated else "relu", gated)
    mixture, x = Experts(9, top_k, mlp, renormalise), randn(seed, rows, 33, dtype=dtype)
    packed = mixture_of(ops, seed, quant, gated)
    ops.use_threads(workers)
    found, turned = ops.experts(x, packed, mixture), ops.experts(x.flip(0), packed, mixture)
    ops.use_threads(1)
    assert torch.equal(bits(turned.flip(0)), bits(found))
    apart = NumpyOps.experts(ops.inner, *map(ops.arrays, (x, packed, mixture)))
    assert torch.equal(bits(found), bits(tensors(apart)))
    for i in range(rows):
        assert torch.equal(bits(ops.experts(x[i : i + 1], packed, mixture)[0]), bits(found[i]))
    logits = ops.linear(x, packed.router)  # type: ignore[arg-type]
    share, chosen = map(tensors, ops._route(arrays(logits), mixture))
    chances = logits.double().softmax(-1)
    kept = chances.gather(1, chosen.long())
    assert (kept.amin(1) >= chances.topk(top_k).values[:, -1] * (1 - 1e-5)).all() and (chosen.diff() > 0).all()
    torch.testing.assert_close(
        share.double(), kept / kept.sum(1, keepdim=True) if renormalise else kept, rtol=2 * HALF[dtype] + 1e-5, atol=0
    )
    for row, expected in enumerate(found):
        total = torch.zeros(33, dtype=dtype)
        for e, part in sorted(zip(chosen[row].tolist(), share[row], strict=True)):
            inner = ops.activate(ops.linear(x[row, None], packed.experts_up[e]), mlp.activation, gated)
            total = total + (ops.linear(inner, packed.experts_down[e]) * part)[0]
        assert torch.equal(bits(total), bits(expected))


@pytest.mark.parametrize("backend", [NativeOps, TorchOps, Reference])
def test_of_equal_experts_the_first_are_chosen(backend: Any) -> None:
    """Also by a row of zeros. A row that is no number changes nothing beside it."""
    ops = backend() if backend is Reference else backend(F32)
    router = Linear(randn(1, 3, 33, dtype=ops.dtype).repeat_interleave(3, 0))
    x = torch.cat([randn(2, 5, 33), torch.zeros(1, 33), torch.full((1, 33), math.nan)]).to(ops.dtype)
    weights = mixture_of(ops, 3, router=router)
    found = ops.experts(x, weights, Experts(9, 2, Mlp(20)))
    best = (x[:6] @ router.weight[::3].T).argmax(1).tolist()
    assert len(set(best[:5])) > 1
    for row, group in enumerate(best):
        first = weights.experts_up[3 * group : 3 * group + 2], weights.experts_down[3 * group : 3 * group + 2]
        two = replace(weights, router=ops.pack(Linear(router.weight[:2])), experts_up=first[0], experts_down=first[1])
        torch.testing.assert_close(found[row, None], ops.experts(x[row, None], two, Experts(2, 2, Mlp(20))))
    assert found[6].isnan().all() and found[:6].isfinite().all()


@dataclass(frozen=True)
class Newer(Experts):
    """Has a field that the kernels do not know."""

    limit: float = 7.0


@pytest.mark.parametrize("case", ["forms", "fields"])
def test_mixtures_that_the_kernels_do_not_know(case: str) -> None:
    """They run one operation at a time, and so do models with them."""
    bench, x = Bench("mixtral", F32), randn(1, 7, 40)
    own = bench.weights.layers[0]
    experts = bench.spec.layers[0].mlp
    assert isinstance(experts, Experts)
    if case == "forms":
        other = Bench("mixtral", F32, "int8").weights.layers[0].experts_up[2]
        own = replace(own, experts_up=(*own.experts_up[:2], other, *own.experts_up[3:]))
    else:
        experts = Newer(experts.count, experts.top_k, experts.mlp)
    spec = replace(bench.spec, layers=(replace(bench.spec.layers[0], mlp=experts), *bench.spec.layers[1:]))
    weights = replace(bench.weights, layers=(own, *bench.weights.layers[1:]))
    assert torch.equal(
        bits(bench.ops.experts(x, own, experts)),
        bits(tensors(NumpyOps.experts(bench.ops.inner, *map(bench.ops.arrays, (x, own, experts))))),
    )
    runner, seq = Runner(spec, weights, bench.ops, 4), text_of(0, [1, 2, 3])
    runner.memory.open(seq)
    work = [Work(seq, 3)]
    assert runner.forward(Batch.pack(work, [EMPTY], runner.memory.reserve(work, [EMPTY]))).argmax.min() >= 0
    assert not bench.ops.segments


@pytest.mark.parametrize(
    ("family", "quant"),
    [("mixtral", None), ("mixtral", "int8:outliers=3"), ("qwen2-moe", "int4"), ("granite-moe", None), ("qwen3-moe-mixed", "int8")],
)
def test_a_mixture_from_its_files(family: str, quant: str | None, tmp_path: Path) -> None:
    """Every backend gives the same greedy texts. Native texts are the same alone, in a batch and with drafts, also sampled."""
    folder = str(tiny_llama(tmp_path, family=family))
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    sampled = SamplingParams(temperature=1, seed=5, max_tokens=20, ignore_eos=True)
    prompts, texts, alone = ["def f(x):", "a", "one two three " * 3, "class A:"], {}, []

    def run(llm: LLM, params: SamplingParams, some: list[str]) -> list[list[int]]:
        return [out.outputs[0].token_ids for out in llm.generate(some, params)]

    for backend in ("native", "torch", "reference"):
        llm = LLM(folder, backend=backend, dtype="float32", quant=quant, draft="none", threads=1, cache_memory=1 << 22)
        texts[backend] = run(llm, greedy, prompts)
        if backend == "native":
            experts = llm.runner.weights.layers[1].experts_up + llm.runner.weights.layers[1].experts_down
            assert len(experts) == 10 and all(isinstance(one, Packed) for one in experts)
            alone = [[run(llm, params, [one])[0] for one in prompts] for params in (greedy, sampled)]
    for draft, workers in (("none", 2), ("token-recycling", 1)):
        other = LLM(folder, backend="native", dtype="float32", quant=quant, draft=draft, threads=workers, cache_memory=1 << 22)
        assert [run(other, params, prompts) for params in (greedy, sampled)] == alone, draft
    assert texts["native"] == texts["torch"] == texts["reference"]
    assert len({tuple(text) for text in texts["native"]}) == len(prompts)


# ---- noise


@few(50)
@given(st.integers(0, 2**64 - 1), st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=40), st.sampled_from([0.0, 1.0, 30.0, 1e6]))
@example(0, list(range(2000)), 0.0)
@example(2**64 - 1, [0, 2**31 - 1], 0.0)
def test_the_drawn_place_is_the_definitions(key: int, ids: list[int], spread: float) -> None:
    own = np.array(ids, np.int64)
    values = np.random.default_rng(key % 997).normal(0, spread, len(own)) if spread else np.zeros(len(own))
    for some, logits in ((own, values), (own[::2], values[::2]), (own, np.where(own % 3 > 0, values, -np.inf))):
        assert NativeOps().draw(key, some, logits) == draw(key, some, logits)


def test_near_sums_are_left_to_the_definition() -> None:
    """Every id has the same noise if it occurs again, so sums are equal, or a rounding apart, in places far from each other."""
    ids = np.tile(np.arange(700), 3)
    for key in range(60):
        for apart in (0.0, 1e-12, -1e-12):
            values = np.repeat([0.0, apart, 2 * apart], 700)
            assert NativeOps().draw(key, ids, values) == draw(key, ids, values)
    many = np.zeros(5000, np.int64)  # more contenders than are listed
    assert NativeOps().draw(3, many, np.zeros(5000)) == draw(3, many, np.zeros(5000)) == 0


def test_a_whole_vocabulary_is_drawn_as_defined() -> None:
    ids = np.arange(50_257)
    for key in range(200):
        values = np.random.default_rng(key).normal(0, 0.01 + key % 7, len(ids))
        assert NativeOps().draw(key, ids, values) == draw(key, ids, values)


# ---- codes


def codes(outs: int, ins: int, group: int, biased: bool, seed: int, outliers: int = 0, form: str = "") -> Quantized:
    """form: of the codes of groups, words of "wide", "low" and "tops", see Quantized."""
    weights = Linear(randn(seed, outs, ins), randn(seed + 1, outs) if biased else None)
    made = by_group(weights, group) if group else by_output(weights)
    made = of_form(made, form.split(), seed) if form else made
    if not outliers:
        return made
    columns = torch.randperm(ins, generator=torch.Generator().manual_seed(seed))[:outliers].sort().values
    return replace(made, codes=made.codes.index_fill(1, columns, 0), columns=columns, side=weights.weight[:, columns])


def of_form(made: Quantized, words: list[str], seed: int) -> Quantized:
    generator = torch.Generator().manual_seed(seed)
    least, most = (-127, 127) if "wide" in words else (0, 15) if "low" in words else (-8, 7)
    drawn = torch.randint(least, most + 1, made.shape, generator=generator, dtype=torch.int8)
    outs, groups = made.scale.shape
    per = 3 if "tops" in words else 1

    def halves(count: int) -> Tensor:
        return (0.1 * torch.randn(outs, count, generator=generator)).half()

    def factors() -> Tensor:
        return torch.randint(-32, 64, (outs, groups), generator=generator, dtype=torch.int8)

    tops = -(-groups // per)
    if per > 1:
        made = replace(made, scale=factors(), top=halves(tops), per=per)
        low = {"low": factors(), "bottom": halves(tops)}
    else:
        made, low = replace(made, scale=halves(groups)), {"low": halves(groups)}
    return replace(made, codes=drawn, wide="wide" in words, **(low if "low" in words else {}))


@DTYPES
@pytest.mark.parametrize("form", FORMS[1:])
@few(12)
@given(
    st.integers(1, 40),
    st.sampled_from(SIZES),
    st.sampled_from(SIZES),
    st.sampled_from([16, 32, 64, 112]),
    st.booleans(),
    st.integers(0, 99),
)
def test_codes_of_files_are_multiplied_as_defined(
    dtype: torch.dtype, form: str, rows: int, outs: int, ins: int, group: int, biased: bool, seed: int
) -> None:
    ops, weights = NativeOps(dtype), codes(outs, ins, group, biased, seed, form=form)
    x = (randn(seed + 2, rows, ins) * 10 ** (seed % 5 - 2)).to(dtype)
    found = ops.linear(x, ops.pack(weights))
    assert torch.equal(bits(found), bits(torch.stack([quantized_row(row, weights) for row in x])))
    if ins > 1:
        assert torch.equal(bits(found), bits(product(x, weights))) and torch.equal(bits(found), bits(product(x, weights.halved())))
    if outs % 2 == 0:
        assert torch.equal(bits(found), bits(ops.linear(x, ops.pack(weights, True))))
    for r in range(0, rows, 7):
        assert torch.equal(bits(found[r]), bits(ops.linear(x[r, None], ops.pack(weights))[0]))


@DTYPES
@pytest.mark.parametrize("group", [0, 32, 64, 128], ids=["int8", "int4-32", "int4-64", "int4-128"])
@few(20)
@given(
    st.integers(1, 40), st.sampled_from(SIZES), st.sampled_from(SIZES), st.booleans(), st.sampled_from([0, 0, 1, 5, 17]), st.integers(0, 99)
)
@example(19, 100, 100, True, 17, 0)
@example(3, 65, 8, False, 17, 0)
def test_codes_are_multiplied_as_defined(
    dtype: torch.dtype, group: int, rows: int, outs: int, ins: int, biased: bool, outliers: int, seed: int
) -> None:
    """Outlier columns, if any, are much larger than the others."""
    ops, weights = NativeOps(dtype), codes(outs, ins, group, biased, seed, outliers)
    x = (randn(seed + 2, rows, ins) * 10 ** (seed % 5 - 2)).to(dtype)
    if weights.columns is not None:
        x[:, weights.columns] *= 100
    x[-1] = 0
    found = ops.linear(x, ops.pack(weights))
    assert torch.equal(bits(found), bits(torch.stack([quantized_row(row, weights) for row in x])))
    if ins > 1:  # PyTorch's product of int8 is wrong for one column
        assert torch.equal(bits(found), bits(product(x, weights)))
    if outs % 2 == 0:
        assert torch.equal(bits(found), bits(ops.linear(x, ops.pack(weights, True))))


@DTYPES
@pytest.mark.parametrize("group", [0, 32], ids=["int8", "int4"])
@pytest.mark.parametrize("odd", [0.0, 1e-40, 1e38, math.nan, math.inf, -math.inf])
def test_rows_that_have_no_codes(odd: float, group: int, dtype: torch.dtype) -> None:
    """Rows of zeros, of numbers with an infinite inverse, and of NaN follow ops/quantized.py."""
    ops, weights, x = NativeOps(dtype), codes(70, 50, group, True, 0), randn(1, 3, 50, dtype=dtype)
    x[1] = odd if abs(odd) < 1 else x[1]
    x[1, 20] = odd
    found, expected = ops.linear(x, ops.pack(weights)), product(x, weights)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(0), expected.nan_to_num(0))


@DTYPES
@pytest.mark.parametrize("odd", [1e38, math.nan, math.inf, -math.inf])
def test_an_outlier_that_has_no_code_is_multiplied(odd: float, dtype: torch.dtype) -> None:
    """Numbers in an outlier column do not affect the scale of the row."""
    ops, weights, x = NativeOps(dtype), codes(70, 50, 0, True, 0, 4), randn(1, 3, 50, dtype=dtype)
    assert weights.columns is not None
    x[1, weights.columns[2]] = odd
    found, expected = ops.linear(x, ops.pack(weights)), product(x, weights)
    assert torch.equal(found.isnan(), expected.isnan()) and bool(found.isnan().any()) == math.isnan(odd)
    assert torch.equal(found.nan_to_num(0), expected.nan_to_num(0))


def test_codes_of_odd_groups_are_pytorchs() -> None:
    """If groups do not end at multiples of 16 columns there are no panels, and the product is the same."""
    ops, weights, x = NativeOps(), codes(70, 50, 8, True, 0), randn(1, 5, 50)
    packed = ops.pack(weights)
    assert isinstance(packed, Quantized)
    assert torch.equal(ops.linear(x, packed), product(x, weights))


@pytest.mark.parametrize("outliers", [1, 5])
def test_the_largest_of_the_head_are_those_of_its_product(outliers: int) -> None:
    ops, weights = NativeOps(), codes(300, 40, 0, False, 0, outliers)
    plan: Any = SimpleNamespace(batch=SimpleNamespace(logit_rows=np.arange(9, dtype=np.int32)))
    held = Weights(randn(0, 300, 40), ops.pack(weights), NormWeights(torch.ones(40)), ())
    x = ops.norm(randn(1, 9, 40), held.final_norm, Norm())
    assert ops.head(randn(1, 9, 40), held, Norm(), plan, Taps()).argmax.tolist() == product(x, weights).argmax(-1).tolist()


@pytest.mark.parametrize(("outs", "ins"), [(1, 1), (63, 40), (130, 101)])
@pytest.mark.parametrize("biased", [True, False])
def test_rows_are_given_back(biased: bool, outs: int, ins: int) -> None:
    keep = np.array([0, outs - 1, outs // 2, 0])
    bias = randn(7, outs) if biased else None
    for dtype in (F32, BF16):
        weights = Linear(randn(3, outs, ins, dtype=dtype), None if bias is None else bias.to(dtype))
        packed = NativeOps(dtype).pack(weights)
        assert isinstance(packed, Packed)
        some = tensors(packed.rows(keep))
        assert isinstance(some, Linear)
        for found, expected in zip(some, weights.rows(keep), strict=True):
            assert (found is None) == (expected is None)
            assert found is None or (found.dtype == dtype and torch.equal(found, expected))
    for group, outliers, form in ((0, 0, ""), (32, 0, ""), (128, 0, ""), (0, 5, ""), (32, 1, ""), *((32, 0, form) for form in FORMS[1:])):
        weights8, ops, x = codes(outs, ins, group, biased, 3, outliers, form), NativeOps(), randn(4, 3, ins)
        part: Any = ops.pack(weights8)
        few = tensors(part.rows(keep))
        assert isinstance(few, Quantized)
        assert torch.equal(few.whole(), weights8.whole()[keep]) and torch.equal(few.dense(), weights8.dense()[keep])
        if weights8.columns is not None and weights8.side is not None:
            assert few.columns is not None and few.side is not None
            assert torch.equal(few.columns, weights8.columns) and torch.equal(few.side, weights8.side[keep])
        assert torch.equal(ops.linear(x, ops.pack(few)), ops.linear(x, part)[:, keep])


# ---- what it does not do


@pytest.mark.parametrize(
    ("dtype", "device", "reported"), [(torch.float64, "cpu", "float64"), (torch.float16, "cpu", "float16"), (F32, "cuda", "cuda")]
)
def test_other_dtypes_and_devices_are_refused_by_name(dtype: torch.dtype, device: str, reported: str) -> None:
    with pytest.raises(Unsupported, match=f"backend 'native'.*{reported}"):
        NativeOps(dtype, device)


def test_heads_that_no_kernel_attends_are_refused_by_name() -> None:
    """Odd head sizes, or sizes that differ by layer, are refused before the kernels run."""
    spec, _ = model("gpt2")
    odd = replace(
        spec,
        layers=tuple(replace(layer, mixer=replace(layer.mixer, head_dim=7)) for layer in spec.layers),
    )
    with pytest.raises(Unsupported, match=r"backend 'native'.*7"):
        NativeOps().block_bytes(odd)
    spec, _ = model("llama")
    mixed = replace(spec, layers=(*spec.layers[:2], replace(spec.layers[2], mixer=replace(spec.attention[2], heads=2))))
    with pytest.raises(Unsupported, match=r"backend 'native'.*heads"):
        NativeOps().block_bytes(mixed)


def test_gates_packed_as_plain_outputs_take_no_segment() -> None:
    """Packing without `gated` gives the same numbers."""
    spec, weights = test_backends.model()
    ops = Switched(F32)
    right = Runner(spec, test_backends.cast(weights, ops), ops, 40)  # knows of no gates
    for one, other in test_backends.program(Runner(spec, weights, Reference(), 40), right, seed=2):
        assert (one - other.double()).abs().max() <= 1e-5 * one.abs().max()


# ---- other instruction sets


def child(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, check=False)


ISAS = ("avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx")
SMALL = """
import torch
from redraft.ops import library
from tests.ops import test_native as t
lib = library.load()
for family, dtype, quant in (("llama", t.F32, ""), ("gpt2", t.BF16, ""), ("llama", t.BF16, "outliers"), ("llama", t.F32, "int4")):
    bench = t.Bench(family, dtype, quant)
    t.program(bench, 5, lib.set_threads)
    assert bench.ops.segments
t.test_models_compute_what_the_reference_defines("qwen3")
for group in (0, 64):
    for rows in (1, 3, 19):
        weights, x = t.codes(65, 100, group, True, 2, rows // 2), t.randn(3, rows, 100)
        assert torch.equal(t.NativeOps().linear(x, t.NativeOps().pack(weights)), t.product(x, weights))
ids = t.np.arange(999)
assert all(t.NativeOps().draw(key, ids, t.np.zeros(999)) == t.draw(key, ids, t.np.zeros(999)) for key in (0, 5, 2**64 - 5))
print(lib.isa)
"""


@pytest.mark.parametrize("isa", ISAS)
def test_other_instruction_sets(isa: str) -> None:
    loaded = library.load()
    assert loaded is not None
    known = [name for name in ISAS if name in loaded.isas_compiled and ISAS.index(name) <= ISAS.index(loaded.isa_detected)]
    if isa not in known:
        code = "from redraft.ops.native import NativeOps\ntry: NativeOps()\nexcept ValueError as error: print(error)"
        done = child(code, REDRAFT_ISA=isa)
        assert done.returncode == 0, done.stderr[-300:]
        assert isa in done.stdout
        return
    if isa == loaded.isa:
        pytest.skip(f"{isa} is what all other tests ran on")
    done = child(SMALL, REDRAFT_ISA=isa)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == isa


# ---- a process


def test_calls_of_two_threads_wait_for_each_other_and_for_workers_that_come_and_go() -> None:
    """Buffers belong to the process: a call that grows them must not run during one that reads them, nor during a change of workers."""
    ops, loaded = NativeOps(torch.float32), library.load()
    assert loaded is not None
    before = loaded.threads
    weight, x = torch.randn(300, 200), torch.randn(1500, 200)
    packed = ops.pack(Linear(weight))
    expected, wrong = ops.linear(x, packed), []

    def work(sizes: range) -> None:
        wrong.extend(n for n in sizes if not torch.equal(ops.linear(x[:n], packed), expected[:n]))

    threads = [threading.Thread(target=work, args=(sizes,)) for sizes in (range(1, 1500, 27), range(1, 400, 6))]
    for thread in threads:
        thread.start()
    counts = itertools.cycle((1, 3, 2, 4))
    while any(thread.is_alive() for thread in threads):
        loaded.set_threads(next(counts))
        time.sleep(0.001)
    loaded.set_threads(before)
    assert not wrong


def test_a_weight_that_is_not_contiguous_is_packed_as_it_reads() -> None:
    ops, weight, x = NativeOps(torch.float32), torch.randn(200, 300).T, torch.randn(3, 200)
    torch.testing.assert_close(ops.linear(x, ops.pack(Linear(weight))), x @ weight.T, rtol=1e-4, atol=1e-4)


def test_pytorch_gets_its_threads_back() -> None:
    TorchOps(torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        NativeOps(torch.float32)
        assert torch.get_num_threads() == 1
        TorchOps(torch.float32)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_texts_of_several_page_formats_run_in_one_call(monkeypatch: pytest.MonkeyPatch, threads: Callable[[int], None]) -> None:
    """Each of them has the log-probabilities that it has alone."""
    llm = LLM("embedded", backend="native", dtype="bfloat16", draft="none", threads=2, cache_memory=64 << 20)
    window = {"keep": "streaming-llm:sinks=2,recent=14"}
    policies = [{}, {"codec": "int8"}, {"codec": "int4:block=32"}, window, {"codec": "int8", **window}]
    params = [SamplingParams(max_tokens=24, temperature=0, ignore_eos=True, logprobs=2, **policy) for policy in policies]
    prompt = "class Stack:\n    def push(self, item):\n        self.items.append(item)\n" * 4
    wanted = []
    threads(1)
    for one in params:
        wanted += llm.generate(prompt, one)
        llm.engine.table.forget()
    names: Counter[str] = Counter()
    call = NativeOps.kind._call
    monkeypatch.setattr(NativeOps.kind, "_call", lambda ops, name, *arguments: names.update([name]) or call(ops, name, *arguments))
    threads(2)
    found = llm.generate([prompt] * len(params), params)
    assert names["rd_run"] > 20 and not names["rd_attend"]
    assert [(one.outputs[0].token_ids, one.outputs[0].logprobs) for one in found] == [
        (one.outputs[0].token_ids, one.outputs[0].logprobs) for one in wanted
    ]
    assert len({str(one.outputs[0].logprobs) for one in wanted}) == len(policies)
