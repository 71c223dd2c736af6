"""Models with weights quantized at load: which weights, how many at a time, how large. Also texts of every drafter with them."""

from __future__ import annotations

import re
import sys
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import redraft
from redraft import LLM, SamplingParams, registry
from redraft.config import ModelConfig
from redraft.errors import InvalidInput, OutOfMemory, UnknownMethod, Unsupported
from redraft.models import loader, memory
from redraft.models.draft_model import load_draft_model
from redraft.ops.backend import Linear, Weights
from redraft.ops.quantized import Quantized, product
from redraft.ops.torch_arrays import as_tensor
from redraft.ops.torch_ops import TorchOps
from redraft.setup import Setup
from redraft.weights.quant import by_output as by_output_of_arrays
from redraft.weights.quant import by_output_bytes
from tests.arrays import PLACED, by_output, same
from tests.checkpoints import tiny_llama
from tests.contracts.identity import complete
from tests.models import tiny

METHODS = [name for name in registry.METHODS["quant"] if not getattr(registry.method("quant", name), "keeps", False)]
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
SAMPLED = SamplingParams(temperature=0.9, max_tokens=10, seed=3, ignore_eos=True)
PROMPTS = ["def f(x):", "a b a b a b"]


@dataclass(frozen=True)
class Watching:
    """Quantizes every weight with one scale per output. Records its arguments and which earlier weights are still in memory."""

    asked: list[tuple[str, tuple[int, ...], torch.Tensor | None]] = field(default_factory=list)
    seen: list[weakref.ref[torch.Tensor]] = field(default_factory=list)
    alive: list[int] = field(default_factory=list)

    def quantize(self, weights: Linear, role: str, gains: Any = None) -> Quantized:
        self.alive.append(sum(ref() is not None for ref in self.seen))
        self.asked.append((role, tuple(weights.weight.shape), None if gains is None else as_tensor(gains)))
        if weights.weight.shape[0] != tiny.V or role == "layer":  # the embedding of a tied head stays
            self.seen.append(weakref.ref(weights.weight))
        return by_output_of_arrays(weights)

    def bytes(self, outs: int, ins: int, dtype: torch.dtype, role: str) -> int:
        return by_output_bytes(outs, ins)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("quant") / "llama")


def read(folder: Path, quant: Any, dtype: str = "float32") -> tuple[loader.Checkpoint, Weights]:
    checkpoint = loader.inspect(folder, dtype, "cpu", quant)
    return checkpoint, loader.read(checkpoint, TorchOps(checkpoint.dtype))


# ---- loading


@pytest.mark.parametrize("family", ["llama2", "smollm", "gpt2", "llama-biases"])
def test_one_weight_at_a_time_each_with_its_bias_and_the_gains_in_front(family: str, tmp_path: Path) -> None:
    """Tied and untied heads, RMSNorm and LayerNorm, biases."""
    folder, watching = tiny.save(family, tmp_path / family), Watching()
    checkpoint, weights = read(folder, watching)
    plain = tiny.load(folder, dtype="float32", backend=PLACED)[1]
    assert watching.alive == [0] * len(watching.asked), "an earlier weight is still held"
    assert len(watching.asked) == 4 * len(weights.layers) + 1
    assert [role for role, _, _ in watching.asked].count("head") == 1
    by_shape = [gains for role, shape, gains in watching.asked if gains is not None]
    assert len(by_shape) == 2 * len(weights.layers) + 1
    expected = plain.final_norm.weight.abs() + (0 if plain.final_norm.bias is None else plain.final_norm.bias.abs())
    assert any(torch.equal(gains, expected) for role, _, gains in watching.asked if role == "head" and gains is not None)
    for held, before in zip(weights.layers, plain.layers, strict=True):
        for part in ("qkv", "out", "up", "down"):
            one, other = getattr(held, part), getattr(before, part)
            assert same(one, by_output(other))
    for norm, name in ((plain.layers[1].attn_norm, "qkv"), (plain.layers[1].mlp_norm, "up")):
        gain = norm.weight.abs() + (0 if norm.bias is None else norm.bias.abs())
        shape = tuple(getattr(plain.layers[1], name).weight.shape)
        assert any(gains is not None and asked == shape and torch.equal(gains, gain) for _, asked, gains in watching.asked)
    assert torch.equal(weights.embed, plain.embed)
    assert checkpoint.weight_bytes == weights.bytes


@pytest.mark.parametrize("quant", [*METHODS, "int8:outliers=3", "int8:head=none", "int4:head=none", "int4:group=adaptive"])
@pytest.mark.parametrize("family", ["llama2", "smollm", "mixtral"])
def test_the_estimate_is_what_is_held(family: str, quant: str, tmp_path: Path) -> None:
    if registry.parse(quant)[0] not in METHODS:
        pytest.skip("not registered")
    folder = tiny.save(family, tmp_path / family)
    checkpoint = loader.inspect(folder, "float64", "cpu", registry.create("quant", quant))
    weights = loader.read(checkpoint, TorchOps(torch.float64))
    assert weights.bytes <= checkpoint.weight_bytes
    assert weights.bytes == checkpoint.weight_bytes or "adaptive" in quant or "outliers" in quant
    assert checkpoint.weight_bytes < loader.inspect(folder, "float64").weight_bytes


def test_memory_is_checked_with_the_quantized_size(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = LLM(str(path), backend="torch", cache_memory=1 << 20).config
    whole = loader.inspect(path, "float32").weight_bytes
    monkeypatch.setattr(memory, "limits", lambda device: whole * 3 // 4 + (1 << 20))
    with pytest.raises(OutOfMemory):
        Setup.of(config)
    for name in METHODS:
        assert Setup.of(config.but(model=config.model.but(quant=name))).checkpoint.weight_bytes < whole * 3 // 4


def test_every_expert_is_a_weight_of_its_own(tmp_path: Path) -> None:
    """Experts are quantized one at a time, with the gains of the norm before them. The router is not quantized."""
    watching, hub, fused = Watching(), tmp_path / "hub", tmp_path / "fused"
    tiny.save("mixtral", hub)
    checkpoint, weights = read(hub, watching)
    plain = tiny.load(hub, dtype="float32", backend=PLACED)[1]
    assert watching.alive == [0] * len(watching.asked), "an earlier weight is still held"
    assert len(watching.asked) == (2 + 2 * 5) * len(weights.layers) + 1
    assert weights.layers[0].router is not None and not isinstance(weights.layers[0].router, Quantized)
    for held, before in zip(weights.layers, plain.layers, strict=True):
        for ours, theirs in ((held.experts_up, before.experts_up), (held.experts_down, before.experts_down)):
            assert len(ours) == 5
            for one, other in zip(ours, theirs, strict=True):
                assert isinstance(one, Quantized) and isinstance(other, Linear)
                assert same(one, by_output(other))
        gains = [found for _, shape, found in watching.asked if shape == (80, 24) and found is not None]
        assert sum(torch.equal(found, before.mlp_norm.weight.abs()) for found in gains) == 5
    assert checkpoint.weight_bytes == weights.bytes
    tiny.model("mixtral").save_pretrained(fused, save_original_format=False)
    for held, other in zip(weights.layers, read(fused, Watching())[1].layers, strict=True):
        for one, two in zip(held.experts_up + held.experts_down, other.experts_up + other.experts_down, strict=True):
            assert isinstance(one, Quantized) and isinstance(two, Quantized) and torch.equal(one.codes, two.codes)


@pytest.mark.parametrize("name", METHODS)
def test_a_bad_weight_is_named(name: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tiny.save("llama2", tmp_path / "bad")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 3] = float("inf")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(Unsupported, match=r"bad: layers\.1\.down\.weight: a number that is not finite"):
        read(folder, registry.create("quant", name))


def test_options() -> None:
    assert ModelConfig(quant="none").quant is None
    with pytest.raises(UnknownMethod, match="no quant method 'int5'"):
        LLM("no-such-folder", quant="int5")
    for name in METHODS:
        with pytest.raises(InvalidInput, match=f"{name}:head=x"):
            LLM("no-such-folder", quant=f"{name}:head=x")


# ---- running


def texts(llm: LLM, params: SamplingParams) -> list[list[int]]:
    outputs = llm.generate(PROMPTS, params)
    assert all(output.guarantee == "lossy" for output in outputs)
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize("name", METHODS)
def test_every_drafter_gives_the_plain_text_of_the_quantized_model(name: str, path: Path) -> None:
    """In float64 the rounding of a row does not depend on the last bit of attention. The second model is quantized too."""
    llm = LLM(str(path), dtype="float64", quant=name, draft="none", draft_model=str(path), threads=1, cache_memory=1 << 22)
    assert isinstance(llm.runner.weights.head, Quantized) and isinstance(llm.runner.weights.layers[-1].down, Quantized)
    both = (GREEDY, SAMPLED)
    plain = [texts(llm, params) for params in both]
    drafters = (one for one in registry.METHODS["draft"] if one != "none" and complete("draft", one))
    for i, draft in enumerate(drafters, METHODS.index(name)):  # with another method of `quant` the other sampling
        assert texts(llm.sibling(draft=draft), both[i % 2]) == plain[i % 2], draft
    reference = LLM(str(path), backend="reference", quant=name, draft="none", cache_memory=1 << 22)
    assert texts(reference, GREEDY) == texts(llm, GREEDY)


@pytest.mark.parametrize("name", METHODS)
def test_a_second_model_is_quantized_and_its_head_trimmed(name: str, path: Path, tmp_path: Path) -> None:
    sample = tmp_path / "sample.txt"
    sample.write_text("def f(x): return x\n" * 9, encoding="utf-8")
    llm = LLM(str(path), dtype="float64", quant=name, draft="none", draft_model=str(path), threads=1, cache_memory=1 << 22)
    if not {"vocabtrim", "draft-model"} <= registry.METHODS["draft"].keys():
        pytest.skip("not registered")
    plain = texts(llm, GREEDY)
    second = load_draft_model(llm.runner, None)
    assert isinstance(second.weights.head, Quantized) and isinstance(second.weights.layers[0].down, Quantized)
    trimmed = llm.sibling(draft=f"vocabtrim:keep=9,text={sample}")
    opened: Any = trimmed.engine.drafter.own
    while not hasattr(opened, "keep"):
        opened = opened.drafter
    (inner,) = opened.parts
    head = inner.runner.weights.head
    assert head.outs == len(opened.keep) < second.weights.head.outs
    x = torch.randn(2, head.ins, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(product(x, head), product(x, second.weights.head)[:, opened.keep])
    assert texts(trimmed, GREEDY) == plain


@pytest.mark.parametrize("name", METHODS)
def test_the_embedded_model_stays_near(name: str) -> None:
    """The claim of the cards at a small scale: hardly less likely text in much less memory. scripts/prove quant measures it."""
    text = "import os\n\n\ndef read(path):\n    with open(path) as file:\n        return file.read()\n"
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    sizes, scores = [], []
    for quant in (None, name):
        llm = LLM(
            "embedded", backend="torch", dtype="bfloat16", quant=quant, draft="none", max_model_len=64, threads=1, cache_memory=1 << 22
        )
        (output,) = llm.generate(text, params)
        assert output.prompt_logprobs is not None
        reported = [one.logprob for one in output.prompt_logprobs if one is not None]
        sizes.append(llm.runner.weights.bytes)
        scores.append(sum(reported) / len(reported))
    assert sizes[1] < 0.6 * sizes[0] and 0 < abs(scores[0] - scores[1]) < 0.1


@pytest.mark.parametrize("name", METHODS)
def test_the_rest_does_without_any_one_method(name: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the registry names a method's module. Without the module, other methods and the unquantized model load."""
    module = registry.METHODS["quant"][name].split(":")[0]
    imports = re.compile(rf"{re.escape(module)}\b|from redraft\.weights import .*\b{module.rpartition('.')[2]}\b")
    sources = [file for file in Path(redraft.__path__[0]).rglob("*.py") if imports.search(file.read_text(encoding="utf-8"))]
    assert [file.name for file in sources] == ["registry.py"]
    monkeypatch.delitem(registry.METHODS["quant"], name)
    monkeypatch.setitem(sys.modules, module, None)
    for other in (None, *(one for one in METHODS if one != name)):
        assert LLM(str(path), backend="torch", quant=other, threads=1, cache_memory=1 << 22).generate("def", GREEDY)[0].outputs[0].token_ids
    with pytest.raises(UnknownMethod):
        LLM(str(path), quant=name)
