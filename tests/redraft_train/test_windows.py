"""Windows of texts: which positions they hold and which count."""

from __future__ import annotations

import numpy as np
import pytest

from redraft_train.states import States
from redraft_train.windows import Windows

LENGTHS, PROMPTS = (9, 5, 12), (4, 2, 7)


def states() -> States:
    starts = np.cumsum([0, *LENGTHS])
    total, rng = int(starts[-1]), np.random.default_rng(0)
    answer = np.concatenate([np.arange(length) >= prompt for length, prompt in zip(LENGTHS, PROMPTS, strict=True)])
    held = np.zeros(3, bool)
    bits = rng.integers(0, 1 << 14, (total, 4)).astype(np.uint16)
    ids = rng.integers(0, 50, (total, 2)).astype(np.int32)
    return States(
        np.arange(total, dtype=np.int32), starts, answer, held, bits, {3: bits}, ids, ids.astype(np.float32), ids[:, 0].astype(np.float32)
    )


@pytest.mark.parametrize(("lead", "first"), [(None, (0, 0, 0)), (2, (2, 0, 5)), (0, (4, 2, 7)), (99, (0, 0, 0))])
def test_each_position_is_there_once(lead: int | None, first: tuple[int, ...]) -> None:
    found = states()
    seen = [
        (int(text), int(position), int(token))
        for window in Windows(found, [0, 1, 2], 2, 4, layers=[3], lead=lead).epoch(1)
        for text, position, token in zip(window.text.ravel(), window.positions.ravel(), window.tokens.ravel(), strict=True)
        if text >= 0
    ]
    wanted = [(i, at, int(found.starts[i]) + at) for i, begin in enumerate(first) for at in range(begin, LENGTHS[i])]
    assert sorted(seen) == wanted


@pytest.mark.parametrize("prompts", [False, True])
def test_what_counts_is_what_the_model_wrote_or_all(prompts: bool) -> None:
    found = states()
    for window in Windows(found, [0, 1, 2], 3, 4, prompts=prompts).epoch(0):
        distributions = window.distributions(0)
        for counts, token, text, position in zip(
            distributions.counts.ravel(),
            distributions.token.ravel(),
            window.text[:, :-1].ravel(),
            window.positions[:, :-1].ravel(),
            strict=True,
        ):
            inside = int(text) >= 0 and int(position) + 1 < LENGTHS[int(text)]
            assert bool(counts) == (inside and (prompts or int(position) + 1 >= PROMPTS[int(text)]))
            assert not counts or int(token) == found.starts[int(text)] + int(position) + 1
