"""Responses in memory: who sees them, and which are dropped."""

from __future__ import annotations

import json
from typing import Any

import pytest

from redraft.serve.errors import Refused
from redraft.serve.stored import Stored, Turn


def turn(name: str, previous: str | None = None, text: str = "") -> Turn:
    return Turn({"id": name, "output": [f"{name} said {text}"]}, [f"to {name}"], previous)  # type: ignore[list-item]


def names(stored: Stored) -> list[str]:
    return [name for _, name in stored._turns]


def refused(stored: Stored, key: str, name: str) -> dict[str, Any]:
    with pytest.raises(Refused) as error:
        stored.get(key, name)
    assert error.value.status == 404
    return error.value.body


def test_what_was_added_is_found() -> None:
    stored = Stored(4, 1000)
    stored.add("k", turn("a"))
    assert stored.get("k", "a") == turn("a")
    assert stored.used == len(json.dumps(turn("a")))


def test_other_keys_see_nothing_and_cannot_tell() -> None:
    stored = Stored(4, 1000)
    stored.add("one", turn("a"))
    foreign = refused(stored, "two", "a")
    stored.drop("one", "a")
    assert refused(stored, "two", "a") == foreign == refused(stored, "one", "a")


def test_the_same_id_of_two_keys_is_two_responses() -> None:
    stored = Stored(4, 1000)
    stored.add("one", turn("a", text="1"))
    stored.add("two", turn("a", text="2"))
    assert stored.get("one", "a") != stored.get("two", "a")


def test_conversations_are_in_order() -> None:
    stored = Stored(4, 1000)
    for name, previous in (("a", None), ("b", "a"), ("c", "b")):
        stored.add("k", turn(name, previous))
    assert stored.conversation("k", None) == []
    assert stored.conversation("k", "b") == ["to a", "a said ", "to b", "b said "]
    stored.drop("k", "a")
    with pytest.raises(Refused) as error:
        stored.conversation("k", "c")
    assert (error.value.status, error.value.param, error.value.code) == (404, "previous_response_id", "previous_response_not_found")
    assert stored.get("k", "c")


def test_the_longest_unused_are_dropped_beyond_the_count() -> None:
    stored = Stored(3, 1000)
    for name in "abc":
        stored.add("k", turn(name))
    stored.get("k", "a")
    stored.add("k", turn("d"))
    assert names(stored) == ["c", "a", "d"]


def test_a_continued_conversation_is_used_as_a_whole() -> None:
    stored = Stored(3, 1000)
    stored.add("k", turn("a"))
    stored.add("k", turn("b", "a"))
    stored.add("k", turn("other"))
    stored.conversation("k", "b")
    stored.add("k", turn("c", "b"))
    assert "other" not in names(stored) and stored.conversation("k", "c")


def test_the_longest_unused_are_dropped_beyond_the_bytes() -> None:
    size = len(json.dumps(turn("a")))
    stored = Stored(100, 2 * size)
    for name in "abc":
        stored.add("k", turn(name))
    assert names(stored) == ["b", "c"] and stored.used == 2 * size
    stored.add("k", turn("d", text="x" * 2 * size))  # alone too large
    assert names(stored) == [] and stored.used == 0


def test_none_are_kept_where_none_may_be() -> None:
    stored = Stored(0, 1000)
    stored.add("k", turn("a"))
    assert (len(stored), stored.used) == (0, 0)
