"""Heads that read the tokens on their path: their numbers, and that without embeddings they are Medusa's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from redraft import registry
from redraft.draft.hydra import WORTH
from redraft.draft.template import Growth
from redraft.errors import Unsupported
from tests.contracts import plain
from tests.draft.test_heads import DEPTHS, HIDDEN, Arrays, clover, engine, hydra, medusa, numbers, saved

EMBED = np.asarray(plain.tiny()[1].embed)
STATES = numbers(2, HIDDEN, size=4.0).astype(np.float64)


def opened(arrays: Arrays, about: dict[str, Any], options: str = "", name: str = "hydra") -> Any:
    return engine(f"{name}:path={saved(name, arrays, about)}{options}").drafter.own.drafter


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def grown(drafter: Any, rows: int = 30) -> list[Growth]:
    growths = [Growth(rows, DEPTHS), Growth(rows // 2, DEPTHS)]
    drafter.grow(growths, STATES, [3, 7])
    return growths


def paths(growth: Growth) -> dict[tuple[int, ...], float]:
    tree = growth.tree()
    assert tree.scores is not None
    return {tuple(tree.tokens[tree.path_to(node)].tolist()): float(tree.scores[node]) for node in range(len(tree))}


def features(arrays: Arrays, about: dict[str, Any], state: np.ndarray, tokens: list[int]) -> np.ndarray:
    """Of the head that reads these tokens."""
    if about.get("cell") == "gru":
        before, gain = state / arrays["cell.gain"], arrays["cell.gain"]
        for token in tokens:
            x = EMBED[token] @ arrays["cell.ih.weight"].T + arrays["cell.ih.bias"]
            h = before @ arrays["cell.hh.weight"].T + arrays["cell.hh.bias"]
            (xr, xz, xn), (hr, hz, hn) = np.split(x, 3), np.split(h, 3)
            reset, update = 1 / (1 + np.exp(-xr - hr)), 1 / (1 + np.exp(-xz - hz))
            before = (1 - update) * np.tanh(xn + reset * hn) + update * before
        return before * gain
    name = f"heads.{len(tokens) - 1}.blocks"
    x = np.concatenate([state, *EMBED[tokens]])
    x = arrays[f"{name}.0.residual.weight"] @ x + silu(arrays[f"{name}.0.weight"] @ x + arrays[f"{name}.0.bias"])
    for block in range(1, about["blocks"]):
        x = x + silu(arrays[f"{name}.{block}.weight"] @ x + arrays[f"{name}.{block}.bias"])
    return x


@pytest.mark.parametrize("made", [hydra(1, 1.0), hydra(3, 1.0), clover()], ids=["one block", "blocks", "cell"])
def test_each_node_offers_what_its_path_and_state_give(made: tuple[Arrays, dict[str, Any]]) -> None:
    head = np.asarray(plain.tiny()[1].head.weight)
    depths = set()
    for growth, state, root in zip(grown(opened(*made)), STATES, [3, 7], strict=True):
        for node, offer in growth.offers.items():
            path = []
            at = node
            while at >= 0:
                path.append(growth.tokens[at])
                at = growth.parents[at]
            logits = head @ features(*made, state, [root, *reversed(path)])
            chances = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
            assert list(offer.tokens) == np.argsort(-chances)[:8].tolist()
            np.testing.assert_allclose(offer.chances, np.sort(chances)[::-1][:8], rtol=1e-3, atol=1e-7)
            depths.add(len(path))
    assert depths == {0, 1, 2}


@pytest.mark.parametrize("options", ["", ",nodes=6"])
@pytest.mark.skipif("medusa" not in registry.METHODS["draft"], reason="compares with medusa")
def test_without_embeddings_they_are_medusas(options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("redraft.draft.hydra.WORTH", 0.0)
    arrays, about = medusa(2, 1.0)
    chained, _ = hydra(2, 1.0)
    for head in range(DEPTHS):
        wide = np.zeros_like(chained[f"heads.{head}.blocks.0.weight"])
        wide[:, :HIDDEN] = arrays[f"heads.{head}.blocks.0.weight"]
        arrays_of = {f"heads.{head}.blocks.{part}": arrays[f"heads.{head}.blocks.{part}"] for part in ("0.bias", "1.weight", "1.bias")}
        chained |= {f"heads.{head}.blocks.0.weight": wide, **arrays_of}
    one, other = (grown(opened(*own, options, name)) for own, name in (((arrays, about), "medusa"), ((chained, about), "hydra")))
    for a, b in zip(one, other, strict=True):
        found, wanted = paths(b), paths(a)
        assert found.keys() == wanted.keys() and len(found) > 3
        np.testing.assert_allclose([found[path] for path in wanted], list(wanted.values()), rtol=1e-4)
    (changed := dict(chained))["heads.1.blocks.0.weight"] = chained["heads.1.blocks.0.weight"] + 1
    assert [paths(growth).keys() for growth in grown(opened(changed, about, options))] != [paths(growth).keys() for growth in one]


def test_a_depth_of_which_little_is_expected_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    drafter = opened(*hydra(), ",nodes=9")
    ran: list[int] = []
    kind = type(drafter)
    step = kind.step
    monkeypatch.setattr(kind, "step", lambda self, depth, *given: ran.append(depth) or step(self, depth, *given))
    drafter.rates.hits[1] = [0.9 * WORTH * drafter.rates.tries[1]] * 8
    grown(drafter)
    assert ran == [0]
    drafter.rates.hits[1] = [drafter.rates.tries[1]] * 8
    grown(drafter)
    assert ran[1:3] == [0, 1]


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"prefix": 1}, r"^hydra: \S+ has a prefix layer, which is not supported; train with prefix=0$"),
        ({"cell": "lstm"}, r"^hydra: \S+ has cell=lstm; none and gru are supported$"),
    ],
)
def test_forms_that_are_not_supported_are_named(about: dict[str, Any], message: str) -> None:
    arrays, own = hydra()
    with pytest.raises(Unsupported, match=message):
        opened(arrays, {**own, **about})
