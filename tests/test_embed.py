"""LLM.embed: hidden states after the final norm equal those of transformers, whatever else runs and however the prompt is cut."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from redraft import LLM, SamplingParams
from redraft.core.sequence import Pooling, Request, Wants
from redraft.errors import InvalidInput, PromptTooLong
from redraft.ops import library
from tests.checkpoints import tiny_llama
from tests.models import tiny

NATIVE = library.PATH.exists() and library.load() is not None
BACKENDS = ["reference", "torch", "numpy", *(["native"] if NATIVE else [])]
DICE = Random(3)
LONG = [DICE.randrange(3, 61) for _ in range(90)]
PROMPTS = [LONG[:40], LONG[:5], LONG[:80], LONG[60:70], [7]]
Vectors = Seq[np.ndarray[Any, Any]]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_llama(tmp_path_factory.mktemp("embed") / "model")
    if request.param == "gpt2":
        for file in ("config.json", "model.safetensors"):
            (folder / file).unlink()
        tiny.save("gpt2", folder, vocab_size=259, n_positions=256)
    return folder


def load(path: Path, backend: str, **options: Any) -> LLM:
    dtype = {} if backend == "reference" else {"dtype": "float32"}
    return LLM(str(path), backend=backend, threads=1, max_model_len=128, **{**dtype, **options})


def prompts(tokens: Seq[Seq[int]] = PROMPTS) -> list[dict[str, Any]]:
    return [{"prompt_token_ids": list(one)} for one in tokens]


@pytest.fixture(scope="module")
def theirs(path: Path) -> dict[str, Vectors]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
    base = model.model if hasattr(model, "model") else model.transformer
    with torch.no_grad():
        states = [base(torch.tensor([one])).last_hidden_state[0].numpy() for one in PROMPTS]
    return {"last": [one[-1] for one in states], "mean": [one.mean(0) for one in states]}


@pytest.mark.torch
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_is_what_transformers_tells(path: Path, theirs: dict[str, Vectors], backend: str, pooling: str) -> None:
    llm = load(path, backend)
    for own, other in zip(llm.embed(prompts(), pooling, normalize=False), theirs[pooling], strict=True):
        assert own.dtype == np.float64 and own.shape == other.shape
        np.testing.assert_allclose(own, other, rtol=1e-4, atol=1e-4 if backend != "reference" else 1e-5)  # angles in float32 there
    for own, other in zip(llm.embed(prompts(), pooling), theirs[pooling], strict=True):
        assert np.linalg.norm(own) == pytest.approx(1)
        np.testing.assert_allclose(own, other / np.linalg.norm(other), rtol=1e-3, atol=1e-4)
    assert llm.engine.memory.used() == 0 and not llm.engine.has_work and not llm.engine.outputs


EXACT = "native" if NATIVE else "numpy"


def same(a: Vectors, b: Vectors, backend: str = EXACT) -> bool:
    """Equal bit for bit, if the backend promises that. float64 products of the reference may differ in the last bit."""
    if backend in ("native", "numpy"):
        return all(np.array_equal(one, two) for one, two in zip(a, b, strict=True))
    return all(np.allclose(one, two, rtol=1e-12, atol=1e-12) for one, two in zip(a, b, strict=True))


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend != "torch"])
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_bit_for_bit_however_it_ran(path: Path, backend: str, pooling: str) -> None:
    first = load(path, backend, prefix_sharing=False)
    alone = [first.embed(prompts()[i], pooling, normalize=False)[0] for i in range(len(PROMPTS))]
    assert same(first.embed(prompts(), pooling, normalize=False), alone, backend), "a batch"
    for budget in (7,) if backend == "reference" else (7, 33):  # that one takes long
        llm = load(path, backend, token_budget=budget, draft="token-recycling", max_seqs=3)
        assert same(llm.embed(prompts(), pooling, normalize=False), alone, backend), "chunks"
        assert same(llm.embed(prompts()[::-1], pooling, normalize=False), alone[::-1], backend), "with cached prefixes"
        output = llm.generate({"prompt_token_ids": LONG[:79]}, SamplingParams(temperature=0, max_tokens=2))[0]
        assert output.cached_tokens == 64, "its pages are shared"


@pytest.mark.parametrize("pooling", [Pooling.LAST, Pooling.MEAN])
def test_bit_for_bit_where_it_is_preempted(path: Path, pooling: Pooling) -> None:
    """Prompts in chunks, next to texts that need their pages. Rows that run again do not count twice."""
    llm = load(path, EXACT, token_budget=9, max_seqs=4, prefix_sharing=False)
    alone = llm.embed(prompts([LONG[:80]]), str(pooling), normalize=False)[0]
    engine = llm.engine
    asked = Request("e", LONG[:80], SamplingParams(temperature=0, max_tokens=1, seed=1), wants=Wants(pooling=pooling))
    engine.add(asked)
    for round_ in range(4):
        for _ in range(1 + round_):
            engine.step()
        (seq,) = engine.running
        engine._preempt(seq)
        engine.memory.check()
    while engine.has_work:
        events = engine.step()
    assert engine.preemptions == 4 and same([asked.embedding(False)], [alone])
    assert events[-1].reason == "length" and not events[-1].tokens


def test_no_logits_are_computed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = load(path, EXACT)
    rows: list[int] = []
    right = llm.runner.forward

    def forward(batch: Any, *rest: Any) -> Any:
        rows.append(len(batch.logit_rows))
        return right(batch, *rest)

    monkeypatch.setattr(llm.runner, "forward", forward)
    llm.embed(prompts())
    assert rows and not any(rows)


def test_beside_texts(path: Path) -> None:
    llm = load(path, EXACT, token_budget=16, max_seqs=4)
    alone = llm.embed(prompts([LONG[:50]]), normalize=False)[0]
    stream = llm.stream({"prompt_token_ids": LONG[:20]}, SamplingParams(temperature=0, max_tokens=40, ignore_eos=True))
    next(stream)
    assert same(llm.embed(prompts([LONG[:50]]), normalize=False), [alone])
    text = [token for delta in stream for token in delta.token_ids]
    whole = llm.generate({"prompt_token_ids": LONG[:20]}, SamplingParams(temperature=0, max_tokens=40, ignore_eos=True))[0]
    assert text == whole.outputs[0].token_ids[1:]


def test_what_is_refused_is_named(path: Path) -> None:
    llm = load(path, EXACT)
    for bad, words in [
        ({"prompt_token_ids": []}, "prompt is empty"),
        ({"prompt_token_ids": [999]}, "not a token id"),
        (3.5, "prompt of type float"),
    ]:
        with pytest.raises(InvalidInput, match=rf"prompts\[1\]: .*{words}"):
            llm.embed(["a", bad, "b"])  # type: ignore[list-item]
        with pytest.raises(InvalidInput, match=f"^[^\\[]*{words}|^prompt_token_ids"):
            llm.embed([bad])  # type: ignore[list-item]
    with pytest.raises(PromptTooLong, match=r"prompts\[0\]"):
        llm.embed(["a" * 200, "b"])
    with pytest.raises(InvalidInput, match="pooling = 'max'"):
        llm.embed("a", "max")
    with pytest.raises(InvalidInput, match="wants"):
        llm.generate({"prompt_token_ids": [5], "wants": "last"})
    assert llm.embed([]) == [] and not llm.engine.has_work
