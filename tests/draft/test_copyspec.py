import random

import pytest

from redraft.core.plan import Budget
from redraft.core.sequence import Sequence
from redraft.core.testing import sequence
from redraft.draft.copyspec import CopySpec, Windows
from redraft.errors import InvalidInput
from tests.contracts.identity import SAMPLING, Condition, check

WIDE = Budget(64, 64)


def begun(drafter: CopySpec, tokens: list[int]) -> Sequence:
    seq = sequence(tokens)
    seq.state[drafter] = drafter.begin(seq)
    return seq


def drafted(drafter: CopySpec, seq: Sequence, budget: Budget = WIDE) -> list[int]:
    (tree,) = drafter.propose([seq], [budget])
    assert tree.parents.tolist() == list(range(-1, len(tree) - 1)), "a chain"
    return tree.tokens.tolist()


def search(tokens: list[int], drafter: CopySpec) -> list[int]:
    """The definition: a scan over all earlier windows."""
    key = tokens[-drafter.gamma :]
    ends = [e for e in range(drafter.gamma, len(tokens)) if tokens[e - drafter.gamma : e] == key]
    if not ends or len(tokens) < drafter.gamma:
        return []
    end = ends[-1] if drafter.latest else ends[0]
    return tokens[end : end + drafter.block]


def test_copies_what_followed() -> None:
    text = [1, 2, 3, 40, 41, 9, 1, 2, 3, 50, 51, 8, 1, 2, 3]
    recent, first = CopySpec(block=4, latest=True), CopySpec(block=4, latest=False)
    assert drafted(recent, begun(recent, text)) == [50, 51, 8, 1]
    assert drafted(first, begun(first, text)) == [40, 41, 9, 1]


def test_stops_at_the_end_of_the_context() -> None:
    drafter = CopySpec()
    assert drafted(drafter, begun(drafter, [7, 7, 7, 7])) == [7]
    assert drafted(drafter, begun(drafter, [1, 2, 3, 4, 1, 2, 3])) == [4, 1, 2, 3]


@pytest.mark.parametrize("tokens", [[], [1], [1, 2, 3], [1, 2, 3, 4], [3, 2, 1, 1, 2, 3]])
def test_no_match_proposes_nothing(tokens: list[int]) -> None:
    drafter = CopySpec()
    assert drafted(drafter, begun(drafter, tokens)) == []


@pytest.mark.parametrize(
    ("budget", "length"),
    [(Budget(0, 9), 0), (Budget(9, 0), 0), (Budget(9, -1), 0), (Budget(2, 9), 2), (Budget(9, 3), 3), (WIDE, 10)],
)
def test_keeps_to_the_budget(budget: Budget, length: int) -> None:
    drafter = CopySpec()
    assert len(drafted(drafter, begun(drafter, [*range(20), *range(3)]), budget)) == length


@pytest.mark.parametrize("latest", [True, False])
@pytest.mark.parametrize("gamma", [1, 2, 3])
def test_incremental_index_equals_a_rebuilt_one_and_the_search(gamma: int, latest: bool) -> None:
    drafter, rng = CopySpec(gamma=gamma, latest=latest), random.Random(gamma)
    seq = begun(drafter, [rng.randrange(3) for _ in range(5)])
    proposals = 0
    for _ in range(80):
        found = drafted(drafter, seq)
        assert found == search(seq.tokens, drafter)
        proposals += bool(found)
        rebuilt = Windows(gamma, latest)
        rebuilt.catch_up(seq.tokens)
        assert seq.state[drafter] == rebuilt
        seq.tokens += [rng.randrange(3) for _ in range(rng.randrange(1, 5))]
    assert proposals > 40


def test_steps_without_a_budget_leave_no_gap() -> None:
    drafter = CopySpec()
    seq = begun(drafter, [1, 2, 3, 4])
    for token in [5, 6, 7, 1, 2]:
        seq.tokens.append(token)
        assert drafted(drafter, seq, Budget(0, 0)) == []
    seq.tokens.append(3)
    assert drafted(drafter, seq) == [4, 5, 6, 7, 1, 2, 3]


def test_begin_after_preemption_meets_generated_tokens() -> None:
    drafter = CopySpec()
    seq = begun(drafter, [1, 2, 3, 4])
    seq.tokens += [5, 1, 2, 3]
    before = drafted(drafter, seq)
    drafter.end(seq.state.pop(drafter))
    seq.state[drafter] = drafter.begin(seq)
    assert drafted(drafter, seq) == before == [4, 5, 1, 2, 3]


def test_forks_are_independent() -> None:
    drafter = CopySpec(latest=True)
    seq = begun(drafter, [1, 2, 3, 4, 9])
    drafted(drafter, seq)
    child = sequence(seq.tokens)
    child.state[drafter] = drafter.fork(seq.state[drafter], child)
    seq.tokens += [1, 2, 3, 60, 1, 2, 3]
    child.tokens += [8, 1, 2, 3, 70, 71, 1, 2, 3]  # not at the same place as in seq
    assert drafted(drafter, seq) == [60, 1, 2, 3]
    assert drafted(drafter, child) == [70, 71, 1, 2, 3]
    assert drafted(drafter, seq) == [60, 1, 2, 3]


def test_a_batch_at_different_stages() -> None:
    drafter = CopySpec()
    texts = [[1, 2, 3, 4, 1, 2, 3], [5], [6, 6, 6, 6, 6]]
    seqs = [begun(drafter, text) for text in texts]
    trees = drafter.propose(seqs, [WIDE, WIDE, Budget(0, 5)])
    assert [t.tokens.tolist() for t in trees] == [[4, 1, 2, 3], [], []]


@pytest.mark.parametrize("options", [{"gamma": 0}, {"block": 0}])
def test_options_are_checked(options: dict[str, int]) -> None:
    with pytest.raises(InvalidInput, match=r"^copyspec:\w+=0: must be 1 or more$"):
        CopySpec(**options)


def test_it_was_wrong_somewhere_and_the_text_is_the_definitions() -> None:
    runs = [check(Condition("copyspec", sampling, arrivals=(0, 3, 0, 5, 9, 11))) for sampling in SAMPLING]
    assert sum(seen.rejected for seen in runs)
