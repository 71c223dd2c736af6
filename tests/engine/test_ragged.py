"""Texts of a batch that accept different numbers of drafted tokens: nothing has to be realigned, because each has its own pages."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from redraft import LLM, SamplingParams
from redraft.core.sequence import Request
from redraft.engine.output import checked
from redraft.ops import library

TEXTS = (
    "def add(", "import os\n\n", "class Queue:\n    def __init__(self", "x = [1, 2, 3]\nfor one in x:\n    print(",
    "# A list of names\n", "try:\n    import json\n", "def f(a, b):\n    return a", "while True:\n",
)  # fmt: skip
BACKENDS = [("native" if library.load() else "numpy", "float32")]  # the contracts compare batches in float64
PAGE = 32


def loaded(backend: str, dtype: str, draft: str) -> LLM:
    return LLM("embedded", backend=backend, dtype=dtype, draft=draft, draft_total=64, prefix_sharing=False, max_seqs=8)


def requests(llm: LLM, tokens: int, temperature: float) -> list[Request]:
    ids = [llm.tokenizer.encode(text) for text in TEXTS]
    return [
        Request(str(i), one, SamplingParams(temperature=temperature, seed=i, max_tokens=tokens, ignore_eos=True))
        for i, one in enumerate(ids)
    ]


def pages(llm: LLM, seq: Any) -> dict[str, np.ndarray]:
    """All arrays of the full pages of a text."""
    paged = llm.runner.memory.paged
    stored = paged.table.export(seq)
    arrays = paged.store.read(stored.space, np.array(stored.pages[: stored.tokens // PAGE], np.int32))
    return {name: np.asarray(array, np.float64) for name, array in arrays.items()}


@pytest.mark.parametrize("draft", ["draft-model:length=4", "token-recycling"])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_keys_and_positions_are_those_of_a_fresh_prefill(backend: str, dtype: str, draft: str) -> None:
    llm, fresh = loaded(backend, dtype, draft), loaded(backend, dtype, "none")
    running = requests(llm, 200, 1.0)
    for request in running:
        llm.engine.add(request)
    seqs = [request.sequences[0] for request in running]
    while min(seq.stored for seq in seqs) <= PAGE:
        checked(llm.engine.step())
    assert len({seq.generated for seq in seqs}) > 1  # ragged
    for seq in seqs:
        (positions,) = llm.runner.memory.paged.table.positions(seq)
        assert positions.tolist() == list(range(seq.stored)) and seq.stored == len(seq.tokens) - 1
        again = Request("again", list(seq.tokens[: seq.stored]), SamplingParams(temperature=0, max_tokens=9, ignore_eos=True))
        fresh.engine.add(again)
        checked(fresh.engine.step())
        found, expected = pages(llm, seq), pages(fresh, again.sequences[0])
        for name in found:
            np.testing.assert_allclose(found[name], expected[name], atol=1e-3, rtol=1e-3)
            assert found[name].size
        fresh.engine.abort(again.id)


@pytest.mark.parametrize("draft", ["draft-model:length=4", "token-recycling"])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_a_batch_of_eight_writes_what_each_writes_alone(backend: str, dtype: str, draft: str) -> None:
    llm = loaded(backend, dtype, draft)
    for temperature in (0.0, 1.0):
        params = [request.params for request in requests(llm, 24, temperature)]
        batch = [output.outputs[0].token_ids for output in llm.generate(list(TEXTS), params)]
        alone = [llm.generate(text, one)[0].outputs[0].token_ids for text, one in zip(TEXTS, params, strict=True)]
        assert batch == alone
