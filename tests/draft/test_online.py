"""A draft model that changes while texts are written."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from redraft import LLM, SamplingParams, registry
from redraft.core.sequence import Request
from redraft.draft.online import DRAFT, TEXTS, Learner, Rate
from redraft.errors import InvalidInput, Unsupported
from redraft.models import loader

PROMPTS = ["def sub(a, b):\n", "for i in range(3):\n    print("]
PARAMS = [SamplingParams(temperature=t, max_tokens=12, seed=7) for t in (0, 0.8)]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("embedded", draft="draft-model", cache_memory=1 << 25)


def learner(llm: LLM, path: Path, **options: int) -> tuple[LLM, Learner]:
    text = "".join(f",{name}={value}" for name, value in options.items())
    made = llm.sibling(draft=f"online:path={path}{text}")
    opened: Any = made.engine.drafter.own.drafter
    assert isinstance(opened, Learner)
    return made, opened


def run(llm: LLM) -> list[tuple[list[int], int, int]]:
    """Tokens, drafted and accepted nodes of each text."""
    outputs = [output.outputs[0] for params in PARAMS for output in llm.generate(PROMPTS, params)]
    assert not any(one.stats.fault for one in outputs)
    return [(one.token_ids, one.stats.drafted, one.stats.accepted) for one in outputs]


def place(path: Path, noise: float) -> None:
    """New weights: those of the draft model with noise."""
    base = loader.resolve("embedded-draft")
    (path / DRAFT).mkdir(exist_ok=True)
    for file in base.glob("*.json"):
        shutil.copy(file, path / DRAFT)
    weights = load_file(base / "model.safetensors")
    dice = np.random.default_rng(1)
    changed = {
        name: one if one.ndim < 2 else (one + noise * np.std(one.astype(np.float32)) * dice.standard_normal(one.shape)).astype(one.dtype)
        for name, one in weights.items()
    }
    save_file(changed, partial := path / "part", {"format": "pt"})
    os.replace(partial, path / DRAFT / "model.safetensors")


def test_without_new_weights_it_is_the_draft_model(llm: LLM, tmp_path: Path) -> None:
    made, _ = learner(llm, tmp_path)
    assert run(made) == run(llm)


def test_what_it_notes_is_the_targets_distribution_at_corrected_tokens(llm: LLM, tmp_path: Path) -> None:
    made, _ = learner(llm, tmp_path, top=5)
    (output,) = made.generate(PROMPTS[:1], PARAMS[0].but(logprobs=5))
    (file,) = (tmp_path / TEXTS).iterdir()
    found = load_file(file)
    written = output.outputs[0]
    first = len(found["tokens"]) - len(written.token_ids)
    assert found["tokens"][first:].tolist() == written.token_ids
    assert len(found["index"]) > 0
    for at, ids, logs in zip(found["index"], found["ids"], found["logs"], strict=True):
        assert ids[np.argmax(logs)] == found["tokens"][at], "the greedy token is the likeliest one"
        assert written.logprobs is not None
        assert written.logprobs[at - first].logprob == pytest.approx(logs.max(), abs=1e-3)


def test_texts_with_a_salt_are_not_written(llm: LLM, tmp_path: Path) -> None:
    made, _ = learner(llm, tmp_path)
    made.engine.add(Request("tenant", made.tokenizer.encode(PROMPTS[0]), made.params(PARAMS[0]), salt="some"))
    while made.engine.has_work:
        made.engine.step()
    assert not list((tmp_path / TEXTS).iterdir())


def test_forked_and_aborted_texts_are_ended_once(llm: LLM, tmp_path: Path) -> None:
    made, opened = learner(llm, tmp_path)
    prompt = made.tokenizer.encode(PROMPTS[0])
    for name in ("whole", "aborted"):
        made.engine.add(Request(name, list(prompt), made.params(PARAMS[1].but(n=2))))
    for _ in range(4):
        made.engine.step()
    made.engine.abort("aborted")
    while made.engine.has_work:
        made.engine.step()
    assert opened.drafter.runner.memory.used() == made.engine.memory.used() == 0
    texts = [load_file(file)["tokens"].tolist() for file in (tmp_path / TEXTS).iterdir()]
    assert 2 <= len(texts) <= 4 and all(text[: len(prompt)] == prompt for text in texts)


def test_new_weights_change_drafts_and_no_text_and_bad_ones_are_taken_back(llm: LLM, tmp_path: Path) -> None:
    made, opened = learner(llm, tmp_path, trial=8)
    before = run(made)
    own = opened.drafter.runner.weights
    place(tmp_path, 3.0)
    bad = run(made)
    assert [one[0] for one in bad] == [one[0] for one in before], "the text is the target's"
    assert sum(one[2] for one in bad) < sum(one[2] for one in before)
    run(made)
    assert opened.reverted == 1 and opened.drafter.runner.weights is own
    assert run(made) == before
    assert run(llm) == before, "the sibling's model did not change"


def test_weights_of_another_form_are_left_alone(llm: LLM, tmp_path: Path) -> None:
    made, opened = learner(llm, tmp_path)
    own = opened.drafter.runner.weights
    shutil.copytree(loader.resolve("embedded"), tmp_path / DRAFT)
    run(made)
    assert opened.drafter.runner.weights is own


def test_a_rate_is_below_another_only_beyond_chance() -> None:
    one, other = Rate(50), Rate(50)
    for i in range(50):
        one.add(i % 2, 1)
        other.add(1 - i % 2, 1)
    assert one.full and not one.below(other)
    for _ in range(25):
        one.add(0, 1)
    assert one.below(other) and not other.below(one)


def test_what_is_refused(llm: LLM, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"^online:path=none: must be a folder"):
        registry.create("draft", "online")
    with pytest.raises(Unsupported, match=r"^online:draft=copyspec: this drafter has no draft model"):
        llm.sibling(draft=f"online:draft=copyspec,path={tmp_path}")
