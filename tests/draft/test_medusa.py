"""Heads that guess apart from each other: their numbers, and what untrained ones do."""

from __future__ import annotations

import numpy as np
import pytest

from redraft import registry
from redraft.draft.medusa import MedusaHeads
from redraft.draft.template import Growth
from tests.contracts import plain
from tests.contracts.identity import Condition, check
from tests.draft.test_heads import DEPTHS, HIDDEN, engine, medusa, numbers, saved

HEAD = np.asarray(plain.tiny()[1].head.weight)


def opened(blocks: int = 1, size: float = 4.0, options: str = "") -> MedusaHeads:
    made = engine(f"medusa:path={saved('medusa', *medusa(blocks, size))}{options}").drafter.own.drafter
    assert isinstance(made, MedusaHeads)
    return made


@pytest.mark.parametrize("blocks", [1, 3])
def test_features_are_those_of_the_definition(blocks: int) -> None:
    arrays, _ = medusa(blocks)
    states = numbers(5, HIDDEN, size=6.0).astype(np.float64)
    found = opened(blocks).features(states)
    for head in range(DEPTHS):
        x = states
        for block in range(blocks):
            name = f"heads.{head}.blocks.{block}"
            y = x @ arrays[f"{name}.weight"].T + arrays[f"{name}.bias"]
            x = x + y / (1 + np.exp(-y))
        np.testing.assert_allclose(found[:, head], x, rtol=1e-5, atol=1e-5)


def test_offers_are_the_likeliest_tokens_and_their_probabilities() -> None:
    features = numbers(4, HIDDEN, size=3.0)
    logits = features.astype(np.float64) @ HEAD.T
    chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    for row, offer in zip(chances, opened().offers(features), strict=True):
        assert list(offer.tokens) == np.argsort(-row)[:8].tolist()
        np.testing.assert_allclose(offer.chances, np.sort(row)[::-1][:8], rtol=1e-5)


def test_tokens_depend_on_depth_and_rank_only() -> None:
    growth = Growth(30, DEPTHS)
    opened().grow([growth], numbers(1, HIDDEN, size=4.0).astype(np.float64), [3])
    assert len(growth.tree()) == 30 and len(growth.every) == DEPTHS
    for node, (token, parent) in enumerate(zip(growth.tokens, growth.parents, strict=True)):
        depth = len(growth.tree().path_to(node)) - 1 if node < 30 else None
        assert depth is None or token in growth.every[depth].tokens
        assert parent < node


def test_untrained_heads_offer_what_the_state_itself_would() -> None:
    """With weights of 0 each head is the target's head on the newest token's own state: drafts are bad, and the text is the same."""
    arrays, about = medusa()
    folder = saved("medusa", {name: np.zeros_like(one) for name, one in arrays.items()}, about)
    made = engine(f"medusa:path={folder}").drafter.own.drafter
    assert isinstance(made, MedusaHeads)
    state = numbers(1, HIDDEN, size=4.0)
    assert np.array_equal(made.features(state.astype(np.float64)), np.repeat(state[:, None], DEPTHS, 1))
    for sampling in ("greedy", "sampled"):
        assert check(Condition(f"medusa:path={folder}", sampling, arrivals=(0, 3))).rejected


def test_texts_of_one_step_are_grown_together() -> None:
    """The trees of several texts are those that each has alone."""
    drafter, states = opened(), numbers(3, HIDDEN, size=4.0).astype(np.float64)
    together = [Growth(rows, depth) for rows, depth in [(4, 1), (9, 3), (6, 2)]]
    drafter.grow(together, states, [1, 2, 3])
    for i, growth in enumerate(together):
        alone = Growth(growth.rows, growth.depth)
        drafter.grow([alone], states[i : i + 1], [i + 1])
        assert growth.tokens == alone.tokens and growth.parents == alone.parents and len(growth.tree()) == growth.rows


def test_with_nodes_the_likeliest_paths_are_drafted() -> None:
    drafter = opened(options=",nodes=5")
    growth = Growth(5, DEPTHS)
    drafter.grow([growth], numbers(1, HIDDEN, size=4.0).astype(np.float64), [3])
    (every,) = [growth.every]
    paths = {(a,): every[0].chances[a] for a in range(8)}
    paths |= {(a, b): every[0].chances[a] * every[1].chances[b] for a in range(8) for b in range(8)}
    paths |= {(*path, c): chance * every[2].chances[c] for path, chance in list(paths.items()) if len(path) == 2 for c in range(8)}
    fits = {
        path: chance
        for path, chance in paths.items()
        if all(every[d].chances[rank] >= 0.25 * every[d].chances[0] for d, rank in enumerate(path))
    }
    best = sorted(fits, key=lambda path: -fits[path])[:5]
    tree = growth.tree()
    tokens = [tuple(tree.tokens[tree.path_to(node)].tolist()) for node in range(len(tree))]
    assert drafter.rates.factor(0) == drafter.rates.factor(1) == 1
    assert set(tokens) == {tuple(every[d].tokens[rank] for d, rank in enumerate(path)) for path in best}


def test_the_name_is_registered() -> None:
    assert registry.METHODS["draft"]["medusa"] == "redraft.draft.medusa:Medusa"
