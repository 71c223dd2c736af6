"""A prompt may be vectors instead of tokens: the text is that of the tokens that have them, and the prefix cache tells them apart."""

from __future__ import annotations

import pickle
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from redraft import LLM, SamplingParams
from redraft.core.sequence import Request
from redraft.errors import InvalidInput, Unsupported
from redraft.ops.arrays import array
from redraft.workers.message import Job
from tests.checkpoints import tiny_llama

TOKENS = [5 + i * 7 % 50 for i in range(70)]  # two full pages
PARAMS = SamplingParams(temperature=0.8, seed=3, max_tokens=12, logprobs=2)
BACKENDS = ["reference", "torch", "numpy", "auto"]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("vectors") / "model")


def load(path: Path, backend: str = "numpy", **options: Any) -> LLM:
    dtype = {} if backend == "reference" else {"dtype": "float32"}
    return LLM(str(path), backend=backend, threads=1, max_model_len=128, **{**dtype, **options})


@pytest.fixture(scope="module")
def llm(path: Path) -> LLM:
    return load(path, draft="none")


def embeddings(path: Path, tokens: Seq[int]) -> np.ndarray[Any, Any]:
    return array(load(path).runner.weights.embed)[list(tokens)]


def text(llm: LLM, prompt: Any, params: SamplingParams = PARAMS) -> tuple[Any, ...]:
    (found,) = llm.generate(prompt, params)
    return found.outputs[0].token_ids, found.outputs[0].logprobs


@pytest.mark.torch
@pytest.mark.parametrize("backend", BACKENDS)
def test_vectors_give_the_text_of_their_tokens(path: Path, backend: str) -> None:
    llm, vectors = load(path, backend), embeddings(path, TOKENS)
    plain = text(llm, {"prompt_token_ids": TOKENS})
    assert text(llm, {"prompt_embeds": vectors}) == plain
    mixed = vectors.copy()
    mixed[3:40] = np.nan
    assert text(llm, {"prompt_embeds": mixed, "prompt_token_ids": [0, 0, 0, *TOKENS[3:40], *[0] * 30]}) == plain
    assert text(llm, {"prompt_embeds": vectors * 2}) != plain
    assert llm.engine.memory.used() == 0


def test_the_prefix_cache_tells_vectors_apart(path: Path, llm: LLM) -> None:
    vectors = embeddings(path, TOKENS)
    other = vectors.copy()
    other[1] += 1
    alone = [text(load(path, prefix_sharing=False), {"prompt_embeds": one}) for one in (vectors, other)]
    assert alone[0] != alone[1]
    for _ in range(2):
        assert [text(llm, {"prompt_embeds": one}) for one in (vectors, other)] == alone
    (again,) = llm.generate({"prompt_embeds": other}, PARAMS)
    assert again.cached_tokens == 64 and again.prompt_token_ids == [0] * 70 and again.prompt is None
    (zeros,) = llm.generate({"prompt_token_ids": [0] * 70}, PARAMS)
    assert zeros.cached_tokens == 0


@pytest.mark.parametrize("draft", ["draft-model", "suffix", "auto", "self-skip:skip=0"])
def test_drafters_change_nothing(path: Path, draft: str, tmp_path: Path) -> None:
    small = tiny_llama(tmp_path / "draft", hidden_size=32, intermediate_size=32) if draft in ("draft-model", "auto") else None
    made = load(path, draft=draft, draft_model=None if small is None else str(small))
    prompts = [{"prompt_embeds": embeddings(path, TOKENS[i:])} for i in (0, 30)]
    plainly = load(path)
    many = made.generate(prompts, PARAMS)
    assert [(one.outputs[0].token_ids, one.outputs[0].logprobs) for one in many] == [text(plainly, one) for one in prompts]
    assert not any(one.outputs[0].stats.fault for one in many)
    assert text(made, {"prompt_token_ids": TOKENS}) == text(plainly, {"prompt_token_ids": TOKENS})


def test_small_chunks_forks_and_preemption(path: Path) -> None:
    vectors, params = embeddings(path, TOKENS[:45]), PARAMS.but(n=3, max_tokens=40)
    wanted = [one.token_ids for one in load(path).generate({"prompt_embeds": vectors}, params)[0].outputs]
    block = load(path).backend.block_bytes(load(path).spec)
    tight = load(path, token_budget=11, max_seqs=6, cache_memory=6 * block)
    many = tight.generate([{"prompt_embeds": vectors}] * 2, params)
    assert all([one.token_ids for one in found.outputs] == wanted for found in many)
    assert tight.engine.preemptions


def test_a_penalty_does_not_see_what_stands_in_for_a_vector(path: Path, llm: LLM) -> None:
    vectors = embeddings(path, TOKENS)
    before = text(llm, {"prompt_embeds": vectors}, PARAMS.but(temperature=0))
    assert text(llm, {"prompt_embeds": vectors}, PARAMS.but(temperature=0, logit_bias={0: 100}, repetition_penalty=50, max_tokens=1))[
        0
    ] == [0]
    assert len(before[0]) == 12


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_embeddings_of_vectors(path: Path, llm: LLM, pooling: str) -> None:
    ours, theirs = llm.embed([{"prompt_embeds": embeddings(path, TOKENS)}, {"prompt_token_ids": TOKENS}], pooling)
    assert np.array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"prompt_embeds": [[1.0, 2.0]]}, "prompt_embeds of shape [1, 2]: [1, "),
        ({"prompt_embeds": [1.0]}, "prompt_embeds of shape [1]: numbers of shape [tokens, hidden size] are needed"),
        ({"prompt_embeds": []}, "prompt_embeds of shape [0]: numbers of"),
        ({"prompt_embeds": "x"}, "prompt_embeds of type"),
        ({"prompt_embeds": [[True]]}, "prompt_embeds of shape [1, 1]: numbers of"),
        ({"prompt_embeds": [[1.0], [float("inf")]]}, "prompt_embeds[1] holds NaN or infinity: finite"),
        ({"prompt_embeds": [[float("nan")]]}, "prompt_embeds[0] holds NaN or infinity: rows of NaN need prompt_token_ids"),
        ({"prompt_embeds": [[float("nan"), 1.0]], "prompt_token_ids": [1]}, "prompt_embeds[0] holds NaN or infinity: finite"),
        ({"prompt_embeds": [[1.0]], "prompt_token_ids": [1, 2]}, "prompt_embeds has 1 rows, but prompt_token_ids 2 tokens"),
        ({"prompt_embeds": [[1.0]], "prompt": "a"}, "prompt_embeds: beside it only prompt_token_ids are allowed"),
    ],
)
def test_what_is_no_prompt_of_vectors(llm: LLM, prompt: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match="^" + message.replace("[", r"\[").replace("]", r"\]")):
        llm.generate(prompt, PARAMS)


def test_they_reach_workers() -> None:
    request = Request("r", [0, 0], PARAMS, vectors=np.ones((2, 4), np.float32))
    arrived = pickle.loads(pickle.dumps(Job.of("key", request))).request()
    assert np.array_equal(arrived.vectors, request.vectors) and arrived.prompt == [0, 0]


def test_what_vectors_cannot_have(path: Path, llm: LLM) -> None:
    vectors = embeddings(path, TOKENS)
    with pytest.raises(Unsupported, match="prompt_embeds: vectors have no log-probabilities"):
        llm.generate({"prompt_embeds": vectors}, PARAMS.but(prompt_logprobs=1))
    with pytest.raises(Unsupported, match="prompt_embeds: reuse pie compares tokens"):
        llm.generate({"prompt_embeds": vectors, "before": TOKENS, "reuse": "pie"}, PARAMS)
