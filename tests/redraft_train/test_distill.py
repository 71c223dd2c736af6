"""Distillation: every loss makes the draft's distribution more like the target's; the same seed gives the same bits."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from redraft.errors import InvalidInput
from redraft_train.distill import TOKENS, Plan, acceptance, continued, distil, distributions
from redraft_train.losses import LOSSES
from tests.models import tiny

PROMPT, LENGTH = 3, 12
VOCAB = 12


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    """A target with sharp distributions and an untrained draft."""
    target = tiny.model("llama2", vocab_size=VOCAB)
    with torch.no_grad():
        target.lm_head.weight *= 3
    return tiny.model("llama2", 1, vocab_size=VOCAB, num_hidden_layers=1), target


def texts(model: Any, seed: int, count: int = 48) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return continued(model, torch.randint(0, VOCAB, (count, PROMPT), generator=random), LENGTH, random)


@pytest.mark.parametrize("loss", [*LOSSES, TOKENS])
def test_raises_acceptance(loss: str, pair: tuple[Any, Any]) -> None:
    draft, target = copy.deepcopy(pair[0]), pair[1]
    held = texts(target, 2)
    before = acceptance(draft, target, held, PROMPT)
    own = 0.0 if loss in (TOKENS, "tvd++") else 0.3
    distil(draft, target, texts(target, 1), PROMPT, Plan(loss, steps=80, on_policy=own, rate=0.01))
    assert acceptance(draft, target, held, PROMPT) > before + 0.1


def test_of_a_model_and_itself(pair: tuple[Any, Any]) -> None:
    assert acceptance(pair[1], pair[1], texts(pair[1], 0), PROMPT) == pytest.approx(1.0, abs=1e-5)


def test_same_seed_same_bits(pair: tuple[Any, Any]) -> None:
    made = []
    for seed in (5, 5, 6):
        draft, losses = copy.deepcopy(pair[0]), []
        distil(draft, pair[1], texts(pair[1], 1), PROMPT, Plan(steps=4, seed=seed), lambda step, loss: losses.append(loss))  # noqa: B023
        made.append((losses, draft.lm_head.weight))
    assert made[0][0] == made[1][0] != made[2][0]
    assert torch.equal(made[0][1], made[1][1])


def test_continues_from_the_distributions(pair: tuple[Any, Any]) -> None:
    """Frequencies of the first token of many samples are its distribution."""
    prompt = torch.tensor([[1, 2, 3]]).expand(3000, -1)
    found = continued(pair[1], prompt, 1, torch.Generator().manual_seed(0))
    distribution = distributions(pair[1], found[:1], PROMPT)[0, 0].exp()
    torch.testing.assert_close(found[:, -1].bincount(minlength=VOCAB) / 3000, distribution, atol=0.04, rtol=0)


def test_errors() -> None:
    with pytest.raises(InvalidInput, match="loss = 'kl': must be ce, fkl"):
        Plan("kl")
    with pytest.raises(InvalidInput, match="on_policy=2"):
        Plan(on_policy=2)
