"""A pattern in plain syntax, against `re`."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from redraft.errors import InvalidInput
from redraft.sample.grammars.pattern import WITHOUT_LOOK_AROUND, whole
from tests.sample.grammars.schemas import PATTERNS

MORE = [
    "", "^", "$", "^$", "a|", "^a*$|b", "(^a|b)c", "a(b|c$)", "(?:^|,)a(?:,|$)", "(?:(^a)|b)", "[-a]", "[a-]", "[\\]\\-]", "[\\w-]b",
    "a{2}", "a{2,}b", "a{,2}", "a{0}b", "x{y}", "\\x61\\u0062", "[\\x61-\\u0063]+", "a+?b*?", "(?<n>a)b", "\\/\\.\\$", "[$^.|]", "}a]",
    "(a?)*b", "[\\d\\s]", "[^\\d\\s]", "[\\D]", "\\S\\W\\D", "[\\b]", "\\t|\\n",
]  # fmt: skip
TEXTS = st.text(st.sampled_from("aabbcx1 \n\r\té٣_-,.$^|]}{@/\x1c\u2028\ufeff😀"), max_size=6)


@settings(deadline=None)
@given(st.sampled_from(sorted(WITHOUT_LOOK_AROUND)), st.text(st.sampled_from("00123+-..a"), max_size=6))
def test_patterns_in_wide_use_are_the_same_without_look_around(pattern: str, text: str) -> None:
    assert (re.fullmatch(pattern, text) is not None) == (re.fullmatch(WITHOUT_LOOK_AROUND[pattern], text) is not None)
    whole(pattern)


def matches(text: str, pattern: str, wide: bool) -> bool:
    plain = re.sub(r"\\x\{(\w+)\}", lambda found: f"\\U{int(found[1], 16):08x}", whole(pattern, wide).text)
    return re.fullmatch(plain[1:-1], text) is not None


@settings(deadline=None)
@given(st.sampled_from([one for one in PATTERNS + MORE if one != "a{,2}"]), TEXTS)
@example("^a$", "a\n")
def test_narrow_matches_only_and_wide_matches_all_that_python_matches(pattern: str, text: str) -> None:
    theirs = re.search(pattern.replace("(?<", "(?P<"), text) is not None
    writable = not re.search("[\x00-\x07\x0b\x0e-\x1f\x7f]", text)
    assert theirs or not matches(text, pattern, wide=False)
    assert not theirs or not writable or matches(text, pattern, wide=True)


@settings(deadline=None)
@given(st.sampled_from(PATTERNS + MORE[:22]), st.text(st.sampled_from("aabbcx1_-,. "), max_size=6))
def test_there_is_one_dialect_of_ascii(pattern: str, text: str) -> None:
    if pattern != "a{,2}":
        assert matches(text, pattern, wide=False) == matches(text, pattern, wide=True) == (re.search(pattern, text) is not None)


@pytest.mark.parametrize(
    "pattern",
    [
        "(", ")", "a)", "[", "[a", "[]a]", "[^]", "*a", "a**", "a{2}{3}", "a{3,2}", "{2}", "a{,2}", "(?=a)", "(?!a)", "(?<=a)", "(?<!a)",
        "(?P<n>a)", "(?i:a)", "\\1", "\\b", "\\B", "\\cA", "\\p{L}", "\\k<n>", "\\u{61}", "\\u61", "\\ud800", "\\", "[z-a]", "[a-\\d]",
        "[^\\s\\S]", "\\x00", "^*", "(^a)*", "a^", "$a", "(a^)b", "(?:" * 40 + ")" * 40, "a" * 5000, "(a{99}){99}", "\\a", "\\Z",
    ],
)  # fmt: skip
def test_refused(pattern: str) -> None:
    with pytest.raises(InvalidInput):
        whole(pattern)
