"""The radix tree alone: lookup, salt, the order of eviction, and which pages an eviction frees."""

from __future__ import annotations

import pytest

from redraft.kv.prefix import Node, PrefixTree

A, B, C, D = (1, 1), (2, 2), (3, 3), (4, 4)


def grow(tree: PrefixTree, *edges: tuple[int, int], page: int, salt: str = "") -> list[Node]:
    """Publishes a path of pages with numbers from `page` on."""
    at, nodes = tree.root, []
    for i, tokens in enumerate(edges):
        at = tree.insert(at, salt, tokens, page + i)
        nodes.append(at)
    return nodes


def pages(tree: PrefixTree, tokens: tuple[int, ...], salt: str = "") -> list[int]:
    return [node.page for node in tree.walk(tokens, salt)]


def test_walk_finds_whole_pages_and_leaves_a_token() -> None:
    tree = PrefixTree(2)
    grow(tree, A, B, page=10)
    assert pages(tree, A + B + (9,)) == [10, 11]
    assert pages(tree, A + B) == [10]
    assert pages(tree, (*A, 2)) == [10]
    assert pages(tree, A) == [] and pages(tree, ()) == [] and pages(tree, (*B, 9)) == []
    tree.check()


def test_a_page_belongs_to_its_parent_and_salt() -> None:
    tree = PrefixTree(2)
    grow(tree, A, B, page=10)
    grow(tree, C, B, page=20)
    grow(tree, A, page=30, salt="tenant")
    assert pages(tree, C + B + (9,)) == [20, 21]
    assert pages(tree, A + B + (9,), "tenant") == [30]
    assert pages(tree, (*A, 9), "other") == []
    tree.check()


def test_insert_keeps_the_first_of_equal_pages() -> None:
    tree = PrefixTree(2)
    first = grow(tree, A, page=10)[0]
    assert tree.insert(tree.root, "", A, 99) is first
    assert 99 not in tree and 10 in tree


def test_the_longest_idle_page_goes_first_and_waking_saves_it() -> None:
    tree = PrefixTree(2)
    grow(tree, A, B, page=10)
    grow(tree, C, page=20)
    for page in (11, 10, 20):
        tree.rest(page)
    tree.check()
    tree.wake(11)
    tree.rest(11)  # used again: now the youngest; its parent too
    tree.wake(10)
    tree.rest(10)
    assert [tree.evict() for _ in range(3)] == [[20], [11], [10]]
    assert not tree.root.children and not tree.nodes
    with pytest.raises(KeyError):
        tree.evict()


def test_eviction_takes_what_hangs_below() -> None:
    tree = PrefixTree(2)
    top, middle, listed, other = grow(tree, A, B, C, page=10) + grow(tree, D, page=20)
    tree.rest(10)  # as when the pages below were published by a sequence with its own copy of page 10
    tree.rest(20)
    tree.rest(11)
    assert sorted(tree.evict()) == [10, 11]
    assert [node.alive for node in (top, middle, listed, other)] == [False, False, False, True]
    assert list(tree.nodes) == [20] and list(tree.idle) == [20]
    tree.check()


def test_check_sees_a_page_that_is_not_full() -> None:
    tree = PrefixTree(2)
    tree.insert(tree.root, "", (1,), 5)
    with pytest.raises(AssertionError, match="not full"):
        tree.check()
