"""The tiny model's texts are varied: a model that repeats one token would hide faults."""

from __future__ import annotations

import numpy as np
import pytest

from redraft.config import SamplingParams
from tests.contracts import plain
from tests.contracts.identity import SAMPLING, expected, prompts


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("sampling", list(SAMPLING))
def test_texts_are_varied_and_hang_on_every_early_token(window: int | None, sampling: str) -> None:
    long = SamplingParams(**{**SAMPLING[sampling].model_dump(), "max_tokens": 40})
    spec, weights = plain.tiny(window)
    prompt = list(prompts()[3])
    text = plain.generate(spec, weights, prompt, long, seed=3)
    assert len(set(text)) >= plain.VOCAB // 2
    changed = 0
    for i in range(8):
        other = [*prompt[:i], (prompt[i] + 1) % plain.VOCAB, *prompt[i + 1 :]]
        changed += plain.generate(spec, weights, other, long, seed=3) != text
    assert changed >= (7 if window is None else 2)


def test_each_prompt_and_seed_has_its_own_text() -> None:
    texts = {expected(None, prompt, "sampled", seed) for prompt in prompts() for seed in (1, 2)}
    assert len(texts) == 2 * len(prompts())


def test_a_window_is_felt() -> None:
    ids = list(prompts()[0])
    full, cut = (plain.logits(*plain.tiny(window), ids) for window in (None, 9))
    np.testing.assert_array_equal(full[:9], cut[:9])
    assert abs(full[9:] - cut[9:]).max(1).min() > 1e-3


def test_draw_tells_its_margin() -> None:
    row = np.array([1.0, 3.0, 2.5, -1.0])
    assert plain.draw(row, SamplingParams(temperature=0), 0, [0]) == (1, 0.5)
    only = SamplingParams(temperature=1, top_p=0.1)
    assert plain.draw(row, only, 0, [0])[0] == 1
    assert plain.draw(row, SamplingParams(temperature=0, repetition_penalty=2.0), 0, [1])[0] == 2
