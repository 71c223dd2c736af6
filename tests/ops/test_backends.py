"""torch_ops and numpy_ops against reference, the definition: the same random programs of chunks, decodes, trees and growing tails."""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from redraft.core.batch import Batch
from redraft.core.plan import Accepted, Work
from redraft.core.spec import Attention, Experts, LayerSpec, Mlp, ModelSpec, Norm, Rotary, WeightSource
from redraft.core.taps import Taps
from redraft.core.testing import sequence
from redraft.core.tree import EMPTY, TokenTree
from redraft.errors import Unsupported
from redraft.models.runner import Runner
from redraft.ops.arrays import array
from redraft.ops.backend import LayerWeights, Linear, NormWeights, Weights
from redraft.ops.numpy_ops import NumpyOps
from redraft.ops.reference import Reference
from redraft.ops.torch_ops import TorchOps
from tests.arrays import placed
from tests.ops.tensors import tensor

VOCAB, HIDDEN, SIZE = 37, 32, 8
FAST: dict[str, Callable[[torch.dtype], TorchOps | NumpyOps]] = {"torch": TorchOps, "numpy": NumpyOps}


def model(*, window: int | None = None, experts: bool = False, norm: str = "rms", seed: int = 0) -> tuple[ModelSpec, Weights]:
    """Two layers, the second with a window; 4 query heads on 2 kv heads; biases; optionally a mixture of experts."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) / math.sqrt(shape[-1])

    def linear(rows: int, cols: int) -> Linear:
        return Linear(rand(rows, cols), rand(rows))

    def weigh() -> NormWeights:
        return NormWeights(1 + 0.1 * rand(HIDDEN), 0.1 * rand(HIDDEN) if norm == "layer" else None)

    rotary = Rotary(tuple(50.0 ** (-i / 4) for i in range(SIZE // 2)))
    mlp = Mlp(24, "silu" if norm == "rms" else "gelu_tanh", gated=norm == "rms", bias=True)
    inner = Experts(4, 2, Mlp(24)) if experts else mlp
    kind = Norm(norm)  # type: ignore[arg-type]
    layers = tuple(LayerSpec(Attention(4, 2, SIZE, rotary, window if i else None, True, True), inner, kind) for i in range(2))
    spec = ModelSpec(VOCAB, HIDDEN, 512, layers, kind, False, lambda name: WeightSource((name,)))
    made = []
    for mixer in spec.attention:
        some: dict[str, object] = {}
        if experts:
            ups, downs = rand(4, 48, HIDDEN), rand(4, HIDDEN, 24)
            some = {
                "router": Linear(3 * rand(4, HIDDEN)), "experts_up": tuple(map(Linear, ups)), "experts_down": tuple(map(Linear, downs)),
            }  # fmt: skip
        else:
            some = {"up": linear(24 * (2 if mlp.gated else 1), HIDDEN), "down": linear(HIDDEN, 24)}
        qkv = Linear(3 * rand(mixer.qkv_rows, HIDDEN), rand(mixer.qkv_rows))
        norms = {"attn_norm": weigh(), "mlp_norm": weigh()}
        made.append(LayerWeights(qkv, linear(HIDDEN, 4 * SIZE), **norms, **some))  # type: ignore[arg-type]
    return spec, Weights(rand(VOCAB, HIDDEN) * 6, Linear(3 * rand(VOCAB, HIDDEN)), weigh(), tuple(made))


def cast(weights: Weights, backend: TorchOps | NumpyOps) -> Weights:
    """The weights in the dtype and layout of the backend."""

    def typed(part: torch.Tensor) -> Any:
        return array(part).astype(backend.dtype) if isinstance(backend, NumpyOps) else part.to(backend.dtype)

    def walk(value: object) -> object:
        if isinstance(value, torch.Tensor):
            return typed(value)
        if isinstance(value, Linear):
            return backend.pack(Linear(*(None if part is None else typed(part) for part in value)))
        if isinstance(value, NormWeights):
            return NormWeights(*(None if part is None else typed(part) for part in value))
        if isinstance(value, LayerWeights):
            return LayerWeights(**{name: walk(part) for name, part in vars(value).items()})
        return tuple(map(walk, value)) if isinstance(value, tuple) else value

    return Weights(**{name: walk(part) for name, part in vars(weights).items()})  # type: ignore[arg-type]


def random_tree(rng: random.Random, largest: int) -> TokenTree:
    n = rng.randint(0, largest)
    tokens, parents = [rng.randrange(VOCAB) for _ in range(n)], [rng.randint(-1, i - 1) for i in range(n)]
    return TokenTree.build(tokens, parents, vocab=VOCAB, rows=largest, depth=largest)


def program(left: Runner, right: Runner, seed: int, *, largest: int = 9) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Runs the same steps on both runners; returns the logits of each forward. The numbers of rows of the sequences differ much."""
    rng = random.Random(seed)
    seqs = [sequence([rng.randrange(VOCAB) for _ in range(n)]) for n in (90, 3, 40, 1)]
    siblings = [sequence(list(seq.tokens)) for seq in seqs]
    for i, pair in enumerate(zip(seqs, siblings, strict=True)):
        for seq, runner in zip(pair, (left, right), strict=True):
            seq.id = i
            runner.memory.open(seq)
    found = []
    for _ in range(9):
        rows = [min(seq.pending, rng.choice([1, 7, 33, 64])) for seq in seqs]
        trees = [random_tree(rng, largest) if n == seq.pending else EMPTY for n, seq in zip(rows, seqs, strict=True)]
        cuts = [rng.randint(1, len(tree)) if len(tree) and rng.random() < 0.5 else len(tree) for tree in trees]
        paths, bonus = [], rng.randrange(VOCAB)
        for tree in trees:
            path: list[int] = []
            while len(tree) and (kids := [i for i, parent in enumerate(tree.parents) if parent == (path[-1] if path else -1)]):
                if rng.random() < 0.2:
                    break
                path.append(rng.choice(kids))
            paths.append(path)
        logits = []
        for own, runner in ((seqs, left), (siblings, right)):
            mine = []
            work = [Work(seq, n) for seq, n in zip(own, rows, strict=True)]
            heads = [TokenTree(tree.tokens[:cut], tree.parents[:cut], tree.kinds[: cut + 1]) for tree, cut in zip(trees, cuts, strict=True)]
            mine.append(forward(runner, work, heads))
            grown = [s for s in range(len(own)) if cuts[s] < len(trees[s])]
            if grown:  # the same tails, some levels further
                later = [Work(own[s], rows[s], first=cuts[s]) for s in grown]
                mine.append(forward(runner, later, [trees[s] for s in grown]))
            done = [w.done for w in work]
            accepted = [
                Accepted(tuple(path), (*(int(tree.tokens[i]) for i in path), bonus)) if end else Accepted()
                for path, tree, end in zip(paths, trees, done, strict=True)
            ]
            runner.memory.move(runner.memory.commit(work, accepted))
            runner.memory.check()
            logits.append(mine)
        found += list(zip(*logits, strict=True))
    return found


def forward(runner: Runner, work: list[Work], trees: list[TokenTree]) -> torch.Tensor:
    view = runner.memory.reserve(work, trees)
    out = runner.forward(Batch.pack(work, trees, view), Taps(logits=True, top_k=3))
    assert out.logits is not None
    assert out.top_k is not None
    assert (out.top_k[:, 0] == out.argmax).all()
    return tensor(out.logits)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.12)])
def test_a_backend_computes_what_the_reference_defines(dtype: torch.dtype, tolerance: float, window: int | None, backend: str) -> None:
    spec, weights = model(window=window)
    fast = FAST[backend](dtype)
    left = Runner(spec, weights, Reference(), 40)
    right = Runner(spec, cast(weights, fast), fast, 40)
    for one, other in program(left, right, seed=1):
        assert one.shape == other.shape
        assert (one - other.double()).abs().max() <= tolerance * one.abs().max()


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(("experts", "norm"), [(True, "rms"), (False, "layer")])
def test_experts_and_layer_norm(experts: bool, norm: str, backend: str) -> None:
    spec, weights = model(experts=experts, norm=norm)
    fast = FAST[backend](torch.float64)
    for one, other in program(Runner(spec, weights, Reference(), 40), Runner(spec, cast(weights, fast), fast, 40), seed=2):
        assert (one - other).abs().max() <= 1e-12 * one.abs().max()


@pytest.mark.parametrize("backend", FAST)
def test_more_than_64_nodes(backend: str) -> None:
    """Ancestors that need more than one word."""
    spec, weights = model()
    fast = FAST[backend](torch.float64)
    pairs = program(Runner(spec, weights, Reference(), 60), Runner(spec, cast(weights, fast), fast, 60), seed=5, largest=100)
    assert max(len(one) for one, _ in pairs) > 80
    for one, other in pairs:
        assert (one - other).abs().max() <= 1e-12 * one.abs().max()


@pytest.mark.parametrize("fault", ["window", "tail", "ancestors"])
def test_the_comparison_has_power(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison notices a mask that is slightly wrong."""
    spec, weights = model(window=6)
    fast = TorchOps(torch.float64)
    honest = TorchOps._mask

    def wrong(self: TorchOps, batch: Batch, group: list[int], width: int, slots: int, window: int | None, *rest: object) -> torch.Tensor:
        if fault == "window":
            window = None if window is None else window + 1
        if fault == "tail":
            batch.pages.chain[group[0]] = max(0, batch.pages.chain[group[0]] - 1)
        if fault == "ancestors":
            batch.visible[...] |= 1
        return honest(self, batch, group, width, slots, window, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(TorchOps, "_mask", wrong)
    try:
        pairs = program(Runner(spec, weights, Reference(), 40), Runner(spec, cast(weights, fast), fast, 40), seed=1)
    except (ValueError, AssertionError, IndexError):
        return
    assert any((one - other).abs().max() > 1e-9 for one, other in pairs)


def test_reference_is_float64_on_the_cpu() -> None:
    with pytest.raises(Unsupported, match="float64 on the CPU only"):
        Reference(torch.float32)


def test_bfloat16_where_onednn_cannot_pack_it() -> None:
    """On a processor with AVX2 only, simulated by the limit of oneDNN, the weights are not packed."""
    code = (
        "import torch; from redraft.ops.backend import Linear; from redraft.ops.torch_ops import TorchOps\n"
        "ops, weight = TorchOps(torch.bfloat16), torch.eye(40, dtype=torch.bfloat16)\n"
        "x = torch.arange(80).reshape(2, 40).bfloat16()\n"
        "assert torch.equal(ops.linear(x, ops.pack(Linear(weight))), x)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("backend", FAST)
def test_rows_of_the_embedding_and_logits_of_any_state(backend: str) -> None:
    weights, own = model()[1], FAST[backend](torch.float64)
    placed_weights = placed(own, weights)
    ids = np.array([3, 0, 3, VOCAB - 1], np.int32)
    assert np.array_equal(array(own.rows(placed_weights.embed, ids)), array(weights.embed)[ids])
    states = np.random.default_rng(0).standard_normal((4, HIDDEN))
    expected = states @ array(weights.head.weight).T
    np.testing.assert_allclose(array(own.logits(own.place(states), placed_weights.head)), expected, atol=1e-12)
