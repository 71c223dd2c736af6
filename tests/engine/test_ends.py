"""Where a text ends: stop strings, stop tokens, end of text, lengths. Drafts change none of it."""

from __future__ import annotations

import pytest

from redraft.config import SamplingParams
from redraft.core.sequence import Request
from redraft.errors import InvalidInput
from tests.contracts.identity import engine
from tests.engine.spelling import PROMPT, decode, finish, one, oracle, telling, truth

SAMPLED = SamplingParams(temperature=0.9, seed=11, max_tokens=60)
TEXT = truth(SAMPLED)
DRAFTED = (False, True)


def made(drafted: bool, **options: object):
    return telling(oracle({("r", 0): TEXT}) if drafted else "none", **options)


def stopped(stop: tuple[str, ...], least: int = 1) -> tuple[int, str]:
    """By definition: (tokens, text) at the first stop string that a token completes, from the `least`-th token on."""
    for n in range(1, len(TEXT) + 1):
        before, now = decode(TEXT[: n - 1]).rstrip("\N{REPLACEMENT CHARACTER}"), decode(TEXT[:n]).rstrip("\N{REPLACEMENT CHARACTER}")
        found = sorted((now.find(s, max(0, len(before) - len(s) + 1)), -len(s), s) for s in stop)
        found = [f for f in found if f[0] >= 0]
        if n >= least and found:
            return n, now[: found[0][0]]
    raise AssertionError(f"{stop} never occurs in {decode(TEXT)!r}")


def substrings(size: int) -> list[str]:
    text = decode(TEXT[:50])
    return sorted({text[i : i + size] for i in range(5, len(text) - size)})


@pytest.mark.parametrize("drafted", DRAFTED)
@pytest.mark.parametrize("size", [1, 3, 6])
def test_stop_strings_end_the_text_before_them(drafted: bool, size: int) -> None:
    for stop in [s for s in substrings(size) if "\N{REPLACEMENT CHARACTER}" not in s][::3]:
        count, text = stopped((stop,))
        assert one(made(drafted), SAMPLED.but(stop=(stop,))) == (TEXT[:count], text, "stop"), stop
        kept = one(made(drafted), SAMPLED.but(stop=(stop,), include_stop_str_in_output=True))
        assert kept == (TEXT[:count], text + stop, "stop")


def test_the_last_event_names_the_stop_string() -> None:
    found, end = [s for s in substrings(4) if "\N{REPLACEMENT CHARACTER}" not in s][2], TEXT[6]
    for params, named in ((SAMPLED.but(stop=("never", found)), found), (SAMPLED.but(stop_token_ids=(end,)), None), (SAMPLED, None)):
        *events, last = finish(made(False), Request("r", list(PROMPT), params))["r"]
        assert last.stop == named and all(event.stop is None for event in events)


@pytest.mark.parametrize("drafted", DRAFTED)
def test_of_several_stop_strings_the_first_counts(drafted: bool) -> None:
    stops = tuple(s for s in substrings(4) if "\N{REPLACEMENT CHARACTER}" not in s)[2:8]
    count, text = stopped(stops)
    assert one(made(drafted), SAMPLED.but(stop=stops)) == (TEXT[:count], text, "stop")


@pytest.mark.parametrize("least", [7, 15, 24, 33])
@pytest.mark.parametrize("drafted", DRAFTED)
def test_min_tokens_holds_stop_strings_off(drafted: bool, least: int) -> None:
    for stop in ("a", "b", " ", "o"):
        count, text = stopped((stop,), least)
        assert one(made(drafted), SAMPLED.but(stop=(stop,), min_tokens=least)) == (TEXT[:count], text, "stop")


@pytest.mark.parametrize("drafted", DRAFTED)
def test_a_stream_never_shows_what_may_become_a_stop_string(drafted: bool) -> None:
    stop = "stop\N{GRINNING FACE}"  # three tokens or more; its beginning occurs earlier without the rest
    _, text = stopped((stop,))
    events = finish(made(drafted), Request("r", list(PROMPT), SAMPLED.but(stop=(stop,))))["r"]
    shown = ""
    for event in events:
        shown += event.text
        assert text.startswith(shown)
    assert shown == text


@pytest.mark.parametrize("drafted", DRAFTED)
def test_stop_tokens_and_end_of_text(drafted: bool) -> None:
    for token in dict.fromkeys(TEXT[3:40]):
        count = TEXT.index(token) + 1
        expected = (TEXT[:count], decode(TEXT[:count]), "stop")
        assert one(made(drafted), SAMPLED.but(stop_token_ids=(token,))) == expected
        assert one(made(drafted, eos=(token,)), SAMPLED) == expected
        ignored = one(made(drafted, eos=(token,)), SAMPLED.but(ignore_eos=True))
        assert ignored == (TEXT, decode(TEXT), "length")


@pytest.mark.parametrize("drafted", DRAFTED)
def test_min_tokens_bans_the_end_of_text(drafted: bool) -> None:
    token = TEXT[4]
    params = SAMPLED.but(min_tokens=20)
    tokens, _, reason = one(made(drafted, eos=(token,)), params)
    assert token not in tokens[:20] and len(tokens) >= 20
    assert (tokens, reason) == one(made(False, eos=(token,)), params)[::2]


@pytest.mark.parametrize("most", range(1, 24, 2))
def test_max_tokens_cuts_an_accepted_path(most: int) -> None:
    for drafted in DRAFTED:
        assert one(made(drafted), SAMPLED.but(max_tokens=most)) == (TEXT[:most], decode(TEXT[:most]), "length")


@pytest.mark.parametrize("room", [1, 2, 7, 20])
@pytest.mark.parametrize("drafted", DRAFTED)
def test_the_context_ends_the_text(drafted: bool, room: int) -> None:
    cramped = made(drafted, max_model_len=len(PROMPT) + room)
    assert one(cramped, SAMPLED.but(max_tokens=None)) == (TEXT[:room], decode(TEXT[:room]), "length")


def test_drafts_were_accepted_at_all() -> None:
    last = finish(made(True), Request("r", list(PROMPT), SAMPLED))["r"][-1]
    assert last.stats.accepted > 20 and last.stats.drafted > last.stats.accepted
    assert last.stats.steps + last.stats.accepted == len(TEXT)


def test_stop_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(InvalidInput, match="stop needs a tokenizer"):
        engine().add(Request("r", [1], SamplingParams(stop=("x",))))
