"""Acceptance and its bound: measured only for sampled drafts, and without effect on the text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from redraft import LLM, SamplingParams, registry
from redraft.bench import gauge
from redraft.bench.compare import CompareOptions, compare
from redraft.bench.gauge import Gauged
from redraft.bench.prompts import Prompt
from redraft.card import Guarantee
from redraft.core.noise import Stream
from redraft.core.tree import Kind
from redraft.verify.verifier import Rejecting
from tests.bench.fakes import checkpoint
from tests.contracts.algebra import random_distributions
from tests.contracts.drawn import ForestDistribution, forest
from tests.contracts.test_drawn import BUDGET, DRAWN

PROMPTS = [Prompt(str(i), "ab"[i % 2], prompt=f"w{3 + i} w9 w4") for i in range(4)]
RULES = {name: registry.create("verify", name) for name in registry.METHODS["verify"]}
COINS = [name for name, rule in RULES.items() if rule.drafts is Stream.DRAFT and rule.card.guarantee <= Guarantee.SAME_DISTRIBUTION]


def pair(kind: Kind) -> Iterator[tuple[str, Rejecting]]:
    for name in COINS:
        rule = registry.create("verify", name)
        if kind in rule.supports:
            yield name, rule


@pytest.mark.parametrize("drafter", DRAWN)
def test_acceptance_lies_under_its_bound_and_is_what_was_accepted(drafter: str) -> None:
    rng = np.random.default_rng(5)
    distributions, draft = random_distributions(rng), random_distributions(rng)
    trees = forest(DRAWN[drafter], draft, 500, BUDGET)
    for name, rule in pair(DRAWN[drafter].kind):
        gauged = Gauged(rule)
        accepted = gauged.accept(trees, ForestDistribution(distributions, trees))  # type: ignore[arg-type]
        assert accepted == rule.accept(trees, ForestDistribution(distributions, trees)), "looking changes nothing"  # type: ignore[arg-type]
        share = gauged.share
        assert share is not None
        assert 0.3 < share.ratio < 1 + 4 * share.error, name
        kept = sum(len(one.path) > 0 for one in accepted) / len(accepted)
        roots = [own for own, _ in first_nodes(rule, trees, distributions)]
        assert abs(np.mean(roots) - kept) < 5 * np.std(roots) / np.sqrt(len(roots)) + 5 * np.sqrt(0.25 / len(accepted)), name


def first_nodes(rule: Rejecting, trees: Any, distributions: Any) -> list[tuple[float, float]]:
    distribution, found = ForestDistribution(distributions, trees), []
    for root, tree in zip(distribution.roots.tolist()[:300], trees[:300], strict=True):
        (p,), (q,) = distribution.probs([root]), tree.distributions.probs([0])
        found.append(gauge.gauge(rule, p, q, tree.tokens[tree.drawn(-1)].tolist(), Kind(tree.kinds[0])))
    return found


def test_few_nodes_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gauge, "MAX_NODES", 7)
    name, method = next(iter(DRAWN.items()))
    draft = random_distributions(np.random.default_rng(1))
    trees = forest(method, draft, 50, BUDGET)
    _, rule = next(pair(method.kind))
    gauged = Gauged(rule, every=3)
    gauged.accept(trees, ForestDistribution(draft, trees))  # type: ignore[arg-type]
    assert gauged.visited >= 50 and len(gauged.found) == 7
    assert gauged.share is not None and gauged.share.ratio == pytest.approx(1), f"{name}: p = q accepts all"


def test_compare_gives_it_where_coins_are_tossed(tmp_path: Path) -> None:
    folder = str(checkpoint(tmp_path))
    drafter, method = next(iter(DRAWN.items()))
    rule, _ = next(pair(method.kind))
    params = SamplingParams(temperature=1, max_tokens=6, seed=1)
    for verify, given in ((rule, {1}), ("coupled", set())):
        llm = LLM(folder, draft_model=folder, dtype="float32", verify=verify, prefix_sharing=False, max_model_len=64)
        found = compare(llm, CompareOptions((drafter,), params, rounds=1, bound=True), PROMPTS)
        assert set(found.bounds) == given
        assert llm.sibling(draft=drafter).engine.verifier.own.drafts is registry.create("verify", verify).drafts
        for share in found.bounds.values():
            assert share.ratio == pytest.approx(1), "a draft model that is the target is always right"
