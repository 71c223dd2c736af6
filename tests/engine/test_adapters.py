"""Requests with adapters: each text is the one that its request gets alone, and cached keys belong to one adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from redraft import LLM, Patch, SamplingParams
from redraft.core.sequence import Request
from redraft.errors import InvalidInput
from redraft.outputs import RequestOutput
from tests import adapters, checkpoints
from tests.models.gguf import files

LONG = "the cat sat on the mat and the cat sat on the log and the dog sat on the mat: "  # more than two pages
PROMPTS = [LONG, "once upon a time", "def f(x):\n    return f(x)", LONG + "more", "abcabcabcabcabc", "a"]
NAMES = [None, "x", "y", "z"]
POOL = 1 << 22
CHANGES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.tiny_llama(tmp_path_factory.mktemp("base") / "own", **CHANGES)


@pytest.fixture(scope="module")
def made(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters of other ranks and matrices."""
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "x": adapters.make(folder / "x", base, seed=1),
        "y": adapters.make(folder / "y", base, seed=2, rank=17, modules=("q_proj", "v_proj", "down_proj"), use_rslora=True),
        "z": adapters.make(folder / "z", base, seed=3, rank=1, modules=("k_proj", "o_proj", "gate_proj")),
    }


def requests(**fields: Any) -> tuple[list[str], list[SamplingParams]]:
    """Each prompt with the model and each adapter."""
    pairs = [(prompt, name) for prompt in PROMPTS for name in NAMES]
    common = {"max_tokens": 12, "ignore_eos": True, "logprobs": 3, **fields}
    return [prompt for prompt, _ in pairs], [SamplingParams(lora=name, seed=i, **common) for i, (_, name) in enumerate(pairs)]


def texts(outputs: list[RequestOutput]) -> list[Any]:
    assert [output.error for output in outputs] == [None] * len(outputs)
    return [[(one.token_ids, one.logprobs) for one in output.outputs] for output in outputs]


def alone(base: Path, made: dict[str, Path], params: tuple[list[str], list[SamplingParams]], **options: Any) -> list[Any]:
    """Every request in an engine without other requests, drafts and cached prefixes."""
    llm = LLM(str(base), lora=made, draft="none", cache_memory=POOL, prefix_sharing=False, **options)
    return [texts([llm.generate(prompt, one)[0]])[0] for prompt, one in zip(*params, strict=True)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("temperature", [0, 0.9])
def test_a_batch_of_adapters_equals_each_alone_to_the_bit(dtype: str, temperature: float, base: Path, made: dict[str, Path]) -> None:
    params = requests(temperature=temperature)
    options: dict[str, Any] = {"dtype": dtype, "backend": "native"}
    expected = alone(base, made, params, **options)
    assert len({str(one) for one in expected[:4]}) == 4
    for draft in ("none", "copyspec", "token-recycling", "self-skip"):
        for more in ({}, {"token_budget": 13}):
            llm = LLM(str(base), lora=made, draft=draft, cache_memory=POOL, **options, **more)
            assert texts(llm.generate(*params)) == expected, (draft, more)


@pytest.mark.torch
@pytest.mark.parametrize("draft", ["none", "copyspec", "token-recycling"])
@pytest.mark.parametrize("temperature", [0, 0.9])
def test_a_batch_equals_each_alone_on_pytorch(draft: str, temperature: float, base: Path, made: dict[str, Path]) -> None:
    params = requests(temperature=temperature, logprobs=None)
    options: dict[str, Any] = {"dtype": "float64", "backend": "torch"}
    llm = LLM(str(base), lora=made, draft=draft, cache_memory=POOL, **options)
    assert texts(llm.generate(*params)) == alone(base, made, params, **options)


@pytest.mark.parametrize("quant", ["int8", "int4:group=32"])
def test_quantized_weights(quant: str, base: Path, made: dict[str, Path]) -> None:
    params = requests(temperature=0)
    options: dict[str, Any] = {"dtype": "float32", "quant": quant}
    llm = LLM(str(base), lora=made, draft="copyspec", cache_memory=POOL, **options)
    expected = alone(base, made, params, **options)
    assert texts(llm.generate(*params)) == expected
    assert len({str(one) for one in expected[:4]}) == 4


def test_matrices_as_a_gguf_file_stores_them(base: Path, made: dict[str, Path], tmp_path: Path) -> None:
    file = files.write(base, tmp_path / "own.gguf", files.Kind.Q8_0)
    params = requests(temperature=0)
    options: dict[str, Any] = {"dtype": "float32", "quant": "stored"}
    llm = LLM(str(file), lora=made, draft="copyspec", cache_memory=POOL, **options)
    assert texts(llm.generate(*params)) == alone(file, made, params, **options)


@pytest.mark.parametrize(
    "policy",
    [
        {"keep": "streaming-llm:sinks=2,recent=32"},
        {"codec": "int8"},
        {"read": "page-top-k:tokens=64,sinks=0"},
        {"depth": "layer-skip:speedup=1.2"},
    ],
    ids=lambda policy: "".join(policy),
)
def test_cache_policies(policy: dict[str, str], base: Path, made: dict[str, Path]) -> None:
    params = requests(temperature=0.7, **policy)
    llm = LLM(str(base), lora=made, draft="copyspec", cache_memory=POOL, dtype="float32")
    assert texts(llm.generate(*params)) == alone(base, made, params, dtype="float32")


def test_several_texts_of_a_prompt(base: Path, made: dict[str, Path]) -> None:
    params = requests(temperature=0.9, n=3)
    llm = LLM(str(base), lora=made, draft="token-recycling", cache_memory=POOL, dtype="float32")
    found = texts(llm.generate(*params))
    assert found == alone(base, made, params, dtype="float32")
    assert all(len(one) == 3 for one in found)


def test_preempted_texts_start_again_with_their_adapter(base: Path, made: dict[str, Path]) -> None:
    params = requests(temperature=0.7, max_tokens=60)
    expected = alone(base, made, params, dtype="float32")
    small = LLM(str(base), lora=made, cache_memory=POOL, dtype="float32")
    blocks = small.runner.memory.blocks
    small = LLM(str(base), lora=made, draft="copyspec", cache_memory=POOL * 10 // blocks, max_model_len=200, dtype="float32")
    assert texts(small.generate(*params)) == expected
    assert small.engine.preemptions > 0


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_a_draft_model_drafts_without_the_adapter(temperature: float, base: Path, made: dict[str, Path]) -> None:
    """Even if it is the same model."""
    params = requests(temperature=temperature)
    llm = LLM(str(base), lora=made, draft="draft-model", draft_model=str(base), cache_memory=POOL, dtype="float32")
    outputs = llm.generate(*params)
    assert texts(outputs) == alone(base, made, params, dtype="float32")
    rates = {name: [one.stats for output in outputs[i::4] for one in output.outputs] for i, name in enumerate(NAMES)}
    accepted = {name: sum(one.accepted for one in stats) / sum(one.drafted for one in stats) for name, stats in rates.items()}
    assert all(accepted[None] > accepted[name] for name in made)
    assert all(one.drafted for stats in rates.values() for one in stats)


# ---- cached keys


def cached(llm: LLM, name: str | None, prompt: str = LONG, **fields: Any) -> tuple[int, Any]:
    (output,) = llm.generate(prompt, temperature=0, max_tokens=8, ignore_eos=True, logprobs=3, lora=name, **fields)
    return output.cached_tokens, texts([output])


def test_keys_are_never_shared_between_adapters_or_with_the_model(base: Path, made: dict[str, Path]) -> None:
    llm = LLM(str(base), lora=made, cache_memory=POOL, dtype="float32")
    first = {name: cached(llm, name) for name in NAMES}
    again = {name: cached(llm, name) for name in NAMES}
    assert [count for count, _ in first.values()] == [0] * 4
    assert all(count >= 64 for count, _ in again.values())
    assert {name: text for name, (_, text) in again.items()} == {name: text for name, (_, text) in first.items()}


def test_another_adapter_under_a_name_meets_no_old_keys(base: Path, made: dict[str, Path]) -> None:
    llm = LLM(str(base), lora={"x": made["x"]}, cache_memory=POOL, dtype="float32")
    assert cached(llm, "x")[0] == 0
    old = cached(llm, "x")
    llm.unload_lora("x")
    llm.load_lora("x", made["y"])
    fresh = LLM(str(base), lora={"x": made["y"]}, cache_memory=POOL, dtype="float32")
    found = cached(llm, "x")
    assert found == cached(fresh, "x")
    assert found[0] == 0 and found[1] != old[1]
    llm.unload_lora("x")
    llm.load_lora("z", made["x"])
    assert cached(llm, "z") == old, "the same weights under another name have the same keys"


def test_a_salt_cannot_imitate_an_adapter(base: Path, made: dict[str, Path]) -> None:
    llm = LLM(str(base), lora=made, cache_memory=POOL, dtype="float32")
    tokens = llm.tokenizer.encode(LONG)
    digest = llm.runner.adapters["x"].digest
    params = SamplingParams(temperature=0, max_tokens=4)
    for i, salt in enumerate(("/a", f"/a\0{digest}", "")):
        llm.engine.add(Request(str(i), list(tokens), params.but(lora="x"), salt))
        while llm.engine.has_work:
            llm.engine.step()
    for i, salt in enumerate((f"/a\0{digest}", f"\0{digest}", "/a", "")):
        request = Request(f"plain {i}", list(tokens), params, salt)
        llm.engine.add(request)
        while llm.engine.has_work:
            llm.engine.step()
        assert request.cached_tokens == 0


def test_an_edited_text_keeps_its_adapter(base: Path, made: dict[str, Path]) -> None:
    llm = LLM(str(base), lora=made, cache_memory=POOL, dtype="float32")
    fields: dict[str, Any] = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}
    for name in NAMES:
        llm.generate(LONG * 2, lora=name, **fields)
    texts = {name: llm.edit(LONG * 2, Patch(4, 7, "dog"), lora=name, **fields)[0] for name in NAMES}
    assert all(output.reused_tokens > 0 for output in texts.values())
    assert len({tuple(output.outputs[0].token_ids) for output in texts.values()}) == 4


# ---- loading and unloading while requests run


def test_a_request_under_way_finishes_with_an_unloaded_adapter(base: Path, made: dict[str, Path]) -> None:
    llm = LLM(str(base), lora=made, draft="copyspec", cache_memory=POOL, dtype="float32")
    fields: dict[str, Any] = {"temperature": 0, "max_tokens": 20, "ignore_eos": True}
    expected = llm.generate(PROMPTS[1], lora="x", **fields)[0].outputs[0].token_ids
    running = llm.stream(PROMPTS[1], lora="x", **fields)
    found = list(next(running).token_ids)
    llm.unload_lora("x")
    llm.load_lora("x", made["y"])
    other = llm.generate(PROMPTS[1], lora="x", **fields)[0].outputs[0].token_ids
    found += [token for delta in running for token in delta.token_ids]
    assert found == expected != other


@pytest.fixture
def llm(base: Path, made: dict[str, Path]) -> LLM:
    return LLM(str(base), lora=made, cache_memory=POOL, dtype="float32")


def test_a_refused_request_changes_nothing(llm: LLM) -> None:
    request = Request("r", [5] * 300, SamplingParams(lora="x"), "salt")
    with pytest.raises(InvalidInput, match="prompt has 300 tokens"):
        llm.engine.add(request)
    request.prompt = [5]
    request.params = SamplingParams(lora="none-such")
    with pytest.raises(InvalidInput, match="lora = 'none-such': known: x, y, z"):
        llm.engine.add(request)
    assert (request.adapter, request.salt, request.params.seed) == (None, "salt", None)
    (refused, fine) = llm.generate(["a", "a"], [SamplingParams(lora="none-such"), SamplingParams(lora="x", max_tokens=2)])
    assert refused.error is not None and refused.error.startswith("lora = 'none-such'")
    assert fine.error is None


def test_chunks_keep_their_cache_with_one_adapter(base: Path, made: dict[str, Path]) -> None:
    """All rows again is the prompt that an adapter computes, and nobody takes the chunks of another adapter."""
    segments = ["def f(x):", LONG, "once upon a time there was a dog", "and the cat sat on the log and the mat", "the end"]
    common: dict[str, Any] = {"temperature": 0, "max_tokens": 8, "logprobs": 3, "ignore_eos": True}
    llm = LLM(str(base), lora=made, draft="none", cache_memory=POOL, dtype="float32", backend="native")
    fresh = LLM(str(base), lora=made, draft="none", cache_memory=POOL, dtype="float32", backend="native", prefix_sharing=False)
    for name in NAMES:
        found = llm.generate({"segments": segments}, reuse="cacheblend:ratio=1", lora=name, **common)
        assert texts(found) == texts(fresh.generate({"segments": segments}, lora=name, **common)), name
        assert found[0].reused_tokens and found[0].repaired_tokens
    assert llm.cache(segments[1:-1], sink=segments[0], lora="x") and not llm.engine.chunk_texts._texts
