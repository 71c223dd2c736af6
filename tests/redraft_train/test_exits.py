"""A model learns to end at lower layers, and its folder is complete."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from redraft import LLM, SamplingParams
from redraft.models.tokenizer import Tokenizer
from redraft_train.exits import Plan, evenly, loss, save, train
from tests.checkpoints import tiny_llama

TEXT = "".join(f"def name{i % 3}(self):\n    return self.name{i % 3}\n" for i in range(60))
QUICK = Plan(steps=30, rows=4, length=48, rate=1e-2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("tiny"), num_hidden_layers=4)


def tokens(folder: Path) -> torch.Tensor:
    return torch.tensor(Tokenizer(folder).encode(TEXT, special=False))


def trained(folder: Path, plan: Plan = QUICK) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    train(model, tokens(folder), plan)
    return model


def test_the_loss_falls_behind_every_exit(folder: Path) -> None:
    rows, model = tokens(folder)[:192].view(4, 48), trained(folder)
    with torch.no_grad():
        _, before = loss(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), rows, (1, 2, 3))
        _, after = loss(model, rows, (1, 2, 3))
    assert len(after) == 4 and all(b - a > 1 for a, b in zip(after, before, strict=True))


def test_the_loss_behind_the_last_layer_is_the_models(folder: Path) -> None:
    model, rows = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tokens(folder)[:96].view(2, 48)
    with torch.no_grad():
        _, each = loss(model, rows, (2,))
        whole = model(rows, labels=rows).loss
    assert each[-1] == pytest.approx(whole.item(), rel=1e-5) != pytest.approx(each[0], rel=1e-2)


def test_the_same_seed_gives_the_same_model_and_another_drops_other_layers(folder: Path) -> None:
    plans = [Plan(steps=2, rows=2, length=32, dropout=0.9, seed=seed) for seed in (1, 1, 2)]
    one, same, other = ([parameter.clone() for parameter in trained(folder, plan).parameters()] for plan in plans)
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_exits_are_spaced_evenly() -> None:
    assert evenly(8) == (2, 4, 6) and evenly(30) == (7, 15, 22) and evenly(2) == (1,) and evenly(1) == ()


def test_the_folder_is_a_model_that_drafts_from_its_exits(folder: Path, tmp_path: Path) -> None:
    save(trained(folder), folder, tmp_path / "out")
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    plain, drafting = (LLM(tmp_path / "out", dtype="float32", draft=draft) for draft in ("none", "del:head=off,every=1"))
    (one,), (two,) = plain.generate(TEXT[:40], params), drafting.generate(TEXT[:40], params)
    assert one.outputs[0].token_ids == two.outputs[0].token_ids
    assert two.outputs[0].stats.accepted > 10
