"""The NumPy backend: bits that do not depend on neighbours, the memory of PyTorch's pool, and no PyTorch."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from redraft.core.batch import Batch
from redraft.core.plan import Accepted, Work
from redraft.core.spec import Experts, Mlp, ModelSpec, Norm
from redraft.core.taps import Taps
from redraft.core.testing import sequence
from redraft.core.tree import EMPTY, TokenTree
from redraft.errors import Unsupported
from redraft.kv.quantization.int8 import Int8Units
from redraft.kv.quantization.kivi import CodeUnits
from redraft.kv.sparse_attention.double_sparsity import Labels
from redraft.kv.sparse_attention.page_top_k import PageTopK
from redraft.models.runner import Runner
from redraft.ops.arrays import array, dots, mixed, numpy_dtype, total
from redraft.ops.backend import Adapted, LayerWeights, Linear, LowRank, NormWeights, Weights
from redraft.ops.numpy_ops import NumpyOps
from redraft.ops.reference import Reference
from redraft.ops.torch_ops import TorchOps
from tests.kv.sparse_attention import scene
from tests.ops import test_backends, test_views
from tests.ops.tensors import Faced, tensor
from tests.ops.test_backends import VOCAB

DTYPES = "float32", "bfloat16", "float64"
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.012, "float64": 1e-12}


def draw(*shape: int, dtype: str = "float64", seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(numpy_dtype(dtype))


def same(one: Any, other: Any) -> bool:
    return bool(one.shape == other.shape and one.dtype == other.dtype and one.tobytes() == other.tobytes())


def test_it_runs_without_pytorch() -> None:
    """A model of NumPy's weights: plan, layers with windows, a tree and experts, head, codec and moves."""
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


ALONE = """
import sys
import numpy as np
from redraft.core.batch import Batch, PageView
from redraft.core.plan import Work
from redraft.core.sequence import Lanes, Space
from redraft.core.spec import Attention, Experts, LayerSpec, Mlp, ModelSpec, Norm, Rotary, WeightSource
from redraft.core.taps import Taps
from redraft.core.testing import sequence
from redraft.core.tree import TokenTree
from redraft.kv.quantization.kivi import CodeUnits
from redraft.kv.quantization.int8 import Int8Units
from redraft.kv.sparse_attention.page_top_k import PageTopK
from redraft.models.layers import decoder_layer
from redraft.ops.backend import LayerWeights, Linear, NormWeights, Weights
from redraft.ops.format import Format
from redraft.ops.numpy_ops import NumpyOps
from redraft.sample.sampler import Sampler

ops, dice = NumpyOps("bfloat16"), np.random.default_rng(0)
rand = lambda *shape: dice.standard_normal(shape).astype(ops.dtype)
layers = tuple(
    LayerSpec(Attention(4, 2, 8, Rotary((1.0, 0.1, 0.01, 0.001)), window), mlp, Norm(), residual=0.5)
    for window, mlp in ((None, Mlp(24, limit=1.0, shift=1.0)), (6, Experts(4, 2, Mlp(24))))
)
spec = ModelSpec(9, 32, 512, layers, Norm(), True, lambda name: WeightSource((name,)))
linear = lambda outs, ins: ops.pack(Linear(rand(outs, ins) / 8))
norm = lambda: NormWeights(np.ones(32, ops.dtype))
common = [dict(attn_norm=norm(), mlp_norm=norm(), qkv=linear(64, 32), out=linear(32, 32)) for _ in layers]
one = LayerWeights(**common[0], up=linear(48, 32), down=linear(32, 24))
experts = {name: tuple(linear(*shape) for _ in range(4)) for name, shape in (("experts_up", (48, 32)), ("experts_down", (32, 24)))}
two = LayerWeights(**common[1], router=linear(4, 32), **experts)
weights = Weights(rand(9, 32), linear(9, 32), norm(), (one, two))
assert weights.bytes > 10_000
tree = TokenTree.build([1, 2, 3], [-1, 0, -1], vocab=9, rows=3, depth=3)
pool = ops.allocate(spec, 4)
for name, codec in (("int8", Int8Units(8, ops.dtype)), ("int4", CodeUnits(8, ops.dtype, 32, 4))):
    ops.define(pool, Format(name, codec.arrays, codec))
ops.zero(pool, [(Space(), 0), (Space(), 1)])
none, length = [np.zeros((1, 0), np.int32)], [np.zeros(1, np.int32)]
pages = PageView([Lanes.SHARED], [np.array([[0, 1]], np.int32)], length, [0], [40], [], [None], none, [None], [None])
batch = Batch.pack([Work(sequence([1] * 40), 40)], [tree], pages)
plan = ops.plan(batch, spec)
h = ops.embed(weights, plan)
for i, layer in enumerate(layers):
    h = decoder_layer(h, i, layer, weights.layers[i], ops, pool, plan)
out = ops.head(h, weights, spec.final_norm, plan, Taps(logits=True, top_k=3))
assert out.logits.shape == (4, 9) and out.argmax.min() >= 0 and (out.top_k[:, 0] == out.argmax).all()
ops.move(pool, Space(), np.array([1], np.int32), np.array([33], np.int32), 5)
both = [np.array(pages, np.int32) for pages in ([0, 1], [9, 10], [0, 1])]
ops.encode(pool, Space(Lanes.PER_HEAD), Space(Lanes.PER_HEAD, "int4"), *both)
assert "torch" not in sys.modules, "imports PyTorch"
"""


@pytest.mark.parametrize("name", DTYPES)
def test_a_row_alone_has_the_bits_it_has_in_a_batch(name: str) -> None:
    ops = NumpyOps(name)
    x, weights = draw(37, 72, dtype=name), ops.pack(Linear(draw(301, 72, dtype=name, seed=1), draw(301, dtype=name, seed=2)))
    gains = NormWeights(draw(72, dtype=name, seed=3), draw(72, dtype=name, seed=4))
    experts, layer = mixture(ops)
    operations: dict[str, Callable[[Any], Any]] = {
        "linear": lambda x: ops.linear(x, weights),
        "rms": lambda x: ops.norm(x, NormWeights(gains.weight), Norm()),
        "layer norm": lambda x: ops.norm(x, gains, Norm("layer")),
        "experts": lambda x: ops.experts(x, layer, experts),
        **{kind: lambda x, kind=kind: ops.activate(x, kind, True) for kind in ("silu", "gelu", "gelu_tanh", "quick_gelu")},  # type: ignore[misc]
        "products": lambda x: ops.products(x[None], draw(1, 50, 72, dtype=name, seed=5))[0],
    }
    for operation, run in operations.items():
        every = run(x)
        for first, last in ((0, 1), (36, 37), (3, 20), (5, 7)):
            assert same(run(x[first:last]), every[first:last]), operation


def mixture(ops: NumpyOps) -> tuple[Experts, LayerWeights]:
    def many(outs: int, ins: int, seed: int) -> tuple[Any, ...]:
        return tuple(ops.pack(Linear(draw(outs, ins, dtype=ops.dtype.name, seed=seed + e))) for e in range(4))

    own = LayerWeights(*many(8, 8, 0)[:2], router=ops.pack(Linear(draw(4, 72, dtype=ops.dtype.name, seed=9))),
                       experts_up=many(48, 72, 10), experts_down=many(72, 24, 20))  # fmt: skip
    return Experts(4, 2, Mlp(24)), own


def test_functions_give_an_element_the_same_bits_at_every_place() -> None:
    """The assumption about NumPy under which the backend is bit-exact."""
    dice = np.random.default_rng(1)
    for dtype in (np.float32, np.float64):
        x = (dice.standard_normal(4099) * 8).astype(dtype)
        for function in (np.exp, np.tanh, np.cos, np.sin):
            whole = function(x)
            for first, last in dice.integers(0, len(x), (200, 2)):
                assert same(function(x[first:last]), whole[first:last])


def test_zeros_between_the_terms_of_a_sum_change_no_bit() -> None:
    """Wherever the slots lie that a row does not see, and however many there are."""
    dice = np.random.default_rng(2)
    for dtype in (np.float32, np.float64):
        weights, values = dice.random((2, 3, 70)).astype(dtype), dice.standard_normal((2, 70, 24)).astype(dtype)
        places = np.sort(dice.permutation(320)[:70])
        wide, more = np.zeros((2, 3, 320), dtype), dice.standard_normal((2, 320, 24)).astype(dtype)
        wide[..., places], more[:, places] = weights, values
        assert same(total(wide), total(weights)) and same(mixed(wide, more), mixed(weights, values))
        assert same(mixed(wide[:, 1:2], more), mixed(weights, values)[:, 1:2])
        assert same(dots(values[:, :1], more)[..., places], dots(values, values)[:, :1])
    assert not same(weights.sum(-1, keepdims=True), wide.sum(-1, keepdims=True)), "the test must be able to fail"


STEPS = {"whole": (90,), "rows": (1,), "sevens": (7,), "mixed": (64, 1, 9)}


def logits(runner: Runner, steps: tuple[int, ...], drafts: bool = False) -> list[Any]:
    """The logits of every row of a text of 90 tokens, and those of a path of tree nodes behind it, drafted or row by row."""
    tokens = np.random.default_rng(3).integers(0, VOCAB, 94).tolist()
    seq, found, i = sequence(tokens[:90] if drafts else tokens, prompt_logprobs=0), [], 0
    runner.memory.open(seq)
    while seq.pending:
        work = [Work(seq, min(seq.pending, steps[i % len(steps)]))]
        tree = EMPTY
        if drafts and work[0].done:  # the path is 1, 3, 4, 6
            a, b, c, d = tokens[90:]
            others = [(t + 1) % VOCAB for t in (a, b, c)]
            tree = TokenTree.build([others[0], a, others[1], b, c, others[2], d], [-1, -1, 0, 1, 3, 3, 4], vocab=VOCAB, rows=7, depth=7)
        pages = runner.memory.reserve(work, [tree])
        out = runner.forward(Batch.pack(work, [tree], pages), Taps(logits=True)).logits
        assert out is not None
        path = [*range(work[0].rows), *(work[0].rows + j for j in (1, 3, 4, 6))]
        found += list(array(out if tree is EMPTY else out[path]))
        if drafts and work[0].done:
            break
        runner.memory.move(runner.memory.commit(work, [Accepted()]))
        i += 1
    runner.memory.free(seq)
    return found


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("experts", [False, True])
def test_chunks_and_drafts_change_no_bit(name: str, experts: bool) -> None:
    spec, weights = test_backends.model(window=6, experts=experts)
    ops = NumpyOps(name)
    runner = Runner(spec, test_backends.cast(weights, ops), ops, 12)
    wanted = logits(runner, (94,))
    assert len({row.tobytes() for row in wanted}) == len(wanted) == 94
    for steps in STEPS.values():
        for drafts in (False, True):
            found = logits(runner, steps, drafts)
            assert all(map(same, found, wanted)) and len(found) == 94


def test_a_matrix_product_of_a_library_would_change_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, weights = test_backends.model(window=6)
    ops = NumpyOps("float32")
    monkeypatch.setattr("redraft.ops.numpy_ops.dots", lambda a, b: a @ b.swapaxes(-1, -2))
    runner = Runner(spec, test_backends.cast(weights, ops), ops, 12)
    assert not all(map(same, logits(runner, (94,)), logits(runner, (1,))))


@pytest.mark.parametrize("shipped", [False, True])
@pytest.mark.parametrize(
    "name", ["no view", "per head, evicted", "int8, evicted, window", "read of encoded pages", "shared, window, evicted"]
)
def test_the_bytes_of_the_pool_are_those_of_pytorch(name: str, shipped: bool) -> None:
    """After writes, moves, encoding and summaries."""
    case = test_views.replace(test_views.CASES[name], shipped=shipped)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        one, other = (test_views.program(ops, case, dtype).pool.data for ops in (TorchOps(dtype), Faced(dtype)))
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize(
    "make",
    [Int8Units, lambda size, dtype: CodeUnits(size, dtype, 32, 4), lambda size, dtype: CodeUnits(size, dtype, 32, 2)],
    ids=["int8", "int4", "int2"],
)
@pytest.mark.parametrize("name", DTYPES)
def test_a_codec_gives_the_codes_of_pytorch(name: str, make: Callable[..., Any]) -> None:
    keys, values = draw(3, 32, 8, dtype=name), 1e-3 * draw(3, 32, 8, dtype=name, seed=1)
    keys, values = keys.astype(numpy_dtype(name)), values.astype(numpy_dtype(name))
    keys[0, 3, 2], keys[1, 4], values[2, 5, 1], values[0, 7] = math.nan, 0, math.inf, 1e36
    one, other = make(8, numpy_dtype(name)), make(8, getattr(torch, name))
    assert {n: str(a.dtype) for n, a in one.arrays.items()} == {n: str(a.dtype)[6:] for n, a in other.arrays.items()}
    mine, theirs = one.pack(keys, values), other.pack(tensor(keys), tensor(values))
    with np.errstate(all="ignore"):
        for left, right in (*((mine[n], theirs[n]) for n in theirs), *zip(one.decode(mine), other.decode(theirs), strict=True)):
            assert left.dtype == numpy_dtype(right.dtype)
            np.testing.assert_array_equal(left.astype(np.float64), right.double().numpy())


@pytest.mark.parametrize("name", ["decode", "tree"])
def test_sparse_reads_choose_as_with_pytorch(name: str) -> None:
    at = scene(2, [list(range(120))] * 2, 120, chain=2, parents=[-1, 0, 0, -1, 3, 1, 5] if name == "tree" else [])
    where = (at.seen, at.where, at.at)
    labels = Labels(np.array([[[0, 3, 6], [1, 2, 7]]]), 24, 0, 1)
    held = {"labels": labels.fill(0, at.keys.transpose(0, 1))["labels"].transpose(0, 1).unflatten(1, (-1, 32))}
    tops = PageTopK(tokens=96, sinks=0)
    bounds = {n: x.unflatten(0, (2, -1)) for n, x in tops.summarize(at.keys.unflatten(1, (-1, 32)).flatten(0, 1)).items()}
    for read, side in ((labels, held), (tops, bounds)):
        right = read.select(0, at.q, side, *where, TorchOps(torch.float64).products)
        found: Any = read.select(
            0, at.q.numpy(), {n: x.numpy() for n, x in side.items()}, *(x.numpy() for x in where), NumpyOps("float64").products
        )
        assert np.array_equal(found, right.numpy()) and found.any() and not found.all()


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "sigmoid"])
def test_activations_are_rounded_once(kind: str, name: str) -> None:
    x = 4 * draw(9, 40, dtype=name)
    x[0, :4] = [-200, 200, 0, -0.0]
    for gated in (True, False):
        found = NumpyOps(name).activate(x, kind, gated)
        right = Reference().activate(tensor(x).double(), kind, gated).numpy()
        off = np.abs(found.astype(np.float64) - right)
        relative, least = {"float32": (3e-6, 1e-8), "bfloat16": (1.01 * 2**-8, 1e-8), "float64": (1e-13, 1e-14)}[name]
        assert found.dtype == x.dtype and (off <= relative * np.abs(right) + least).all()
    with pytest.raises(Unsupported, match="activation 'softplus'"):
        NumpyOps(name).activate(x, "softplus", True)


@pytest.mark.parametrize("name", DTYPES)
def test_terms_of_adapters(name: str) -> None:
    ops, size = NumpyOps(name), getattr(torch, name)
    x, base = draw(7, 40, dtype=name), Linear(draw(30, 40, dtype=name, seed=1))
    terms = [LowRank(draw(5, 40, dtype=name, seed=s), draw(5, 12, dtype=name, seed=s + 1), first) for s, first in ((2, 0), (4, 18))]
    rows = [np.array([0, 2, 6]), torch.tensor([2, 3])]  # tensors are taken too
    found = ops.linear(x, Adapted(ops.pack(base), tuple(zip(rows, terms, strict=True))))
    right = Adapted(
        Linear(tensor(base.weight).double()),
        tuple(
            (torch.as_tensor(own), LowRank(tensor(t.a).double(), tensor(t.b).double(), t.first)) for own, t in zip(rows, terms, strict=True)
        ),
    ).product(tensor(x).double(), Reference())
    assert np.abs(found.astype(np.float64) - right.numpy()).max() <= TOLERANCE[name] * np.abs(right.numpy()).max()
    assert same(found[[1, 4, 5]], ops.linear(x[[1, 4, 5]], ops.pack(base))) and size is not None
    assert same(found[2:4], ops.linear(x[2:4], Adapted(base, ((np.array([0]), terms[0]), (np.array([0, 1]), terms[1])))))


def test_tensors_are_taken_without_a_copy() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.int8):
        given = torch.arange(12).reshape(3, 4).to(dtype)
        taken = array(given)
        assert taken.dtype == numpy_dtype(dtype) and taken.astype(np.float64).tolist() == given.tolist()
        given[1, 2] = 7
        assert taken[1, 2] == 7 and array(taken) is taken
    packed = NumpyOps("bfloat16").pack(Linear(weight := torch.ones(3, 4, dtype=torch.bfloat16)))
    weight[0, 0] = 2
    assert packed.weight[0, 0] == 2  # type: ignore[union-attr]


@pytest.mark.parametrize("given", [torch.bfloat16, "bfloat16", numpy_dtype("bfloat16")])
def test_dtypes(given: Any) -> None:
    ops = NumpyOps(given)
    assert ops.dtype == numpy_dtype("bfloat16") and NumpyOps(np.float32).dtype == np.float32
    for wrong in (torch.float16, "int8"):
        with pytest.raises(Unsupported, match="computes in float32, bfloat16, float64 on the CPU only, not"):
            NumpyOps(wrong)
    with pytest.raises(Unsupported, match="on cuda"):
        NumpyOps(given, "cuda")
    with pytest.raises(Unsupported, match="threads = 2: backend 'numpy' computes with one thread"):
        ops.use_threads(2)


def test_weights_count_once() -> None:
    spec: ModelSpec
    spec, weights = test_backends.model()
    ops = NumpyOps("float32")
    packed = test_backends.cast(weights, ops)
    assert packed.bytes == weights.bytes // 2
    tied = Weights(packed.embed, ops.pack(Linear(packed.embed)), packed.final_norm, packed.layers)
    assert tied.bytes == packed.bytes - packed.head.weight.nbytes and spec.vocab == VOCAB  # type: ignore[union-attr]
