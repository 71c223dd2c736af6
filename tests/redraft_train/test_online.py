"""Training on corrected tokens: the places, and that only better weights are written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from redraft_train.online import Student, Text

VOCAB = 20


@pytest.fixture
def model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": VOCAB}
    return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True))


def text(right: int, seed: int) -> Text:
    """The token after each of three places is `right`, almost surely."""
    logs = torch.full((3, 4), -8.0)
    logs[:, 0] = -0.001
    ids = torch.tensor([[right, *[token for token in range(VOCAB) if token != right][:3]]] * 3)
    return Text(torch.randint(VOCAB, (12,), generator=torch.Generator().manual_seed(seed)), torch.tensor([4, 7, 9]), ids, logs)


def test_it_writes_weights_that_are_better_on_held_out_texts(model: Any, tmp_path: Path) -> None:
    (base := tmp_path / "base").mkdir()
    (base / "config.json").write_text("{}")
    student = Student(model, base, out := tmp_path / "out", every=2, rate=3e-3)
    first = text(7, 99).loss(model).item()
    assert sum(student.add(text(7, i)) for i in range(16))
    assert text(7, 99).loss(model).item() < first
    assert sorted(file.name for file in out.iterdir()) == ["config.json", "model.safetensors"]
    before = (out / "model.safetensors").read_bytes()
    student.held.clear()
    student.held.extend(text(3, i) for i in range(3))
    assert not sum(student.add(text(7, i)) for i in range(3)), "worse on what is held out"
    assert (out / "model.safetensors").read_bytes() == before


def test_the_distribution_of_a_token_is_that_of_the_row_before_it(model: Any) -> None:
    one = text(7, 1)
    changed = one.tokens.clone()
    changed[9:] = 0
    assert Text(changed, one.index, one.ids, one.logs).loss(model).item() == pytest.approx(one.loss(model).item(), abs=1e-6)
    changed[8] = (changed[8] + 1) % VOCAB
    assert Text(changed, one.index, one.ids, one.logs).loss(model).item() != pytest.approx(one.loss(model).item(), abs=1e-6)


def test_files_that_cannot_be_read_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    assert Text.read(tmp_path / "bad.safetensors") is None
    one = text(7, 1)
    arrays = {"tokens": one.tokens.int(), "index": torch.tensor([4, 600, 9], dtype=torch.int32), "ids": one.ids.int(), "logs": one.logs}
    save_file(arrays, tmp_path / "long.safetensors")
    found = Text.read(tmp_path / "long.safetensors")
    assert found is not None and found.index.tolist() == [4, 9] and found.logs.shape == (2, 4)
