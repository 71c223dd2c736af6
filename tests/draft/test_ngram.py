"""Counts of what followed the last tokens."""

from __future__ import annotations

from typing import Any

import pytest

from redraft.core.plan import Budget
from redraft.core.sequence import Sequence
from redraft.core.testing import sequence
from redraft.draft.ngram import ORDER, WIDTH, Counter, NGram, Table
from redraft.errors import InvalidInput

WIDE = Budget(9, 9)


def begun(counter: Counter, tokens: list[int], salt: str = "") -> Sequence:
    seq = sequence(tokens)
    seq.request.salt = salt
    seq.state[counter] = counter.begin(seq)
    return seq


def drafted(counter: Counter, seq: Sequence, budget: Budget = WIDE) -> list[tuple[int, int, float]]:
    (tree,) = counter.propose([seq], [budget])
    tree.check(vocab=1000, rows=budget.rows, depth=budget.depth)
    return list(zip(tree.parents.tolist(), tree.tokens.tolist(), [] if tree.scores is None else tree.scores.tolist(), strict=True))


def test_the_counts_are_those_of_the_definition() -> None:
    tokens = [1, 2, 3, 1, 2, 3, 1, 2, 4, 1, 2, 3, 3, 3, 3]
    table = Table(1000)
    table.learn(tokens, 0)
    for n in (ORDER - 1, ORDER):
        for i in range(n, len(tokens)):
            context = tuple(tokens[i - n : i])
            found = [tokens[j] for j in range(n, len(tokens)) if tuple(tokens[j - n : j]) == context]
            assert table.find(context) == {token: found.count(token) for token in found}
    parts = Table(1000)
    for end in (1, 4, 5, len(tokens)):
        parts.learn(tokens[:end], parts_seen) if (parts_seen := getattr(parts, "seen", 0)) < end else None
        parts.seen = end  # type: ignore[attr-defined]
    assert parts.young == table.young, "learned piece by piece"


def test_the_longer_context_goes_first_and_shares_multiply() -> None:
    counter = Counter(1000)
    seq = begun(counter, [1, 2, 3, 5, 9, 2, 3, 6, 8, 2, 3, 6, 1, 2, 3])
    assert drafted(counter, seq, Budget(2, 2)) == [(-1, 5, 1.0), (0, 9, 1.0)], "after 1 2 3 only 5 came"
    seq = begun(counter, [7, 2, 3])
    (first, *_) = drafted(counter, seq, Budget(2, 1))
    assert first == (-1, 6, pytest.approx(2 / 3)), "7 2 3 is new, after 2 3 came 6 twice and 5 once"


def test_buckets_are_in_range_and_at_most_width_tokens_are_offered() -> None:
    counter = Counter(1000)
    seq = begun(counter, [t for i in range(1, 40) for t in (1, 2, 3, 10 + i % 7)] + [1, 2, 3])
    offers = counter.offers(counter.start(seq))
    assert len(offers) == WIDTH and all(0 <= bucket < counter.buckets for _, bucket in offers)
    assert counter.offers(counter.follow(counter.start(seq), 999)) == []


def test_tenants_share_nothing_and_memory_is_bounded() -> None:
    counter = Counter(40)
    counter.end(begun(counter, [1, 2, 3, 4, 5], "a").state[counter])
    assert drafted(counter, begun(counter, [2, 3, 4], "a")) and not drafted(counter, begun(counter, [2, 3, 4], "b"))
    for tenant in range(100):
        seq = begun(counter, list(range(tenant, tenant + 50)), str(tenant))
        counter.end(seq.state[counter])
    assert counter.bytes <= NGram(history=40).max_bytes(None) + 100 * 350
    assert len(counter.tables) < 100


def test_what_it_learned_is_restored() -> None:
    counter = Counter(100)
    counter.end(begun(counter, [1, 2, 3, 4]).state[counter])
    state: Any = counter.snapshot()
    counter.end(begun(counter, [1, 2, 3, 5, 1, 2, 3, 5]).state[counter])
    counter.restore(state)
    assert [token for _, token, _ in drafted(counter, begun(counter, [1, 2, 3]), Budget(9, 1))] == [4]


@pytest.mark.parametrize("history", [0, -1, 1 << 21])
def test_history_out_of_range_is_refused(history: int) -> None:
    with pytest.raises(InvalidInput, match="ngram:history"):
        NGram(history=history)
