"""ForwardResult.argmax in every backend and dtype: -1 if a row of logits holds NaN or +inf, else the lowest id of the largest logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from redraft import LLM, SamplingParams
from redraft.core.taps import Taps
from redraft.ops import library
from redraft.ops.arrays import array
from redraft.ops.backend import PART, argmax, best_first
from redraft.sample.sampler import NotNumbers
from tests.checkpoints import tiny_llama

NATIVE = library.PATH.exists() and library.load() is not None
KINDS = [("reference", "float64"), ("torch", "float32"), ("torch", "bfloat16"), ("numpy", "float32"), ("numpy", "bfloat16")]
KINDS += [("native", "float32"), ("native", "bfloat16")] if NATIVE else []
NAN, INF = float("nan"), float("inf")


@pytest.mark.skipif(not NATIVE, reason="no native library")
def test_the_native_backend_takes_it_from_the_largest_logits() -> None:
    from redraft.ops.native import NativeOps

    draw = torch.Generator().manual_seed(0)
    for turn in range(60):
        logits = torch.randn(3, 9 * PART, generator=draw) if turn % 2 else torch.randint(-3, 4, (3, 9 * PART), generator=draw).float()
        if turn % 3 == 0:
            logits[1, turn], logits[2, turn], logits[0] = NAN, INF, -INF
        found = NativeOps._result(logits, Taps(top_k=8, logits=True))
        assert found.argmax.tolist() == argmax(logits).tolist() and found.argmax.dtype == np.int32
        assert found.top_k is not None and found.top_k.tolist() == best_first(logits, 8).tolist()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_of_rows(dtype: torch.dtype) -> None:
    rows = [[1, 3, 3, -INF], [NAN, 3, 3, 0], [0, 3, NAN, 5], [INF, 3, 0, 0], [-INF, -INF, -INF, 2], [INF, NAN, 0, 0]]
    assert argmax(torch.tensor(rows, dtype=dtype)).tolist() == [1, -1, -1, -1, 3, -1]
    assert argmax(torch.zeros(0, 4, dtype=dtype)).tolist() == []
    assert argmax(array(torch.tensor(rows, dtype=dtype))).tolist() == [1, -1, -1, -1, 3, -1]
    assert argmax(array(torch.zeros(0, 4, dtype=dtype))).tolist() == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_best_of_rows_are_those_of_a_sort(dtype: torch.dtype) -> None:
    dice = torch.Generator().manual_seed(1)
    for rows, size, k in ((0, 500, 8), (1, 8 * PART, 8), (3, 1000, 8), (2, 401, 1), (4, 777, 5), (2, 3, 8)):
        for logits in (torch.randn(rows, size, generator=dice), torch.randint(-3, 3, (rows, size), generator=dice).float()):
            exact = logits.to(dtype)
            found = best_first(exact, k)
            sort = [sorted(range(size), key=lambda i, row=row: (-row[i], i))[:k] for row in exact.tolist()]  # type: ignore[misc]
            assert best_first(array(exact), k).tolist() == sort
            if k * PART <= size:
                assert found.tolist() == sort
            assert [[row[i] for i in ids] for row, ids in zip(exact.tolist(), found)] == [
                [row[i] for i in ids] for row, ids in zip(exact.tolist(), sort, strict=True)
            ]
    odd = torch.zeros(1, 500)
    odd[0, 77] = NAN
    assert best_first(odd, 2).tolist() == best_first(array(odd), 2).tolist() == best_first(array(odd), 20)[:, :2].tolist() == [[77, 0]]


def damaged(path: Path, where: str) -> Path:
    file = tiny_llama(path) / "model.safetensors"
    weights = load_file(file)
    if where == "one row of the head":
        weights["lm_head.weight"][200] = NAN
    elif where == "an overflow in the head":
        for i in range(24):
            weights["lm_head.weight"][2 * i + 40] = weights["lm_head.weight"][2 * i + 41] = 0
            weights["lm_head.weight"][2 * i + 40, i], weights["lm_head.weight"][2 * i + 41, i] = 3e38, -3e38
    elif where == "a token":
        weights["model.embed_tokens.weight"][66] = NAN
    else:
        weights["model.embed_tokens.weight"][66] = INF
    save_file(weights, file, {"format": "pt"})
    return path


@pytest.mark.parametrize("where", ["one row of the head", "an overflow in the head", "a token", "an infinite token"])
def test_of_a_damaged_checkpoint(tmp_path: Path, where: str) -> None:
    path = damaged(tmp_path, where)
    for backend, dtype in KINDS:
        if where == "an overflow in the head" and dtype == "float64":
            continue  # there is none
        llm = LLM(str(path), backend=backend, dtype="auto" if backend == "reference" else dtype, draft="token-recycling", max_model_len=64)
        for params in (SamplingParams(temperature=0, max_tokens=4, ignore_eos=True), SamplingParams(seed=1, max_tokens=4)):
            with pytest.raises(NotNumbers):
                llm.generate({"prompt_token_ids": [5, 66, 7]}, params)
            if "token" in where:
                free = params.but(max_tokens=2, logit_bias={66: -100.0})
                assert len(llm.generate({"prompt_token_ids": [5, 67, 7]}, free)[0].outputs[0].token_ids) >= 1
        assert llm.engine.memory.used() == 0
