"""Momentum decoding against a plain definition, and what its card says must hold."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from redraft.errors import InvalidInput
from redraft.sample.controls.momentum import Momentum
from redraft.sample.sampler import Sampler
from tests.sample.toy import begun

V = 9
LETTERS = "abc,.d: e"
F = {0: 0, 1: 1, 2: 3, 3: 4, 4: 5}
TOKENS = st.lists(st.integers(0, 3), max_size=12)
LOGITS = st.lists(st.floats(-4, 4).map(lambda x: round(x, 1)), min_size=V, max_size=V)


def closed(text: list[int], token: int) -> int:
    """The length of the longest n-gram that the token closes and that occurred, 1 if it only occurred itself."""
    if token not in text:
        return 0
    new = [*text, token]
    return max(n for n in range(1, len(new)) if any(text[i : i + n] == new[-n:] for i in range(len(text) - n + 1)))


def scored(logits: list[float], text: list[int], method: Momentum) -> dict[int, float]:
    """token -> score, of the candidates; blocked ones by probability below all others."""
    weights = np.exp(np.array(logits) - max(logits))
    probs = weights / weights.sum()
    found = {}
    for token in sorted(range(V), key=lambda i: (-logits[i], i))[: method.k]:
        length = closed(text, token)
        if length == 1 and method.exempt and not LETTERS[token].isalnum():
            length = 0
        found[token] = probs[token] - (1e3 if method.block and length >= method.block else method.alpha * F.get(length, 5))
    return found


def row(logits: list[float], text: list[int], method: Momentum, prompt_len: int = 1, drafted: list[int] | None = None, **params: float):  # type: ignore[no-untyped-def]
    sampler = Sampler(V, frozenset(), bytes_of=lambda token: LETTERS[token].encode())
    seq = begun(sampler, text, prompt_len=prompt_len, **{"temperature": 0, **params}, control=method)
    return sampler.row(np.array(logits), seq, drafted or [])


@settings(max_examples=150, deadline=None)
@given(LOGITS, TOKENS, TOKENS, st.sampled_from([0.0, 0.2, 1.0]), st.sampled_from([0, 3, 6]), st.booleans(), st.booleans())
def test_the_best_score_of_the_definition(logits, output, drafted, alpha, block, prompt, exempt) -> None:  # type: ignore[no-untyped-def]
    method = Momentum(alpha=alpha, k=4, block=block, prompt=prompt, exempt=exempt)
    text = [1, 2, *output]
    wanted = scored(logits, (text + drafted)[0 if prompt else 2 :], method)
    found = row(logits, text, method, 2, drafted)
    assert found.ids.tolist() == sorted(wanted)
    np.testing.assert_allclose(found.values, [wanted[token] for token in sorted(wanted)], atol=1e-12)
    drawn = row(logits, text, method, 2, drafted, temperature=1)
    above = {token: score for token, score in wanted.items() if score > 1e-12}
    if above:
        np.testing.assert_allclose(np.exp(drawn.values[np.isin(drawn.ids, [*above])]), [above[token] for token in sorted(above)], atol=1e-9)
    else:
        assert len(drawn.ids) == 1 and wanted[drawn.ids[0]] == max(wanted.values())


def test_nothing_repeated_is_greedy_and_so_is_no_resistance() -> None:
    logits = [0.0, 3.0, 2.0, 1.0, 0, 0, 0, 0, 0]
    assert row(logits, [5, 6], Momentum()).values.argmax() == 1
    loop = [1, 2, 1, 2, 1, 2, 1]
    free = row(logits, loop, Momentum(alpha=0, block=0))
    assert free.ids[free.values.argmax()] == 1


def test_blocking_is_that_of_n_grams_alone() -> None:
    logits = [0.0, 1.0, 3.0, 2.0, 0, 0, 0, 0, 0]
    found = row(logits, [2, 1, 2, 4, 1], Momentum(alpha=0, block=3))  # 1 2 occurred, 4 1 2 did not
    assert found.ids[found.values.argmax()] == 2
    found = row(logits, [2, 1, 2, 4, 2, 1], Momentum(alpha=0, block=3))
    assert found.ids[found.values.argmax()] == 3, "2 1 2 occurred"


def test_all_candidates_blocked_gives_the_likeliest() -> None:
    for temperature in (0, 1):
        found = row([2.0, 3.0, 0, 0, 0, 0, 0, 0, 0], [0, 1, 0, 1, 0, 0, 1, 1, 0], Momentum(k=2, block=1), temperature=temperature)
        assert np.isfinite(found.values.max()) and found.ids[found.values.argmax()] == 1


def test_options() -> None:
    with pytest.raises(InvalidInput, match="momentum:k=0: must be 1 to 1024"):
        Momentum(k=0)
    with pytest.raises(InvalidInput, match="exempt=true: needs a model with a tokenizer"):
        begun(Sampler(V, frozenset()), [1], control="momentum:exempt=true")
