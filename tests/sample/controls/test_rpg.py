"""RPG: copies are counted by structure, only the token that begins the next one gets less likely, and other text stays as it is."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from redraft.errors import InvalidInput
from redraft.sample.controls.rpg import RPG, Parsed, shape_of
from redraft.sample.sampler import Sampler
from tests.sample.toy import begun

PIECES = [
    b"assert",
    b" ",
    b"f(",
    b"1",
    b"22",
    b") == ",
    b"\n",
    b"x",
    b"    ",
    b"elif",
    b":",
    b"return",
    b"\n    ",
    b'"a"',
    b"=",
    b"if",
    b"# ",
    b"?",
    b'"""',
    b"\xff",
]
V = len(PIECES)
ASSERT = [0, 1, 2, 3, 5, 4, 6]  # assert f(1) == 22, newline
OTHER = [0, 1, 2, 13, 5, 7, 6]  # assert f("a") == x, newline


def lowered(tokens: list[int], drafted: list[int] | None = None, prompt: list[int] | None = None, **options: float) -> dict[int, float]:
    """Tokens and how much their logits lost."""
    sampler = Sampler(V, frozenset(), bytes_of=PIECES.__getitem__)
    before = prompt or [7]
    seq = begun(sampler, before + tokens, prompt_len=len(before), temperature=1, control=RPG(**options))
    values = sampler.row(np.zeros(V), seq, drafted or []).values
    return {token: -values[token] for token in np.flatnonzero(values).tolist()}


def test_three_copies_count_whatever_their_literals() -> None:
    once = -np.log(0.9)
    same, other = ASSERT * 3, [*ASSERT[:3], 4, 5, 3, 6, *ASSERT, *ASSERT[:3], 3, 5, 3, 6]
    for tokens in (same, other):
        assert lowered(tokens) == pytest.approx({0: once})
        assert lowered(tokens[:14], tokens[14:]) == pytest.approx({0: once}), "on the path of a node"
        assert lowered(tokens + ASSERT) == pytest.approx({0: 2 * once})
        assert lowered(tokens[:14]) == {} and lowered(tokens[:-1]) == {} and lowered([*tokens, 0]) == {}, "not before the end of a copy"
    assert lowered(OTHER + ASSERT + ASSERT) == {}, "another structure"
    assert lowered(ASSERT * 6, cap=2, decay=0.5) == pytest.approx({0: 2 * np.log(2)})
    assert lowered(ASSERT, prompt=ASSERT * 5) == {}, "only new text counts"


def test_blocks_of_several_lines() -> None:
    """elif x == 1: / return "a": the token that begins the block, behind the line's indentation, however it is spelled."""
    branch = [9, 1, 7, 5, 3, 10, 12, 11, 1, 13, 6]
    assert set(lowered(branch * 3)) == {9}
    assert lowered(branch * 2 + branch[:6]) == {}
    inside = [8, 9, 1, 7, 10, 6, 8, 8, 11, 1, 7, 6]
    assert set(lowered(inside * 3)) == {9} and set(lowered([*inside * 3, 8])) == {9}


def test_shapes() -> None:
    same = ["if x > 1:  # why", "if value>22:", "if\ty > 3 :"]
    assert len({shape_of(line, "") for line in same}) == 1
    different = ["if x > 1:", "    if x > 1:", "if x > f:", "if x >= 1:", "while x > 1:", "x = 1", "x = f(1)"]
    assert len({shape_of(line, "") for line in different}) == len(different)
    assert shape_of("", "") == shape_of("   ", "") == ((), "")
    assert shape_of("# a", "") == shape_of("# a", "") != shape_of("# b", "")
    assert shape_of('x = """a b c', "")[1] == '"""' and shape_of("It's a note.", '"""') == ((), '"""')
    assert shape_of('end"""', '"""') == ((), "") and shape_of("x = '''a b'''", "") == shape_of("y = 'a'", "")
    assert shape_of("match point:", "")[0] == ("0", "match", "name", ":")
    assert shape_of('x = "a" "b"', "")[0][-1] == "string"


@pytest.mark.parametrize("line", ["The cat sat.", "Is it?", "don't", "x = $y", "print 'a'", "x y", "1 2", "`x`", "\ufffd = 1", "wow!"])
def test_what_is_no_python(line: str) -> None:
    with pytest.raises(ValueError, match="no Python: "):
        shape_of(line, "")


def test_text_that_is_no_python_stays_as_it_is_to_its_end() -> None:
    assert lowered([7, 17, 6] + ASSERT * 5) == {}
    assert lowered([19, 6] + ASSERT * 5) == {}
    assert set(lowered([6, 16, 17, 6] + ASSERT * 5)) == {0}, "a comment may have anything"
    assert set(lowered([16, 17, 6] * 4)) == {16} and lowered([16, 17, 6, 16, 7, 6, 16, 13, 6]) == {}, "it is its own rule"
    assert lowered([18, 6] + ASSERT * 5) == {}, "nor does a string that is open"


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, V - 1), max_size=60), st.integers(0, 60))
def test_never_raises_and_follows_the_path(tokens: list[int], cut: int) -> None:
    assert lowered(tokens[:cut], tokens[cut:], start=2) == lowered(tokens, start=2)


def test_without_a_tokenizer() -> None:
    with pytest.raises(InvalidInput, match="rpg: needs a model with a tokenizer"):
        begun(Sampler(V, frozenset()), [1], control="rpg")
    assert Parsed().python
