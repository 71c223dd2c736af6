"""All heads: each learns what its method can know, comes back from its file, and is the same for the same seed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from redraft.errors import InvalidInput, UnknownMethod
from redraft.models.trained import Trained
from redraft_train import heads
from redraft_train.heads.head import Distributions, Rows
from redraft_train.target import Target
from tests.redraft_train.heads import toys

ALL = (
    "medusa:heads=2", "medusa:heads=2,blocks=2", "hydra:heads=2", "hydra:heads=2,blocks=2", "hydra:heads=2,prefix=1",
    "hydra:heads=2,cell=gru", "eagle:rollout=1", "eagle:rollout=2,regress=0", "kangaroo:layer=1", "medusa:heads=1,train_head=true",
)  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return toys.target(tmp_path_factory.mktemp("target"))


@pytest.mark.parametrize("text", ALL)
def test_learns(text: str, target: Target) -> None:
    _, before = toys.trained(text, target, 0)
    _, after = toys.trained(text, target, 60)
    assert after.loss < 0.5 * before.loss
    assert before.hits.sum() < 0.3 * before.counts.sum() and after.hits.sum() > 0.9 * after.counts.sum()


@pytest.mark.parametrize(("text", "can"), [("medusa:heads=1", False), ("hydra:heads=1", True), ("eagle:rollout=1", True)])
def test_only_what_sees_the_token_in_between_learns_its_successor(text: str, can: bool, target: Target) -> None:
    _, found = toys.trained(text, target, 60, toys.pairs)
    assert (found.hits[0] > 0.9 * found.counts[0]) == can


@pytest.mark.parametrize("text", ALL)
def test_comes_back_from_its_file(text: str, target: Target, tmp_path: Path) -> None:
    head, _ = toys.trained(text, target, 2)
    file = Trained(head.method, "0", head.about(), head.export()).save(tmp_path)
    read = Trained.load(file, head.method)
    assert read.about == head.about()
    again = heads.create(text, target, toys.KEPT)
    again.restore(read.arrays)
    made = again.export()
    assert made.keys() == read.arrays.keys()
    assert all(np.array_equal(made[name], array) for name, array in read.arrays.items())
    assert read.arrays["kept"].dtype == np.int32 and read.arrays["kept"].tolist() == toys.KEPT.tolist()
    with torch.no_grad():
        window = toys.chains(target, 9)
        for one, two in zip(head.states(window), again.states(window), strict=True):
            torch.testing.assert_close(one, two, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("text", ALL)
def test_same_seed_same_bits(text: str, target: Target) -> None:
    one, two = (toys.trained(text, target, 3)[0].export() for _ in range(2))
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_names_are_those_that_drafters_read(target: Target) -> None:
    hidden = target.spec.hidden

    def shapes(text: str) -> dict[str, tuple[int, ...]]:
        found = heads.create(text, target, toys.KEPT).export()
        assert found.pop("kept").shape == toys.KEPT.shape
        return {name: array.shape for name, array in found.items()}

    block = {f"heads.{i}.blocks.0.{part}": (hidden,) * n for i in (0, 1) for part, n in (("weight", 2), ("bias", 1))}
    assert shapes("medusa:heads=2") == block
    found = shapes("hydra:heads=2,blocks=2")
    assert found["heads.1.blocks.0.residual.weight"] == found["heads.1.blocks.0.weight"] == (hidden, 3 * hidden)
    assert found["heads.1.blocks.1.weight"] == (hidden, hidden) and "heads.1.blocks.1.residual.weight" not in found
    found = shapes("eagle")
    assert found["fc.weight"] == (hidden, 2 * hidden) and found["norm.weight"] == (hidden,)
    assert {name for name in found if name.startswith("layer.")} == {f"layer.{name}" for name in target.layer(-1) or {}}
    assert {name.split(".")[1] for name in shapes("kangaroo:layer=1") if "." in name} == {"input_layernorm", "self_attn", "weight"}
    assert shapes("hydra:cell=gru")["cell.ih.weight"] == (3 * hidden, hidden)
    assert shapes("medusa:heads=1,train_head=true")["rows"] == (len(toys.KEPT), hidden)


def test_untrained_heads_are_the_state(target: Target) -> None:
    window = toys.chains(target, 0)
    for text in ("medusa", "hydra", "medusa:blocks=3", "hydra:prefix=1"):
        for depth, state in enumerate(heads.create(text, target, toys.KEPT).states(window)):
            assert torch.equal(state[:, :5], window.state[:, :5]), (text, depth)


def test_hydra_without_embeddings_is_medusa(target: Target) -> None:
    medusa, _ = toys.trained("medusa:heads=2", target, 3)
    hydra = heads.create("hydra:heads=2", target, toys.KEPT)
    hidden = target.spec.hidden
    with torch.no_grad():
        for one, two in zip(medusa.heads, hydra.heads, strict=True):
            two.blocks[0].weight[:, :hidden] = one.blocks[0].weight
            two.blocks[0].bias.copy_(one.blocks[0].bias)
        window = toys.chains(target, 0)
        for one, two in zip(medusa.states(window), hydra.states(window), strict=True):
            torch.testing.assert_close(one[:, : two.shape[1]], two)


@pytest.mark.parametrize("cap", [None, 5.0])
def test_the_loss_and_its_gradients_are_those_of_autograd(cap: float | None, target: Target) -> None:
    spec = replace(target.spec, logit_scale=0.7, logit_softcap=cap)
    rows = Rows(replace(target, spec=spec), toys.KEPT, True)
    random = torch.Generator().manual_seed(0)
    states = torch.randn(1500, spec.hidden, generator=random).requires_grad_()
    ids = torch.randint(0, spec.vocab, (1500, 4), generator=random)
    logs = torch.randn(1500, 5, generator=random).log_softmax(-1)[:, :4]
    total, hit = rows.loss(states, Distributions(ids, logs, ids[:, 0], torch.ones(1500, dtype=torch.bool)))
    (total / 7).backward()
    found = states.grad, rows.rows.grad
    states.grad = rows.rows.grad = None

    logits = torch.full((1500, spec.vocab), -1e4)
    product = states @ rows.rows.T * 0.7
    logits[:, toys.KEPT] = product if cap is None else torch.tanh(product / cap) * cap
    q = F.log_softmax(logits, -1).gather(-1, ids)
    expected = -(logs.exp() * q)[torch.from_numpy(np.isin(ids.numpy(), toys.KEPT))].sum()
    (expected / 7).backward()
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(found, (states.grad, rows.rows.grad), rtol=1e-4, atol=1e-5)
    assert torch.equal(hit, logits.argmax(-1) == ids[:, 0])


def test_what_does_not_count(target: Target) -> None:
    window = toys.chains(target, 0, rows=2)
    window.text[0, 10:] = 1  # two texts in one row
    window.text[1, 20:] = -1  # nothing
    window.mask[1, 3] = False
    distributions = window.distributions(2)
    assert distributions.counts.shape == (2, toys.LENGTH - 3)
    assert distributions.counts[0].nonzero().flatten().tolist() == [*range(7), *range(10, toys.LENGTH - 3)]
    assert distributions.counts[1].nonzero().flatten().tolist() == [0, *range(2, 17)]  # the distribution of position 3 is that of 1 + 2
    assert torch.equal(distributions.token, window.tokens[:, 3:]) and torch.equal(distributions.ids[..., 0], distributions.token)


def test_a_window_in_which_nothing_counts(target: Target) -> None:
    window = toys.chains(target, 0)
    found = heads.create("medusa:heads=2", target, toys.KEPT).loss(replace(window, mask=torch.zeros_like(window.mask)))
    assert found.loss == 0 and found.counts.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("text", "error", "part"),
    [
        ("medussa", UnknownMethod, "medusa"),
        ("medusa:head=2", UnknownMethod, "heads"),
        ("medusa:heads=0", InvalidInput, "heads=0"),
        ("hydra:cell=lstm", InvalidInput, "cell='lstm'"),
        ("kangaroo:layer=3", InvalidInput, "2 or less"),
    ],
)
def test_errors(text: str, error: type[Exception], part: str, target: Target) -> None:
    with pytest.raises(error, match=part):
        heads.create(text, target, toys.KEPT)


def test_kept_must_ascend(target: Target) -> None:
    for bad in ([], [5, 4], [3, 3], [target.spec.vocab]):
        with pytest.raises(ValueError, match="ascending"):
            heads.create("medusa", target, np.array(bad))
