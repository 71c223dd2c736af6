"""The trainer: its rate, resumption with the same bits, the best weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from redraft import LLM
from redraft.models import loader
from redraft_train import states
from redraft_train.heads import create
from redraft_train.heads.head import Head
from redraft_train.states import States
from redraft_train.target import Target
from redraft_train.texts import Text
from redraft_train.train import MEASUREMENTS, Measured, Moment, Plan, Trainer, rate

SNIPPET = "def add(a, b):\n    return a + b\n\n\nclass Stack:\n    def push(self, item):\n        self.items.append(item)\n\n"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def target() -> Target:
    checkpoint = loader.inspect(loader.resolve("embedded"))
    return Target.of(checkpoint.spec, loader.read(checkpoint))


@pytest.fixture(scope="module")
def found(llm: LLM, tmp_path_factory: pytest.TempPathFactory) -> States:
    tokens = llm.tokenizer.encode(SNIPPET * 4)
    given = [Text(str(i), 0, i == 0, 0.0, tokens[i : i + 40], [(5, 40)]) for i in range(12)]
    return states.write(llm.runner, given, tmp_path_factory.mktemp("states") / "states")


def head(target: Target, seed: int = 0) -> Head:
    torch.manual_seed(seed)
    return create("medusa:heads=2", target, np.arange(600))


def trainer(target: Target, found: States, file: Path, steps: int | None = 9, **plan: Any) -> Trainer:
    return Trainer(head(target), found, Plan(3600.0, steps, rows=2, length=32, **plan), file)


def same(one: Head, other: Head) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_a_run_learns_and_a_resumed_one_ends_with_the_same_bits(target: Target, found: States, tmp_path: Path) -> None:
    whole = trainer(target, found, tmp_path / "whole.pt", steps=25)
    best = whole.run()
    assert whole.at.measured[0].loss > whole.last.loss and best.tokens >= whole.at.measured[0].tokens
    assert whole.at.epoch > 1  # so a checkpoint is within the second reading of the texts and later
    for stop in (4, 17):
        trainer(target, found, tmp_path / "parts.pt", steps=25).run(until=stop)
    last = trainer(target, found, tmp_path / "parts.pt", steps=25)
    assert last.at.step == 17
    assert last.run() == best and same(last.head, whole.head)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts.pt", "whole.pt"]
    again = trainer(target, found, tmp_path / "parts.pt", steps=25)  # nothing is left to do
    assert again.run() == best and same(again.head, whole.head)


def test_a_checkpoint_of_another_plan_is_not_continued(target: Target, found: States, tmp_path: Path) -> None:
    trainer(target, found, tmp_path / "one.pt").run(until=3)
    assert trainer(target, found, tmp_path / "one.pt", seed=1).at.step == 0
    assert trainer(target, found, tmp_path / "one.pt").at.step == 3


def test_the_best_weights_are_kept(target: Target, found: States, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = trainer(target, found, tmp_path / "one.pt", steps=6)
    chains = iter([0.1, 0.2, 0.9, 0.3, 0.3, 0.3, 0.3])
    kept: list[dict[str, torch.Tensor]] = []
    measure = one._measure

    def measured() -> None:
        measure()
        last = one.at.measured.pop()
        one.at.measured.append(Measured(last.step, last.loss, last.accuracy, [next(chains)]))
        kept.append({name: value.clone() for name, value in one.head.state_dict().items()})
        if one.last == max(one.at.measured, key=lambda other: other.tokens):
            one.best = kept[-1]

    monkeypatch.setattr(one, "_measure", measured)
    assert one.run().chain == [0.9]
    assert all(torch.equal(value, kept[2][name]) for name, value in one.head.state_dict().items())
    assert not same(one.head, trainer(target, found, tmp_path / "two.pt").head)


def test_the_budget_ends_at_rate_zero(target: Target, found: States, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10_000))
    monkeypatch.setattr("redraft_train.train.time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    moments: list[Moment] = []
    one = Trainer(head(target), found, Plan(60.0, rows=2, length=32), tmp_path / "one.pt")
    one.run(moments.append)
    lefts = [moment.left for moment in moments]
    assert lefts == sorted(lefts, reverse=True) and lefts[-1] >= 0
    assert one.share == 1 and one.at.seconds >= 60
    assert one.optimizer.param_groups[0]["lr"] < 0.02 * one.head.rate
    assert 2 < len(one.at.measured) <= MEASUREMENTS + 1


def test_the_rate_rises_and_falls_to_zero() -> None:
    shares = np.linspace(0, 1, 101)
    rates = [rate(float(share), 0.1) for share in shares]
    assert rates[0] == 0 and max(rates) == rates[10] == 1 and rates[-1] == 0
    assert (np.diff(rates[:11]) > 0).all() and (np.diff(rates[10:]) < 0).all()
