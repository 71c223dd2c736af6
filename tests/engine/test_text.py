"""The joined deltas are the text. Characters are never split, however their bytes are spread over tokens."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from redraft.config import SamplingParams
from redraft.core.sequence import Request
from redraft.engine.text import PartialText, Reader, find_stop, held_back
from redraft.models.tokenizer import Decoder, Tokenizer
from tests.engine.spelling import PIECES, PROMPT, decode, finish, oracle, telling, truth
from tests.models.kinds import KINDS, TEXTS

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
    # if a prompt ends within a character, its bytes belong to no text
    prompt = [*prompt, 0]
    text, at = PartialText.start(prompt, PLAIN), 0
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
    assert find_stop("abcabc", ["bc"], 2) == (1, 3)  # it ends after the first two characters
    assert find_stop("abcabc", ["c", "cab", "zz"], 0) == (2, 5)  # the longer of two at one place
    assert find_stop("abc", ["x"], 0) is None


def test_held_back() -> None:
    assert held_back("abc st", ["stop"]) == 2
    assert held_back("abc stop", ["stop"]) == 0
    assert held_back("aab", ["aabaac", "b!"]) == 3
    assert held_back("", ["x"]) == 0


# ---- every kind of tokenizer, at every split

STREAMS = 6
LENGTH = 22


def streams(tokenizer: Tokenizer) -> list[list[int]]:
    """Random ids, some of which the tokenizer lacks, and special tokens. Half of the streams are mostly text."""
    rng, found = np.random.default_rng(3), []
    size = len(tokenizer)
    known = [tokenizer.encode(text, special=False) for text in ("🎉🎉", "\n\n", *TEXTS)]
    for i in range(STREAMS):
        ids = rng.integers(0, size + 2, LENGTH).tolist()
        for _ in range(4 if i % 2 else 0):
            own, at = known[rng.integers(len(known))], int(rng.integers(LENGTH))
            ids[at : at + len(own)] = own
        found.append(ids[:LENGTH])
    eos = tokenizer.vocabulary.id("eos_token")
    divided = [one for token in [*known[0], *known[1], known[0][0], 5] for one in (token, eos)]  # a special token after every token
    return [*found, (known[0] * 3)[:LENGTH], (known[1] * 3)[:LENGTH], divided[:LENGTH]]


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    return KINDS[request.param](tmp_path)


@pytest.mark.parametrize("skip", [True, False])
def test_streamed_text_is_the_decoded_text(tokenizer: Tokenizer, skip: bool) -> None:
    """For every prompt and every length of the output, compared with the tokenizer's own `decode` of the whole."""
    decode = tokenizer.decoder if skip else tokenizer.decoder_all
    for ids in streams(tokenizer):
        whole = [tokenizer.vocabulary.decode(ids[:end], skip) for end in range(len(ids) + 1)]
        for first in range(len(ids)):
            reader, reported = PartialText.start(ids[:first], decode), ""
            for end in range(first + 1, len(ids) + 1):
                expected = continued(whole[first], whole[end])
                assert reader.extend(ids[:end], decode, last=True).done == expected, (ids, first, end)
                reader = reader.extend(ids[:end], decode)
                assert reader.done.startswith(reported)
                reported = reader.done


def continued(before: str, whole: str) -> str:
    """The text after its beginning. A character that was incomplete at the end of the beginning belongs to it."""
    while before.endswith(MARK) and not whole.startswith(before):
        before = before[:-1]
    return whole[len(before) :]


def test_the_context_decides_what_a_space_is(tmp_path: Path) -> None:
    """A decoder that strips the space before a text must not strip it after special tokens that follow other text."""
    tokenizer = KINDS["SentencePiece BPE with byte fallback"](tmp_path)
    decode = tokenizer.decoder
    said, cat = tokenizer.encode("the cat", special=False), tokenizer.encode("cat", special=False)
    special = [tokenizer.vocabulary.id("eos_token")] * 80
    for prompt in (said + special, said + special[:1]):
        assert PartialText.start(prompt, decode).extend(prompt + cat, decode, last=True).done == " cat"
    reader = PartialText.start(said, decode)
    for end in range(len(said) + 1, len(said + special + cat) + 1):
        reader = reader.extend((said + special + cat)[:end], decode, last=end == len(said + special + cat))
    assert reader.done == " cat"


# ---- stop strings


def stopped(tokenizer: Tokenizer, ids: Seq[int], prompt: int, sizes: Seq[int], **params: object) -> tuple[str, int | None]:
    """The text, and the number of tokens at which a stop string ended it; sizes: tokens of each step."""
    reader = Reader(ids[:prompt], SamplingParams(**params), tokenizer.decoder, tokenizer.decoder_all)  # type: ignore[arg-type]
    at, text = prompt, ""
    for size in sizes:
        new = ids[at : at + size]
        for i, stop in enumerate(reader.search(ids[:at], new)):
            if stop:
                end = at + i + 1
                text += reader.take(ids[:end], ended=True, stop=stop, include=bool(params.get("include_stop_str_in_output")))
                return text, end - prompt
        at += len(new)
        text += reader.take(ids[:at], ended=at == len(ids))
        if at == len(ids):
            break
    return text, None


@pytest.mark.parametrize("size", [1, 2, 3, 40])
def test_a_stop_string_in_byte_tokens(tmp_path: Path, size: int) -> None:
    """A stop string is found with its last byte, although the run of byte tokens goes on."""
    tokenizer = KINDS["SentencePiece BPE with byte fallback"](tmp_path)
    ids = tokenizer.encode("the cat🎉\n🎉 sat", special=False)
    first = len(tokenizer.encode("the cat", special=False))
    assert stopped(tokenizer, ids, 1, [size] * 99, stop=["🎉"]) == (" cat", first + 3)
    assert stopped(tokenizer, ids, 1, [size] * 99, stop=["\n"]) == (" cat🎉", first + 4)
    assert stopped(tokenizer, ids, first, [size] * 99, stop=["\n🎉"]) == ("🎉", 9)
    assert stopped(tokenizer, ids, 1, [size] * 99, stop=["🎉🎉"]) == (" cat🎉\n🎉 sat", None)


@pytest.mark.parametrize("size", [1, 2, 3, 40])
@pytest.mark.parametrize("kind", ["byte-level BPE", "SentencePiece BPE with byte fallback"])
def test_a_stop_string_with_a_special_token(tmp_path: Path, kind: str, size: int) -> None:
    tokenizer = KINDS[kind](tmp_path)
    parts = [tokenizer.encode(text, special=False) for text in ("the", " cat", "</s>", " sat", "<s>", " on")]
    ids = [token for part in parts for token in part]
    ids = [ids[0], *ids[1:]]
    shown = tokenizer.decode(ids)[len(tokenizer.decode(ids[:1])) :]
    sat, on = shown.index("sat"), shown.index("on")

    def found(stop: str, **more: object) -> str | None:
        text, count = stopped(tokenizer, ids, 1, [size] * 99, stop=[stop], **more)
        return text if count else None

    full = tokenizer.decode_all(ids)
    assert found("</s>") == shown[:sat].rstrip() and found("</s>", include_stop_str_in_output=True) == shown[:sat].rstrip() + "</s>"
    assert found("<s>") == shown[:on].rstrip()
    assert found(full[full.index("<s>") :][:6]) == shown[:on].rstrip(), "the special token before it has no characters in the text"
    around = full[full.index("</s>") - 2 : full.index("</s>") + 6]
    assert found(around) == shown[: shown.index("at")], "text before and after the token belongs to the stop string"
    assert found(around, skip_special_tokens=False) == shown[: shown.index("at")]
    assert found("</s></s>") is None and found("/s") is None, "a part of a special token is not text"
    assert found("</s>", skip_special_tokens=False) == shown[:sat].rstrip()


def test_a_special_token_spelled_in_letters_is_a_stop_string_too(tmp_path: Path) -> None:
    tokenizer = KINDS["byte-level BPE"](tmp_path)
    ids = [one for text in ("the", " cat", "<", "/", "s", ">", " sat") for one in tokenizer.encode(text, special=False)]
    assert tokenizer.vocabulary.id("eos_token") not in ids
    assert stopped(tokenizer, ids, len(tokenizer.encode("the", special=False)), [1] * 99, stop=["</s>"])[0] == " cat"


def test_a_stop_string_that_ended_before_is_not_found_later(tmp_path: Path) -> None:
    """Such as one before min_tokens, while the run of byte tokens goes on."""
    tokenizer = KINDS["SentencePiece BPE with byte fallback"](tmp_path)
    ids = tokenizer.encode("the🎉🎉🎉", special=False)
    reader = Reader(ids[:1], SamplingParams(stop=["🎉"]), tokenizer.decoder, tokenizer.decoder_all)
    found = [stop and stop.keep for end in range(1, len(ids)) for stop in reader.search(ids[:end], ids[end : end + 1])]
    assert found[-12:] == [None, None, None, 0, None, None, None, 1, None, None, None, 2]


def test_what_may_become_a_stop_string_waits(tmp_path: Path) -> None:
    tokenizer = KINDS["byte-level BPE"](tmp_path)
    ids = tokenizer.encode("the cat</s> sat", special=False)
    params = SamplingParams(stop=["cat</s>!"])
    reader, reported = Reader(ids[:1], params, tokenizer.decoder, tokenizer.decoder_all), ""
    cat = len(tokenizer.encode("the cat</s>", special=False))
    reported = reader.take(ids[:cat], ended=False)
    assert reported.endswith(" "), "cat</s> could become the stop string"
    assert reported + reader.take(ids, ended=True) == tokenizer.decode(ids)[len(tokenizer.decode(ids[:1])) :]
