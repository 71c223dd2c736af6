"""The most frequent tokens of a text."""

from __future__ import annotations

from redraft.models.frequent import frequent


def test_the_most_frequent_stay_and_of_equal_ones_the_lowest_ids() -> None:
    tokens = [5, 5, 5, 2, 2, 7, 1]
    assert frequent(tokens, 1, 9).tolist() == [5]
    assert frequent(tokens, 3, 9).tolist() == [5, 2, 1]
    assert frequent(tokens, 6, 9).tolist() == [5, 2, 1, 7, 0, 3]
    assert sorted(frequent(tokens, 99, 9).tolist()) == list(range(9))
    assert frequent([], 2, 9).tolist() == [0, 1]
