"""Prompts of any lengths share a step without padding, and none sees another. The short form of scripts/prove prepacking."""

from __future__ import annotations

from typing import Any

import pytest

from redraft import LLM
from scripts.proofs import prepacking
from scripts.proofs.prepacking import Prompts


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    return prepacking.lognormal(8, 40, 4096)


@pytest.fixture(scope="module", params=["native", "numpy"])
def llm(request: pytest.FixtureRequest, prompts: Prompts) -> LLM:
    return prepacking.loaded("embedded", prompts, backend=request.param, cache_memory=1 << 26)


def test_only_rows_of_prompts_are_computed(llm: LLM, prompts: Prompts) -> None:
    lengths = [len(prompt) for prompt in prompts]
    assert prepacking.rows(llm, prompts) == [sum(lengths)]
    assert sum(lengths) < len(prompts) * max(lengths) / 2


def test_a_change_of_one_prompt_keeps_every_bit_of_the_others(llm: LLM, prompts: Prompts) -> None:
    assert prepacking.changed(llm, prompts, [0, 3, 7], new=2) == (0, 0)


def test_a_step_that_mixes_prompts_is_found(llm: LLM, prompts: Prompts, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = llm.engine.runner
    forward = runner.forward

    def leaking(batch: Any, *taps: Any) -> Any:
        batch.tokens[0] = batch.tokens.sum() % runner.spec.vocab
        return forward(batch, *taps)

    monkeypatch.setattr(runner, "forward", leaking)
    assert prepacking.changed(llm, prompts, [3], new=2)[0]
