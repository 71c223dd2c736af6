"""Routers learn how many layers to keep, and the engine keeps those that they chose."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from redraft import LLM, SamplingParams
from redraft.errors import InvalidInput
from redraft.models.trained import Trained, model_hash
from redraft_train.routers import METHOD, Example, Plan, Routed, examples, train
from tests.checkpoints import tiny_llama

LAYERS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("tiny"), num_hidden_layers=LAYERS)


def texts(count: int = 8) -> list[Example]:
    """Two kinds: letters, and digits."""
    dice = torch.Generator().manual_seed(2)
    return [Example(torch.randint(20 + 60 * (i % 2), 60 + 60 * (i % 2), (24,), generator=dice), 14) for i in range(count)]


@pytest.fixture(scope="module")
def trained(folder: Path) -> Routed:
    return train(AutoModelForCausalLM.from_pretrained(folder), texts(), Plan(keep=0.5, steps=40, rate=0.1))


def gates(routed: Routed, example: Example) -> list[float]:
    with torch.no_grad():
        return routed(example)[1].tolist()


def test_untrained_routers_keep_all_and_trained_ones_the_wanted_share(folder: Path, trained: Routed) -> None:
    start = Routed(AutoModelForCausalLM.from_pretrained(folder))
    assert gates(start, texts()[0]) == [1.0] * LAYERS
    kept = np.array([gates(trained, example) for example in texts()])
    assert abs(kept[:, 1:-1].mean() - 0.5) <= 0.25 and set(kept.ravel().round(6)) == {0.0, 1.0}
    assert (kept[:, [0, -1]] == 1).all()


def test_with_all_gates_open_the_loss_is_the_models(folder: Path) -> None:
    model, example = AutoModelForCausalLM.from_pretrained(folder), texts()[0]
    loss, _ = Routed(model)(example)
    with torch.no_grad():
        logits = model(example.tokens[None]).logits[0, 13:-1]
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, example.tokens[14:]))


def test_the_same_seed_gives_the_same_routers(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    first, again = (train(model, texts(), Plan(steps=3)).arrays() for _ in range(2))
    assert all(np.array_equal(first[name], again[name]) for name in first)


def test_the_engine_keeps_the_layers_that_the_routers_chose(folder: Path, trained: Routed, tmp_path: Path) -> None:
    llm = LLM(folder, dtype="float32")
    Trained(METHOD, model_hash(llm.runner), {}, trained.arrays()).save(tmp_path)
    chosen = set()
    for example in texts(4):
        prompt = example.tokens[: example.context].tolist()
        seen: list[frozenset[int]] = []
        forward = llm.runner.forward

        def noted(batch, *rest, forward=forward, seen=seen):  # type: ignore[no-untyped-def]
            seen.extend(layers.attention for layers in batch.layers if layers is not None)
            return forward(batch, *rest)

        llm.runner.forward = noted  # type: ignore[method-assign]
        llm.generate(
            {"prompt_token_ids": prompt}, SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, depth=f"first:path={tmp_path}")
        )
        llm.runner.forward = forward  # type: ignore[method-assign]
        wanted = frozenset(np.flatnonzero(np.array(gates(trained, example)) > 0.5).tolist())
        assert seen and set(seen) == {wanted}
        chosen.add(wanted)
    assert chosen


def test_examples_are_the_first_answers_of_texts_that_are_not_held_out(tmp_path: Path) -> None:
    def text(length: int, answers: list[tuple[int, int]], held: bool = False) -> str:
        return json.dumps({"tokens": [*range(length)], "answers": answers, "held": held})

    lines = [text(9, [(4, 7), (8, 9)]), text(9, [(4, 9)], held=True), text(5, [(4, 5)]), text(700, [(4, 600)])]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines) + "\n")
    (found,) = examples(tmp_path)
    assert found.tokens.tolist() == [*range(7)] and found.context == 4
    with pytest.raises(InvalidInput, match=r"--data = .*nothing: no texts.jsonl .*redraft train makes one"):
        examples(tmp_path / "nothing")
