"""LoRA adapters: the logits of merged weights, alone and in a batch, with and without drafts; what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from redraft import LLM, SamplingParams
from redraft.ops import library
from redraft.ops.native import NativeOps
from tests import adapters, checkpoints

PROMPTS = ["once upon a time", "def f(x):", "the cat sat on the mat and the cat", "a"]
CACHE = 1 << 22


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.tiny_llama(tmp_path_factory.mktemp("base") / "own", hidden_size=64, intermediate_size=96)


def logprobs(model: Path, **options: Any) -> list[list[float]]:
    """Of the first eight greedy tokens of each prompt and of the five likeliest."""
    lora = options.pop("lora", None)
    llm = LLM(str(model), draft="none", cache_memory=CACHE, lora={} if lora is None else {"x": lora}, **options)
    outputs = llm.generate(PROMPTS, temperature=0, max_tokens=8, logprobs=5, lora=lora and "x")
    return [[value for place in output.outputs[0].logprobs for _, value in sorted(place.top)] for output in outputs]


def texts(llm: LLM, prompts: list[str], **fields: Any) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(prompts, max_tokens=12, **fields)]


FORMS: list[dict[str, Any]] = [
    {},
    {"rank": 3, "alpha": 16, "use_rslora": True},
    {"rank": 20, "modules": ("q_proj", "down_proj")},
    {"whole": ("lm_head", "embed_tokens"), "modules": ("v_proj",), "modules_to_save": ["lm_head", "embed_tokens"]},
    {"rank_pattern": {"k_proj": 2, "layers.1.mlp.up_proj": 7}, "alpha_pattern": {"o_proj": 1}},
]


@pytest.mark.parametrize("form", FORMS, ids=["all", "rslora", "some", "whole", "patterns"])
def test_an_adapter_equals_merged_weights(form: dict[str, Any], base: Path, tmp_path: Path) -> None:
    adapter = adapters.make(tmp_path / "lora", base, **form)
    whole = adapters.merged(tmp_path / "merged", base, adapter)
    for options in ({"backend": "reference"}, {"dtype": "float32"}, {"dtype": "float32", "backend": "torch"}):
        own, expected, plain = logprobs(base, lora=adapter, **options), logprobs(whole, **options), logprobs(base, **options)
        bound = 1e-9 if options.get("backend") == "reference" else 2e-4
        assert np.allclose(own, expected, rtol=0, atol=bound)
        assert not np.allclose(own, plain, rtol=0, atol=0.01)


@pytest.mark.skipif(bool(library.why_not()), reason="no native kernels")
@pytest.mark.parametrize("options", [{"dtype": "float32"}, {"dtype": "bfloat16"}, {"quant": "int8"}, {"quant": "int4:group=32"}], ids=str)
def test_layers_in_one_call_have_the_bits_of_single_operations(
    options: dict[str, Any], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also rows of the model itself in a batch with adapters, and an adapter alone."""
    folders = {f"a{i}": adapters.make(tmp_path / f"a{i}", base, seed=i, rank=3 + 7 * i) for i in range(2)}
    llm = LLM(str(base), draft="none", cache_memory=CACHE, prefix_sharing=False, lora=folders, **options)
    chosen = [SamplingParams(temperature=0, max_tokens=8, logprobs=3, lora=name) for name in ("a0", "a1", None, "a0")]

    def found(one: bool) -> list[Any]:
        if not one:
            outputs = llm.generate(PROMPTS, chosen)
        else:
            outputs = [llm.generate([prompt], [params])[0] for prompt, params in zip(PROMPTS, chosen, strict=True)]
        return [[(place.logprob, place.top) for place in output.outputs[0].logprobs] for output in outputs]

    calls, run = [], NativeOps.run
    monkeypatch.setattr(NativeOps, "run", lambda *given: calls.append(run(*given)) or calls[-1])
    whole = found(one=False)
    assert calls and all(call is not None for call in calls)
    assert found(one=True) == whole
    monkeypatch.setattr(NativeOps, "run", lambda *given: None)
    assert found(one=False) == whole
