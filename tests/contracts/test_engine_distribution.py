"""The whole engine with rules that toss coins: in any batch, the distribution of three tokens is that of a dense computation."""

from __future__ import annotations

from collections import Counter
from functools import cache, partial

import numpy as np
import pytest

from redraft.config import SamplingParams
from redraft.core.sequence import Request
from redraft.engine.output import checked
from redraft.sample.sampler import TargetDistribution
from tests.contracts import plain
from tests.contracts.algebra import LEAST_P, chi_square_p
from tests.contracts.identity import engine, prompts, second
from tests.contracts.test_drawn import DRAWN, PAIRS

TEXTS = 900
LENGTH = 3
PARAMS = SamplingParams(temperature=1.3, top_k=4, repetition_penalty=1.2, max_tokens=LENGTH)
PROMPT = prompts()[3]
CHOSEN = {verifier: drafter for drafter, verifier in PAIRS}  # one drafter for each rule; all of them: test_drawn.py


@cache
def distribution() -> dict[tuple[int, ...], float]:
    """The probability of every text of three tokens, from the definition's logits."""
    spec, weights = plain.tiny()
    found: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(LENGTH):
        longer = {}
        for text, chance in found.items():
            tokens = [*PROMPT, *text]
            x = plain.logits(spec, weights, tokens)[-1].copy()
            for token in set(tokens):
                x[token] = x[token] / PARAMS.repetition_penalty if x[token] > 0 else x[token] * PARAMS.repetition_penalty
            best = np.argsort(-x, kind="stable")[: PARAMS.top_k]
            weigh = np.exp((x[best] - x[best].max()) / PARAMS.temperature)
            longer |= {(*text, int(t)): chance * float(w) for t, w in zip(best, weigh / weigh.sum(), strict=True)}
        found = longer
    return found


def p_value(drafter: str, verifier: str, texts_wanted: int = TEXTS, first: int = LENGTH) -> tuple[float, int, int]:
    """The p-value of the distribution of the texts' first tokens, and the numbers of accepted and rejected nodes."""
    made = engine(partial(second, DRAWN[drafter]), verify=verifier, max_seqs=32, pool=200)
    for seed in range(texts_wanted):
        made.add(Request(str(seed), list(PROMPT), PARAMS.but(seed=seed)))
    texts: dict[str, list[int]] = {}
    accepted = rejected = 0
    while made.has_work:
        for event in checked(made.step()):
            texts.setdefault(event.request.id, []).extend(event.tokens)
            if event.reason is not None:
                accepted += event.stats.accepted
                rejected += event.stats.drafted - event.stats.accepted
    assert {tuple(text) for text in texts.values()} <= set(distribution()), "a text that the target never writes"
    counts = Counter(tuple(text[:first]) for text in texts.values())
    expected: dict[tuple[int, ...], float] = {}
    for text, chance in distribution().items():
        expected[text[:first]] = expected.get(text[:first], 0.0) + chance
    seen = np.array([counts[text] for text in expected])
    return chi_square_p(seen, np.array(list(expected.values())) * texts_wanted), accepted, rejected


@pytest.mark.parametrize("verifier", CHOSEN)
def test_the_distribution_is_the_definitions(verifier: str) -> None:
    p, accepted, rejected = p_value(CHOSEN[verifier], verifier)
    assert accepted and rejected
    assert p >= LEAST_P


def test_coins_that_always_accept_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TargetDistribution, "uniform", lambda distribution, rows, n: np.full((len(rows), n), 1e-9))
    verifier, drafter = next(iter(CHOSEN.items()))
    assert p_value(drafter, verifier, 1500, first=2)[0] < LEAST_P
