"""A text is JSON so far if something makes it JSON."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from redraft.sample.controls.json_text import may_be_json

VALUES = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(VALUES, st.booleans(), st.sampled_from([None, 1]))
def test_every_beginning_of_json(value: object, ascii_only: bool, indent: int | None) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    assert all(may_be_json(text[:end], False) for end in range(len(text) + 1))
    assert may_be_json(text, True) and may_be_json(f" {text}\n", True)


@settings(max_examples=400, deadline=None)
@given(st.text('[]{},:"\\0.5-eE+truefalsn \n\x01', max_size=9))
def test_what_ended_is_json_as_python_reads_it(text: str) -> None:
    try:
        json.loads(text)
        wanted = True
    except ValueError:
        wanted = False
    assert may_be_json(text, True) == wanted
    if wanted:
        assert may_be_json(text, False)


ENDS = [
    "",
    '"',
    '":0}',
    ":0}",
    "0}",
    "0]",
    "}",
    "]",
    "e",
    "ue",
    "rue",
    "lse",
    "alse",
    "ll",
    "ull",
    "se",
    "l",
    '0"',
    '\\"',
    '000"',
    '00"',
    '0000"',
    'n"',
    "0",
]
ENDS += ['"":0}', ' "":0}', '0":0}', 'n":0}', '0000":0}']


@settings(max_examples=400, deadline=None)
@given(st.text('[]{},:"\\u0.-e1tn ', max_size=7))
def test_what_may_go_on_can_be_ended(text: str) -> None:
    """By at most a few pieces: so no beginning is accepted in vain."""
    if may_be_json(text, False):
        open_ends = {text}
        for _ in range(8):
            if any(may_be_json(one, True) for one in open_ends):
                return
            open_ends = {one + end for one in open_ends for end in ENDS if may_be_json(one + end, False) or may_be_json(one + end, True)}
            open_ends = set(
                sorted(open_ends, key=lambda one: (one.count("[") + one.count("{") - one.count("]") - one.count("}"), len(one)))[:60]
            )
        pytest.fail(f"{text!r} cannot be ended")
