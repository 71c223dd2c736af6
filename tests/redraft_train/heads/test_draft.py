"""The small draft model: its checkpoint computes what was trained, in the engine too."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from redraft.errors import InvalidInput
from redraft.llm import LLM
from redraft_train import heads, states
from redraft_train.heads.draft import Draft, DraftModel
from redraft_train.texts import Text
from tests.redraft_train.heads import toys

TEXT = "draft:width=64,layers=2,group=1"


def test_learns(tmp_path: Path) -> None:
    target = toys.target(tmp_path)
    _, before = toys.trained(TEXT, target, 0)
    _, after = toys.trained(TEXT, target, 40)
    assert after.loss < 0.5 * before.loss and after.hits[0] > 0.9 * after.counts[0]


def test_the_checkpoint_is_what_was_trained(tmp_path: Path) -> None:
    target = toys.target(tmp_path / "target")
    head, _ = toys.trained(TEXT, target, 3)
    assert isinstance(head, DraftModel)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    folder = tmp_path / "draft"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(head.about()))
    save_file(head.export(), folder / "model.safetensors", {"format": "pt"})
    for file in (tmp_path / "target").glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    tokens = torch.arange(20, 60)[None]
    window = toys.window(target, tokens)
    with torch.no_grad():
        logits = head.states(window)[0] @ target.head.float().T
        torch.testing.assert_close(head.states(window)[0][:, :9], head.states(toys.window(target, tokens[:, :9]))[0])
    llm = LLM(str(folder), dtype="float32")
    found = states.write(llm.runner, [Text("a", 0, False, 0.0, tokens[0].tolist(), [(1, 40)])], tmp_path / "states")
    expected = logits[0].log_softmax(-1).numpy()
    assert np.abs(expected).max() > 6  # sure of some tokens
    ids = found.top_ids.astype(np.int64)
    np.testing.assert_allclose(found.top_logits - found.log_sum[:, None], np.take_along_axis(expected, ids, -1), atol=0.1)
    llm = LLM(str(tmp_path / "target"), dtype="float32", draft=f"draft-model:model={folder}")
    assert llm.generate("abc", max_tokens=4)[0].outputs[0].token_ids


def test_errors() -> None:
    with pytest.raises(InvalidInput, match="group=3: must divide 4"):
        Draft(group=3)
    with pytest.raises(InvalidInput, match="width=100: must be a multiple of 64"):
        Draft(width=100)


def test_a_target_narrower_than_the_draft(tmp_path: Path) -> None:
    head = heads.create("draft:width=128,group=2", toys.target(tmp_path), np.arange(3, 20))
    assert head.export()["lm_head.weight"].shape == (head.target.spec.vocab, 128)  # type: ignore[union-attr]
