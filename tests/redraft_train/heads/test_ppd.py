"""Vectors in place of tokens: the text does not see them, they stand at their positions, and they learn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from redraft.errors import Unsupported
from redraft.models.trained import Trained
from redraft_train import heads
from redraft_train.heads.ppd import Frozen, PPDHead, Rows
from redraft_train.target import Target
from tests.contracts import plain
from tests.redraft_train.heads import toys


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return toys.target(tmp_path_factory.mktemp("target"))


def made(target: Target, text: str = "ppd:tokens=3,cuts=8") -> PPDHead:
    torch.manual_seed(0)
    head = heads.create(text, target, toys.KEPT)
    assert isinstance(head, PPDHead)
    return head


def test_the_frozen_model_is_the_target(target: Target) -> None:
    tokens = torch.randint(0, 100, (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        state = Frozen(target)(
            target.embedding[tokens].float(), Rows(torch.arange(9.0)[None], torch.ones(1, 9, 9, dtype=torch.bool).tril())
        )
    wanted = plain.logits(target.spec, target.weights, tokens[0].tolist())
    np.testing.assert_allclose(state[0].numpy() @ target.head.float().numpy().T, wanted, rtol=1e-3, atol=1e-3)


def test_vectors_stand_where_tokens_would(target: Target) -> None:
    """Vectors that are the embeddings of the next tokens give the states of these tokens, in a row of two texts too."""
    window, head = toys.chains(target, 3, rows=1), made(target)
    window.text[:, 12:] = 1
    window.positions[:, 12:] -= 12
    t = window.tokens.shape[1]
    seen = torch.ones(t, t, dtype=torch.bool).tril() & (window.text[0][:, None] == window.text[0])
    with torch.no_grad():
        alone = head.model[0](head.embedded(window.tokens), Rows(window.positions.float(), seen[None]))
        for cut in (2, 14):
            head.vectors.copy_(target.embedding[window.tokens[0, cut + 1 : cut + 4]].float())
            for i, found in enumerate(head.states(window)):
                torch.testing.assert_close(found[:, cut], alone[:, cut + 1 + i], rtol=1e-4, atol=1e-4)


def test_only_the_vectors_learn_and_are_stored(target: Target, tmp_path: Path) -> None:
    head = made(target)
    assert [name for name, _ in head.named_parameters()] == ["vectors"]
    window = toys.chains(target, 1, rows=4)
    with torch.no_grad():
        before = head.loss(window)
    optimizer = torch.optim.AdamW(head.parameters(), 0.02)
    for step in range(30):
        head.loss(toys.chains(target, 2 + step, rows=4)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        after = head.loss(window)
    assert after.loss < before.loss and after.counts.shape == (3,)
    read = Trained.load(Trained("ppd", "0", head.about(), head.export()).save(tmp_path), "ppd")
    again = made(target)
    again.restore(read.arrays)
    torch.testing.assert_close(again.vectors, head.vectors, rtol=0.01, atol=0.01)


def test_layers_of_another_form_are_refused(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Target, "layer", lambda self, index: None)
    with pytest.raises(Unsupported, match=r"^--head ppd: trains through layers of Llama's form, all of one size; layer 0"):
        made(target)
