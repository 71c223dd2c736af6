"""The draft model is found, checked and loaded once. Errors are one clear line."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from redraft import LLM, SamplingParams
from redraft.errors import CheckpointError, InvalidInput, OutOfMemory
from redraft.models import loader, memory
from redraft.models.draft_model import load_draft_model
from redraft.models.runner import Runner
from redraft.ops.backend import Linear
from redraft.ops.torch_ops import TorchOps


def target(**changes: object) -> Runner:
    """The embedded target, without weights."""
    checkpoint = loader.inspect(loader.resolve("embedded"), "float32")
    given = {"source": checkpoint.path, **changes}
    return Runner(checkpoint.spec, loader.meta_weights(checkpoint), TorchOps(torch.float32), 4, **given)  # type: ignore[arg-type]


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """The embedded draft with two of its tokenizer's entries exchanged."""
    path = tmp_path / "other"
    shutil.copytree(loader.resolve("embedded-draft"), path)
    file = path / "tokenizer.json"
    raw = json.loads(file.read_text())
    vocabulary = raw["model"]["vocab"]
    by_id = sorted(vocabulary, key=vocabulary.get)
    first, second = by_id[300], by_id[301]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(raw))
    return path


def test_the_embedded_target_has_a_sibling_and_loads_it_once() -> None:
    runner = target()
    found = load_draft_model(runner, None)
    assert found is load_draft_model(runner, None) is load_draft_model(runner, "embedded-draft")
    assert found.weights.head.meta, "a target without data reads no draft weights"
    assert found.spec.hidden < runner.spec.hidden


def test_a_real_one_drafts() -> None:
    llm = LLM("embedded", draft="none", dtype="float32", max_model_len=64)
    params = SamplingParams(temperature=0, max_tokens=8)
    plain = llm.generate("import os\n", params)[0].outputs[0]
    drafted = llm.sibling(draft="draft-model").generate("import os\n", params)[0].outputs[0]
    assert drafted.token_ids == plain.token_ids and drafted.stats.accepted > 0
    (second,) = llm.runner.draft_models.values()
    assert second.memory.blocks == llm.runner.memory.blocks and second.backend is llm.runner.backend


def test_without_a_name_the_error_says_how_to_give_one() -> None:
    with pytest.raises(InvalidInput, match="--draft-model FOLDER") as error:
        load_draft_model(target(source=None), None)
    assert "\n" not in str(error.value)


def test_the_configured_one_is_used(other: Path) -> None:
    with pytest.raises(CheckpointError, match="vocabulary"):
        load_draft_model(target(draft_model=str(other)), None)


def test_another_vocabulary_is_refused_with_both_named_and_what_differs(other: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        load_draft_model(target(), str(other))
    text = str(error.value)
    assert str(other) in text and str(loader.resolve("embedded")) in text
    assert "2 ids differ, the first is 300: " in text and "\n" not in text


def test_another_size_is_refused_where_there_are_no_tokenizers(other: Path) -> None:
    runner = target(source=None)
    runner.spec = replace(runner.spec, vocab=99)
    with pytest.raises(CheckpointError, match="4096, the target's 99"):
        load_draft_model(runner, str(other))


def test_it_must_fit_beside_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = target()
    runner.weights = replace(runner.weights, head=Linear(torch.zeros(1, 1)))
    monkeypatch.setattr(memory, "limits", lambda device: 1 << 20)
    with pytest.raises(OutOfMemory, match=r"does not fit beside the target: weights 4\.\d MiB, free 1\.0 MiB"):
        load_draft_model(runner, None)


def test_a_missing_folder_is_reported() -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        load_draft_model(target(), "/nowhere/at all")
