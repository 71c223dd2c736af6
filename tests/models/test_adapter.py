"""LoRA adapters: the logits of merged weights, alone and in a batch, with and without drafts; what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from redraft import LLM
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
