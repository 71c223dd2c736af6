"""Spans of published texts: where they are cut, which a new text finds, and whose they are."""

from __future__ import annotations

from itertools import pairwise
from random import Random

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from redraft.kv.prefix import PrefixTree
from redraft.kv.spans import AVERAGE, LEAST, MOST, SpanIndex, cuts

DICE = Random(3)
WORDS = [DICE.randrange(4000) for _ in range(1600)]
PAGE = 32


def publish(tree: PrefixTree, tokens: list[int], salt: str = "", page: int = 0) -> None:
    at = tree.root
    for start in range(0, len(tokens) - len(tokens) % PAGE, PAGE):
        at = tree.insert(at, salt, tokens[start : start + PAGE], page)
        page += 1


def published(*texts: list[int]) -> tuple[PrefixTree, SpanIndex]:
    tree = PrefixTree(PAGE)
    index = SpanIndex.of(tree)
    for i, text in enumerate(texts):
        publish(tree, text, page=1000 * i)
    return tree, index


def test_lengths_of_spans() -> None:
    text = [Random(1).randrange(50000) for _ in range(8)] + [DICE.randrange(50000) for _ in range(60000)]
    lengths = [b - a for a, b in pairwise([0, *cuts(text)])]
    assert min(lengths) >= LEAST and max(lengths) == MOST
    assert AVERAGE - 5 < sum(lengths) / len(lengths) < AVERAGE + 5
    assert cuts([7] * 600) in ([MOST, 2 * MOST], list(range(LEAST, 601, LEAST))) and cuts([]) == cuts(text[:LEAST]) == []


@settings(max_examples=60)
@given(st.integers(0, 1200), st.integers(0, 60), st.integers(0, 90))
def test_an_edit_moves_the_cuts_near_it_only(at: int, gone: int, new: int) -> None:
    edited = WORDS[:at] + [5000 + i for i in range(new)] + WORDS[at + gone :]
    before, after = cuts(WORDS), cuts(edited)
    assert [end for end in after if end <= at - MOST] == [end for end in before if end <= at - MOST]
    late = {end - new + gone for end in after if end > at + new} & set(before)
    assert late and set(before) - late <= set(range(min(late))), "from the first common cut on, all are the same"


def test_pages_one_by_one_have_the_cuts_of_the_text() -> None:
    tree, index = published(WORDS)
    assert {(first, len(key) // 4) for (_, key), (_, first) in index._spans.items()} == {
        (a, b - a) for a, b in pairwise([0, *cuts(WORDS[: len(WORDS) - len(WORDS) % PAGE])])
    }
    later = PrefixTree(PAGE)
    publish(later, WORDS)
    assert SpanIndex.of(later)._spans.keys() == index._spans.keys(), "the same, where the texts came before the index"
    assert SpanIndex.of(tree) is index


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 1500), st.integers(1, 400)), min_size=1, max_size=6), st.booleans())
def test_what_is_found_is_equal_and_in_order(parts: list[tuple[int, int]], prefix: bool) -> None:
    tree, index = published(WORDS, WORDS[700:1300])
    parts = [(0, 100), *parts] if prefix else parts
    text = [token for i, (first, count) in enumerate(parts) for token in [*WORDS[first : first + count], 6000 + i]]
    end = stored = PAGE * len(tree.walk(text, ""))
    for span in index.find(text, "", stored):
        assert span.at >= end and span.length > 0 and span.at + span.length < len(text)
        assert text[span.at : span.at + span.length] == span.source[span.first : span.first + span.length]
        end = span.at + span.length


def test_documents_in_another_order() -> None:
    """Of each document, all is found but the tokens around its first cut, whose span began elsewhere."""
    documents = [WORDS[i : i + 300] for i in range(0, 1200, 300)]
    _, index = published([1] * 40 + [token for one in documents for token in one] + [2] * 40)
    text = [3] * 17 + [token for i in (2, 0, 3, 1) for token in documents[i]] + [4] * 9
    found = index.find(text, "")
    assert sum(span.length for span in found) == 1200, "runs grow to both sides as far as tokens are equal"
    assert len({id(span.source) for span in found}) == 1, "one source for all, so that its pages are held once"
    assert [span.at - span.first for span in found] == [17 - 40 - 600, 17 - 40 + 300, 17 - 40 - 300, 17 - 40 + 600]


def test_a_history_that_was_trimmed_in_the_middle() -> None:
    _, index = published(WORDS)
    text = [*WORDS[:500], *WORDS[800:1400], 9, 9]
    found = index.find(text, "", 480)
    assert [(span.at, span.first, span.length) for span in found] == [(480, 480, 20), (500, 800, 600)]
    (more,) = index.find([*WORDS[:77], 9], "", 64)
    assert (more.at, more.first, more.length) == (64, 64, 13), "of a page that agrees in part"


def test_the_last_token_is_left_over() -> None:
    _, index = published(WORDS)
    (span,) = index.find(WORDS[:1200], "", 64)
    assert (span.at, span.length) == (64, 1135)
    for stored in (96, 128, 1504):
        assert index.find(WORDS[:97], "", stored) == [], "nothing is left to find, as the cache may go on after the text"


def test_each_tenant_has_its_own() -> None:
    tree, index = published()
    publish(tree, WORDS, "one")
    assert index.find(WORDS, "one") and not index.find(WORDS, "two") and not index.find(WORDS, "")


def test_what_left_the_cache_is_dropped() -> None:
    tree, index = published(WORDS[:640])
    for page in range(19, -1, -1):
        tree.rest(page)
    before = len(index)
    for _ in range(15):
        tree.evict()
    (span,) = index.find(WORDS[:640], "")
    assert span.length <= 5 * PAGE and len(index) < before
    while tree.idle:
        tree.evict()
    assert index.find(WORDS[:640], "") == [] and len(index) == 0


def test_the_index_is_bounded() -> None:
    tree = PrefixTree(PAGE)
    index = SpanIndex(tree, 10)
    publish(tree, WORDS)
    assert len(index) == 10
    assert not index.find(WORDS[:700], "") and index.find(WORDS[900:], ""), "those published last stay"


def test_a_page_number_is_used_again() -> None:
    """The page above an open span leaves, and another text gets its number: its cuts are those of its own text."""
    tree, index = published(WORDS[:64])
    tree.rest(1)
    tree.rest(0)
    tree.evict()
    tree.evict()
    publish(tree, WORDS[640:1280])
    assert [span.length for span in index.find([7, *WORDS[640:1280], 8], "")] == [pytest.approx(640, abs=MOST)]
