"""Deltas joined are the text; characters are never split, whatever tokens their bytes come in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from redraft.config import SamplingParams
from redraft.core.sequence import Request
from redraft.engine.text import Reader, Text, find_stop, held_back
from redraft.models.tokenizer import Decoder
from tests.engine.spelling import PIECES, PROMPT, decode, finish, oracle, telling, truth

MARK = "\N{REPLACEMENT CHARACTER}"
PLAIN = Decoder(decode)


@pytest.mark.parametrize("drafted", [False, True])
def test_deltas_join_to_the_decoded_text(drafted: bool) -> None:
    for seed in range(4):
        params = SamplingParams(temperature=1.1, seed=seed, max_tokens=60)
        known = truth(params)
        events = finish(telling(oracle({("r", 0): known}) if drafted else "none"), Request("r", list(PROMPT), params))["r"]
        assert [t for e in events for t in e.tokens] == known
        assert "".join(e.text for e in events) == decode(known)
        assert sum(len(e.drafted) for e in events) == len(known)
        assert all(len(e.drafted) == len(e.tokens) and not e.drafted[-1] for e in events[:-1])


ids = st.lists(st.integers(0, len(PIECES) - 1), max_size=30)


@given(ids, ids, st.lists(st.integers(1, 4), min_size=30, max_size=30))
def test_any_grouping_gives_the_same_text(prompt: list[int], new: list[int], sizes: list[int]) -> None:
    # a prompt that ends within a character leaves bytes that belong to no text
    prompt = [*prompt, 0]
    text, at = Text.start(prompt, PLAIN), 0
    for size in sizes:
        at = min(len(new), at + size)
        before = text.done
        text = text.extend([*prompt, *new[:at]], PLAIN, last=at == len(new))
        assert text.done.startswith(before)
        if at < len(new):
            assert not text.done[len(before) :].endswith(MARK)
        if at == len(new):
            break
    assert text.done == decode(new)


def test_find_stop() -> None:
    assert find_stop("abcabc", ["bc"], 0) == (1, 3)
    assert find_stop("abcabc", ["bc"], 3) == (4, 6)
    assert find_stop("abcabc", ["bc"], 2) == (1, 3)  # it ends behind the first two characters
    assert find_stop("abcabc", ["c", "cab", "zz"], 0) == (2, 5)  # of two at one place the longer
    assert find_stop("abc", ["x"], 0) is None


def test_held_back() -> None:
    assert held_back("abc st", ["stop"]) == 2
    assert held_back("abc stop", ["stop"]) == 0
    assert held_back("aab", ["aabaac", "b!"]) == 3
    assert held_back("", ["x"]) == 0
