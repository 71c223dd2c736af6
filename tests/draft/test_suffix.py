import random
from heapq import nlargest

import pytest

from redraft import LLM, SamplingParams
from redraft.core.plan import Budget
from redraft.core.sequence import Request, Sequence
from redraft.core.testing import sequence
from redraft.draft.suffix import BASE, LATEST, LONGEST, OWN, PLACES, START, SURE, History, Matches, Place, Suffix, Voter
from redraft.errors import InvalidInput
from tests.contracts.identity import SAMPLING, Condition, check

WIDE = Budget(64, 64)


def begun(voter: Voter, tokens: list[int], *, ident: int = 1, salt: str = "", prompt: int | None = None) -> Sequence:
    request = Request(str(ident), tokens[:prompt], SamplingParams(), salt=salt)
    seq = Sequence(ident, request, 0, list(tokens), len(request.prompt), 0, 1 << 20)
    seq.state[voter] = voter.begin(seq)
    return seq


def ended(voter: Voter, tokens: list[int], **given: object) -> None:
    """An earlier output, after a prompt of one token."""
    voter.end(begun(voter, [999, *tokens], prompt=1, **given).state[voter])  # type: ignore[arg-type]


def drafted(voter: Voter, seq: Sequence, budget: Budget = WIDE) -> list[tuple[int, int, float]]:
    (tree,) = voter.propose([seq], [budget])
    tree.check(vocab=1000, rows=budget.rows, depth=budget.depth)
    scores = [] if tree.scores is None else tree.scores.tolist()
    return list(zip(tree.parents.tolist(), tree.tokens.tolist(), scores, strict=True))


def search(tokens: list[int]) -> dict[Place, int]:
    """The definition: every earlier place and the number of tokens before it that equal the last ones."""
    found = {}
    for end in range(1, len(tokens)):
        length = 0
        while length < min(end, LONGEST) and tokens[end - 1 - length] == tokens[-1 - length]:
            length += 1
        if length:
            found[OWN, end] = length
    return found


@pytest.mark.parametrize("letters", [1, 2, 3, 8])
def test_matches_that_are_followed_equal_those_of_a_search(letters: int) -> None:
    rng = random.Random(letters)
    seq = sequence([rng.randrange(letters) for _ in range(9)])
    matches, longest = Matches(seq, History(0)), 0
    while len(seq.tokens) < LATEST:  # all places are among the latest
        matches.catch_up()
        places = search(seq.tokens)
        assert matches.found == {place: length for place, length in places.items() if length > 1}
        assert matches.voters() == nlargest(PLACES, ((length, place) for place, length in places.items()))
        longest = max([longest, *matches.found.values()])
        again = Matches(seq, History(0))
        again.catch_up()
        assert (again.found, again.places) == (matches.found, matches.places), "as after a preemption"
        seq.tokens += [rng.randrange(letters) for _ in range(rng.randint(1, 4))]
    assert longest == LONGEST if letters == 1 else longest > 1


def test_a_frequent_token_costs_a_bounded_number_of_places() -> None:
    matches = Matches(sequence([7] * 5000), History(0))
    matches.catch_up()
    assert len(matches.found) <= LATEST + LONGEST and max(matches.found) == (OWN, 4999)


def test_votes_of_the_longest_matches_make_the_tree() -> None:
    voter = Voter(0)
    # "5" was followed by 1 after the equal tokens 4, 5 and by 2 after 5 alone
    found = drafted(voter, begun(voter, [4, 5, 1, 3, 5, 2, 4, 5]), Budget(3, 1))
    share = BASE / (BASE + 1)
    assert [(parent, token) for parent, token, _ in found] == [(-1, 1), (-1, 2)]
    assert [score for *_, score in found] == pytest.approx([SURE[2] * share, SURE[2] * (1 - share)])
    deep = drafted(voter, begun(voter, [4, 5, 1, 3, 5, 2, 4, 5]), Budget(2, 8))
    assert deep[1] == (0, 3, pytest.approx(SURE[2] * share * SURE[3])), "below the likeliest node its match is one token longer"


def test_a_node_never_scores_above_its_parent_and_budgets_are_kept() -> None:
    rng, voter, seen = random.Random(1), Voter(0), 0
    for _ in range(40):
        seq = begun(voter, [rng.randrange(3) for _ in range(rng.randint(1, 60))])
        budget = Budget(rng.randint(0, 9), rng.randint(-1, 5))
        found = drafted(voter, seq, budget) if min(budget) > 0 else []
        if min(budget) <= 0:
            assert not len(voter.propose([seq], [budget])[0])
        for parent, _, score in found:
            assert 0 < score <= (1.0 if parent < 0 else found[parent][2])
        seen += len(found)
    assert seen > 50


def test_earlier_outputs_serve_their_tenant_only() -> None:
    voter = Voter(100)
    ended(voter, [10, 11, 12, 13, 14], ident=1, salt="a")
    assert drafted(voter, begun(voter, [1, 10, 11, 12], ident=2, salt="a"), Budget(4, 4)) == [
        (-1, 13, pytest.approx(SURE[3])),
        (0, 14, pytest.approx(SURE[3] * SURE[-1])),
    ]
    assert not drafted(voter, begun(voter, [1, 10, 11, 12], ident=3, salt="b"))
    assert not drafted(voter, begun(voter, [1, 11, 12], ident=4, salt="a")), f"fewer than {START} equal tokens"


def test_the_first_new_token_is_found_after_the_end_of_the_prompt() -> None:
    voter = Voter(100)
    voter.end(begun(voter, [1, 2, 3, 50, 51], ident=1, prompt=3).state[voter])
    assert [token for _, token, _ in drafted(voter, begun(voter, [9, 2, 3, 50], ident=2))] == [51]
    assert not drafted(voter, begun(voter, [9, 1, 2, 3], ident=3)), "prompts are not kept"


def test_the_oldest_outputs_are_dropped_and_leave_nothing() -> None:
    history, rng = History(50), random.Random(0)
    kept: dict[int, list[int]] = {}
    for number in [*range(30), 28, 27, 5]:
        tokens = [rng.randrange(4) for _ in range(rng.randint(0, 30))]
        history.put(number, "t", tokens)
        kept.pop(number, None)
        if len(tokens) > START:
            kept[number] = tokens
        while sum(map(len, kept.values())) > 50:
            del kept[next(iter(kept))]
        again = History(50)
        for one, own in kept.items():
            again.put(one, "t", own)
        assert dict(history.texts) == {one: ("t", own) for one, own in kept.items()} and history.size == again.size <= 50
        assert {key: set(places) for key, places in history.index.items()} == {key: set(places) for key, places in again.index.items()}
    for number in list(kept):
        history.drop(number)
    assert not history.index and not history.size
    history.put(1, "t", list(range(80)))
    assert history.texts[1][1] == list(range(30, 80)), "of a longer output the end is kept"


def test_a_dropped_output_ends_its_matches() -> None:
    voter = Voter(6)
    ended(voter, [10, 11, 12, 13, 14], ident=1)
    seq = begun(voter, [10, 11, 12], ident=2)
    assert len(drafted(voter, seq)) == 2
    ended(voter, [20, 21, 22, 23, 24], ident=3)
    assert not drafted(voter, seq)
    seq.tokens.append(13)
    assert not drafted(voter, seq)


def test_snapshots_restore_what_was_learned() -> None:
    voter = Voter(100)
    ended(voter, [10, 11, 12, 13], ident=1)
    snapshot = voter.snapshot()
    ended(voter, [20, 21, 22, 23], ident=2)
    voter.restore(snapshot)
    assert list(voter.history.texts) == [1] and drafted(voter, begun(voter, [10, 11, 12], ident=3))
    assert not drafted(voter, begun(voter, [20, 21, 22], ident=4)) and voter.bytes <= Suffix(100).max_bytes(None)


@pytest.mark.parametrize("history", [-1, 1 << 21])
def test_options_have_limits(history: int) -> None:
    with pytest.raises(InvalidInput, match="history"):
        Suffix(history)


def test_it_was_wrong_somewhere_and_the_text_is_the_definitions() -> None:
    runs = [check(Condition("suffix", sampling, arrivals=(0, 3, 0, 5, 9, 11))) for sampling in SAMPLING]
    assert sum(seen.rejected for seen in runs)


def test_a_second_request_is_drafted_from_the_first() -> None:
    llm = LLM("embedded", draft="suffix", draft_rows=4)
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    first, second = (llm.generate("def read_config(path):", params)[0].outputs[0] for _ in range(2))
    assert second.token_ids == first.token_ids
    assert second.stats.steps <= 14 < first.stats.steps, "40 tokens, 4 nodes a step"
