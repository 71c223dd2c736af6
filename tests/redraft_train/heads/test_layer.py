"""The decoder layer: that of the target, texts apart, and drafts as a drafter makes them, one row after the other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from redraft.llm import LLM
from redraft_train import heads, states
from redraft_train.heads.eagle import EagleHead
from redraft_train.heads.layer import Layer, Seen
from redraft_train.target import Target
from redraft_train.texts import Text
from redraft_train.windows import Windows
from tests.redraft_train.heads import toys


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("target")


@pytest.fixture(scope="module")
def target(folder: Path) -> Target:
    return toys.target(folder)


def test_the_layer_of_the_target_gives_its_states(folder: Path, target: Target, tmp_path: Path) -> None:
    llm, last = LLM(str(folder), dtype="float32"), len(target.spec.layers) - 1
    tokens = [np.random.default_rng(i).integers(3, 250, size).tolist() for i, size in enumerate((16, 16, 30))]
    written = [Text("a", i, False, 0.0, one, [(5, len(one))]) for i, one in enumerate(tokens)]
    found = states.write(llm.runner, written, tmp_path / "states", [last - 1])
    (window,) = Windows(found, [0, 1, 2], 1, 64, layers=[last - 1]).epoch(0)
    layer, start = Layer(target.shape), target.layer(-1)
    assert start is not None
    layer.load_state_dict(start, strict=False)
    with torch.no_grad():
        x = layer(window.layers[last - 1].float(), Seen(window.text, window.positions))
        state = x * (x.square().mean(-1, keepdim=True) + target.shape.eps).rsqrt() * target.final_norm
    inside = window.text >= 0
    torch.testing.assert_close(state[inside], window.state[inside].float(), rtol=0.03, atol=0.03)

    assert window.distributions(0).counts.sum() == sum(
        len(one) - 5 for one in tokens
    )  # each answer's distributions, from the row before its first token


@pytest.fixture
def eagle(target: Target) -> EagleHead:
    torch.manual_seed(0)
    head = heads.create("eagle:rollout=3", target, toys.KEPT)
    assert isinstance(head, EagleHead)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return head


def test_a_rollout_is_what_a_drafter_does(eagle: EagleHead, target: Target) -> None:
    window = toys.chains(target, 0, rows=1)
    window = replace(window, state=torch.randn(1, toys.LENGTH, target.spec.hidden))
    with torch.no_grad():
        rollout = eagle.states(window)
        for start in (0, 1, 7):
            rows, own = window.state[:, : start + 1], []  # the true states up to `start`, then its own
            for step in range(3):
                states = torch.cat([rows, *own], 1)
                after = eagle.embedded(window.tokens[:, 1 : states.shape[1] + 1])
                seen = Seen(window.text[:, : states.shape[1]], window.positions[:, : states.shape[1]])
                state = eagle.norm(eagle.layer(eagle.fc(torch.cat([states, after], -1)), seen))[:, -1:]
                torch.testing.assert_close(rollout[step][:, start], state[:, 0], rtol=1e-4, atol=1e-4)
                own.append(state)


def test_texts_of_a_row_do_not_see_each_other(eagle: EagleHead, target: Target) -> None:
    one, two = (toys.chains(target, seed, rows=1) for seed in (1, 2))
    text = torch.tensor([[0] * toys.LENGTH + [1] * toys.LENGTH])
    joined = replace(
        one,
        tokens=torch.cat([one.tokens, two.tokens], 1),
        text=text,
        positions=torch.cat([one.positions, two.positions], 1),
        state=torch.cat([one.state, two.state], 1),
    )
    with torch.no_grad():
        both, alone = eagle.states(joined), eagle.states(two)
        for step in range(3):
            torch.testing.assert_close(both[step][:, toys.LENGTH :], alone[step], rtol=1e-4, atol=1e-4)


def test_a_layer_of_another_form_is_not_a_start(target: Target) -> None:
    layers = target.spec.layers
    assert target.layer(-1) is not None
    for change in ({"parallel": True}, {"residual": 0.5}, {"norm": None}):
        spec = replace(target.spec, layers=(*layers[:-1], replace(layers[-1], **change)))
        other = replace(target, spec=spec)
        assert other.layer(-1) is None
        assert heads.create("eagle", other, toys.KEPT).export()["layer.self_attn.q_proj.weight"].any()
