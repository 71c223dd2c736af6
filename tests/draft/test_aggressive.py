from __future__ import annotations

import random
from collections.abc import Sequence as Seq

import pytest

from redraft.core.plan import Budget
from redraft.core.sequence import Request, Sequence
from redraft.core.testing import sequence
from redraft.draft.aggressive import MAX_NGRAM, Aggressive, Pointer
from redraft.errors import InvalidInput
from tests.contracts.identity import SAMPLING, Condition, check, drive, engine, expected, prompts

WIDE = Budget(64, 64)
PLAIN = Aggressive(first=32)  # drafts have full length from the start
MIXED = (0, 3, 0, 5, 9, 11)


def begun(drafter: Aggressive, prompt: Seq[int], output: Seq[int] = (), prediction: Seq[int] | None = None) -> Sequence:
    seq = sequence([*prompt, *output], prompt_len=len(prompt), prediction=None if prediction is None else tuple(prediction))
    seq.state[drafter] = drafter.begin(seq)
    return seq


def drafted(drafter: Aggressive, seq: Sequence, budget: Budget = WIDE) -> list[int]:
    (tree,) = drafter.propose([seq], [budget])
    assert tree.parents.tolist() == list(range(-1, len(tree) - 1)), "a chain"
    return tree.tokens.tolist()


def places(source: Seq[int], gram: Seq[int]) -> list[int]:
    return [end for end in range(len(gram), len(source) + 1) if list(source[end - len(gram) : end]) == list(gram)]


def followed(source: Seq[int], output: Seq[int], at: int | None) -> int | None:
    """The definition: the place in the source after `output`, by a search at every token."""
    for i, token in enumerate(output):
        if at is not None and at < len(source) and source[at] == token:
            at += 1
            continue
        at = None
        for n in range(1, min(MAX_NGRAM, i + 1) + 1):
            found = places(source, output[i + 1 - n : i + 1])
            if len(found) < 2:
                at = found[0] if found else None
                break
    return at


def forwards(drafter: Aggressive, prompt: Seq[int], output: Seq[int], prediction: Seq[int] | None, rows: int = 64) -> int:
    """The number of steps of a model that generates `output`."""
    seq, steps = begun(drafter, prompt, prediction=prediction), 0
    while seq.generated < len(output):
        rest = output[seq.generated :]
        draft = drafted(drafter, seq, Budget(rows, len(rest) - 1))
        right = next((i for i, (a, b) in enumerate(zip(draft, rest, strict=False)) if a != b), len(draft))
        seq.tokens += rest[: right + 1]
        steps += 1
    return steps


# ---- what is copied


def test_a_prediction_is_copied_from_its_start_and_never_past_its_end() -> None:
    seq = begun(PLAIN, [9, 9], prediction=[1, 2, 3, 4, 5])
    assert drafted(PLAIN, seq) == [1, 2, 3, 4, 5]
    seq.tokens += [1, 2, 3]
    assert drafted(PLAIN, seq) == [4, 5]
    seq.tokens += [4, 5]
    assert drafted(PLAIN, seq) == []


def test_the_prompt_is_copied_from_where_the_output_meets_it() -> None:
    seq = begun(PLAIN, [1, 2, 3, 4, 5])
    assert drafted(PLAIN, seq) == []
    seq.tokens.append(3)
    assert drafted(PLAIN, seq) == [4, 5]


def test_an_empty_prediction_drafts_nothing() -> None:
    seq = begun(PLAIN, [1, 2, 3], prediction=[])
    for token in [1, 2, 3]:
        assert drafted(PLAIN, seq) == []
        seq.tokens.append(token)


SOURCE = [3, 5, 6, 40, 2, 5, 6, 41, 3, 5, 9, 42, 3, 9]


@pytest.mark.parametrize(
    ("output", "at"),
    [
        ([3, 41], 8),  # 41 occurs once: matched again at the differing token
        ([3, 8], None),  # 8 does not occur
        ([3, 8, 5], None),  # 5 occurs three times, 8 5 never
        ([8, 3, 9], 14),  # 9 twice, 3 9 once
        ([8, 3, 5], None),  # 3 5 twice, 8 3 5 never
        ([8, 3, 5, 6], 3),  # 5 6 twice, 3 5 6 once
        ([3, 5, 6, 40, 8, 5, 6], None),  # no match from 8 on, because 8 5 6 does not occur
        ([3, 5, 6, 40, 41, 3, 5, 9], 11),  # matched again at 41
    ],
)
def test_joins_again_at_a_unique_gram(output: list[int], at: int | None) -> None:
    assert followed(SOURCE, output, 0) == at
    assert drafted(PLAIN, begun(PLAIN, [0], output, prediction=SOURCE)) == ([] if at is None else SOURCE[at:])


def test_three_tokens_that_are_there_twice_decide_nothing() -> None:
    assert drafted(PLAIN, begun(PLAIN, [0], [9, 1, 2, 3], prediction=[1, 2, 3, 4, 1, 2, 3, 5])) == []


def test_only_the_outputs_own_tokens_join() -> None:
    source = [1, 2, 5, 6, 30, 3, 5, 6, 40]
    assert drafted(PLAIN, begun(PLAIN, [3], [5], prediction=source)) == [], "3 5 would be unique, but 3 is the prompt's"
    assert drafted(PLAIN, begun(PLAIN, [0], [3, 5], prediction=source)) == [6, 40]


@pytest.mark.parametrize("seed", range(6))
def test_the_pointer_is_the_definitions_however_the_tokens_came(seed: int) -> None:
    rng = random.Random(seed)
    source = [rng.randrange(9) for _ in range(40)]
    predicted = bool(seed % 2)
    seq = begun(Aggressive(), [8] if predicted else source, prediction=source if predicted else None)
    joined = lost = 0
    drafter = next(iter(seq.state))
    while seq.generated < 120:
        budget = Budget(0, 0) if rng.random() < 0.3 else WIDE
        draft = drafted(drafter, seq, budget)
        at = followed(source, seq.tokens[seq.prompt_len :], 0 if predicted else None)
        state: Pointer = seq.state[drafter]
        assert state.at == at
        rebuilt = drafter.begin(seq)  # after preemption
        rebuilt.follow(seq.tokens, seq.prompt_len)
        assert (rebuilt.at, rebuilt.agreed, rebuilt.seen) == (state.at, state.agreed, state.seen)
        if budget is WIDE:
            assert draft == ([] if at is None else source[at : at + len(draft)])
            joined += bool(draft)
            lost += at is None
        right = rng.randrange(len(draft) + 1) if draft else 0
        seq.tokens += [*draft[:right], *(rng.choice(source) for _ in range(rng.randrange(1, 3)))]
    assert joined > 10
    assert lost > 3


# ---- how much


@pytest.mark.parametrize(("budget", "length"), [(Budget(0, 9), 0), (Budget(9, 0), 0), (Budget(9, -1), 0), (Budget(2, 9), 2), (WIDE, 6)])
def test_keeps_to_block_and_budget(budget: Budget, length: int) -> None:
    drafter = Aggressive(block=6)
    assert len(drafted(drafter, begun(drafter, [0], prediction=range(1, 40)), budget)) == length


def test_drafts_grow_with_the_tokens_that_agree() -> None:
    drafter = Aggressive(block=12, first=2)
    seq = begun(drafter, range(100))
    lengths = []
    for _ in range(4):
        seq.tokens.append(50 if not seq.generated else seq.tokens[-1] + 1)
        draft = drafted(drafter, seq)
        lengths.append(len(draft))
        seq.tokens += draft
    assert lengths == [2, 5, 11, 12]
    seq.tokens.append(20)
    assert len(drafted(drafter, seq)) == 2, "short again after a difference"


@pytest.mark.parametrize("length", [1, 4, 5, 32, 33])
def test_an_output_equal_to_the_prediction_costs_its_length_over_the_block(length: int) -> None:
    drafter, text, end = Aggressive(block=4), list(range(1, length + 1)), 0
    assert forwards(drafter, [7], [*text, end], text) == -(-(length + 1) // 5) <= -(-length // 4), "a block and a bonus a step"


@pytest.mark.parametrize("edits", [0, 1, 3, 6])
def test_forwards_follow_the_edits_not_the_length(edits: int) -> None:
    for length in (70, 700):
        text = list(range(length))
        output = [token if (i + 1) % (length // 7) or i > edits * (length // 7) else 5000 + i for i, token in enumerate(text)]
        assert sum(a != b for a, b in zip(text, output, strict=True)) == edits
        drafter = Aggressive(block=length, first=length)
        # each replaced token costs two steps: one in which it is the bonus token, and one without a draft until the next match
        assert forwards(drafter, [9999], output, text, rows=length) == 1 + 2 * edits


# ---- a sequence's life


def test_forks_are_independent() -> None:
    seq = begun(PLAIN, [0], [1, 2], prediction=[1, 2, 3, 4, 5, 6])
    drafted(PLAIN, seq)
    child = sequence(seq.tokens, prompt_len=1)
    child.state[PLAIN] = PLAIN.fork(seq.state[PLAIN], child)
    seq.tokens += [3]
    child.tokens += [5]
    assert drafted(PLAIN, seq) == [4, 5, 6]
    assert drafted(PLAIN, child) == [6]
    assert drafted(PLAIN, seq) == [4, 5, 6]


@pytest.mark.parametrize("options", [{"block": 0}, {"first": 0}])
def test_options_are_checked(options: dict[str, int]) -> None:
    with pytest.raises(InvalidInput, match=r"^aggressive:\w+=0: must be 1 or more$"):
        Aggressive(**options)


# ---- the engine


@pytest.mark.parametrize("sampling", SAMPLING)
def test_the_text_is_the_definitions(sampling: str) -> None:
    check(Condition("aggressive", sampling, arrivals=MIXED))
    assert check(Condition("aggressive", sampling, chunk=24, arrivals=(0, 1, 0, 1, 0, 0), pool=5)).preempted


@pytest.mark.parametrize("pool", [40, 5])
@pytest.mark.parametrize("sampling", SAMPLING)
def test_predictions_change_the_steps_and_not_the_text(sampling: str, pool: int) -> None:
    """Predictions that are right, have a wrong token, begin late, are wrong, are empty or missing: one batch, with preemption."""
    truth = [list(expected(None, prompt, sampling, 100)) for prompt in prompts()]
    near = [*truth[1][:9], (truth[1][9] + 1) % 24, *truth[1][10:]]
    asked = [
        Request(str(i), list(prompt), SAMPLING[sampling].but(seed=100, prediction=None if given is None else tuple(given)))
        for i, (prompt, given) in enumerate(zip(prompts(), [truth[0], near, truth[2][13:], [3] * 40, [], None], strict=True))
    ]
    seen = drive(engine("aggressive:block=12", pool=pool), asked, (0, 1, 0, 1, 0, 0))
    assert [seen.texts[str(i)] for i in range(len(asked))] == truth
    assert seen.accepted > 26
    assert seen.rejected
    assert bool(seen.preempted) == (pool == 5)


@pytest.mark.parametrize("sampling", SAMPLING)
def test_a_right_prediction_takes_the_fewest_steps(sampling: str) -> None:
    prompt = prompts()[0]
    truth = expected(None, prompt, sampling, 100)
    alone = Request("0", list(prompt), SAMPLING[sampling].but(seed=100, prediction=truth))
    assert drive(engine("aggressive:block=12"), [alone], [0]).steps == 1 + -(-(len(truth) - 1) // 13), (
        "the step that reads the prompt has no budget for drafts"
    )
