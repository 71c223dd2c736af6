from __future__ import annotations

from collections import Counter
from functools import cache
from itertools import pairwise
from random import Random

import pytest

from redraft.config import SamplingParams
from redraft.core.sequence import Request
from redraft.errors import InvalidInput
from redraft.sched.batchllm import Page, Prompt, Sharing, plan
from scripts.proofs import batchllm as proof
from tests.contracts import plain
from tests.contracts.identity import drive, engine

PAGE = 4
Pages = tuple[Page, ...]


def prompt(text: str, new: int = 1, more: int = 1) -> Prompt:
    """A page for each letter."""
    return Prompt([("", (ord(letter),)) for letter in text], PAGE * len(text) + more, new)


def found(*texts: str | Prompt) -> list[tuple[int, list[int]]]:
    return [tuple(one) for one in plan([prompt(text) if isinstance(text, str) else text for text in texts], PAGE)]  # type: ignore[misc]


def saved(groups: list[Sharing]) -> int:
    return sum((len(one.members) - 1) * one.pages for one in groups)


def best_cut(texts: list[Pages]) -> int:
    """The most pages saved by any cut through the tree: prefixes of which none begins another, with all prompts below each."""

    @cache
    def below(prefix: Pages) -> int:
        under = [text for text in texts if text[: len(prefix)] == prefix]
        longer = {text[: len(prefix) + 1] for text in under if len(text) > len(prefix)}
        return max((len(under) - 1) * len(prefix), sum(below(one) for one in longer))

    return below(())


def whole_tree(texts: list[Pages]) -> int:
    """The pages saved if each prefix of every length is computed once."""
    return sum(map(len, texts)) - len({text[:end] for text in texts for end in range(1, len(text) + 1)})


@pytest.mark.parametrize("seed", range(60))
def test_no_cut_saves_more_and_each_prompt_is_in_one_group(seed: int) -> None:
    dice = Random(seed)
    texts = ["".join(dice.choice("ab") for _ in range(dice.randint(0, 6))) for _ in range(dice.randint(1, 12))]
    groups = plan([prompt(text, dice.randint(1, 9)) for text in texts], PAGE)
    assert Counter(i for one in groups for i in one.members) == Counter(range(len(texts)))
    for one in groups:
        assert len({texts[i][: one.pages] for i in one.members}) == 1 and one.members == sorted(one.members)
        assert (one.pages > 0) == (len(one.members) > 1) and all(len(texts[i]) >= one.pages for i in one.members)
    pages = [tuple(prompt(text).pages) for text in texts]
    assert best_cut(pages) <= saved(groups) <= whole_tree(pages)


def test_a_child_leaves_a_short_prefix_for_a_longer_one() -> None:
    assert found("axxx", "ay", "axxx", "az") == [(1, [1, 3]), (4, [0, 2])]
    assert found("abc", "abd", "aec", "aed", "zz") == [(2, [0, 1]), (2, [2, 3]), (0, [4])]
    assert found("ab", "ab1", "ab2") == [(2, [0, 1, 2])]


def test_a_common_stem_wins_over_small_gains_below() -> None:
    assert found(*(f"aaaa{letter}" for letter in "bbcc")) == [(4, [0, 1, 2, 3])]  # 3 * 4 pages, and 2 * 5 in two groups


def test_groups_run_by_new_tokens_for_each_computed_token() -> None:
    few, many = prompt("abcd", new=2, more=0), prompt("xy", new=9, more=0)
    assert found(few, many, few) == [(0, [1]), (4, [0, 2])]
    assert found(few, prompt("xyzw", new=3, more=0), few) == [(4, [0, 2]), (0, [1])]  # 4 new tokens for 16, since the prefix counts once


def test_without_sharing_and_with_equal_ratios_the_order_is_that_of_arrival() -> None:
    assert found("q", "b", "z", "a") == [(0, [i]) for i in range(4)]


def test_a_deep_chain_of_prefixes_is_no_deep_recursion() -> None:
    groups = plan([prompt("a" * i) for i in range(1, 1500)], PAGE)
    assert saved(groups) > 0 and sum(len(one.members) for one in groups) == 1499


# ---- in an engine: documents with questions in any order, and memory for a few of them

DOCUMENT, QUESTION = 64, 10
NEW = SamplingParams(temperature=0.8, max_tokens=5, ignore_eos=True)


def questions(documents: int, each: int, seed: int = 0, salts: tuple[str, ...] = ("",)) -> list[Request]:
    dice = Random(seed)

    def some(count: int) -> list[int]:
        return [dice.randrange(plain.VOCAB) for _ in range(count)]

    prompts = [document + some(QUESTION) for document in (some(DOCUMENT) for _ in range(documents)) for _ in range(each)]
    dice.shuffle(prompts)
    return [Request(str(i), one, NEW.but(seed=i), salts[i % len(salts)]) for i, one in enumerate(prompts)]


def run(scheduler: str, requests: list[Request], **options: object) -> tuple[dict[str, list[int]], int, int]:
    """The texts, the prompt tokens that were computed, and the preemptions."""
    made = engine(scheduler=scheduler, **{"pool": 12, "chunk": 64, "max_seqs": 4, **options})  # type: ignore[arg-type]
    for one in requests:
        made.add(one)
    made.arrange()
    rows, forward = 0, made.runner.forward

    def counted(batch: object, *taps: object) -> object:
        nonlocal rows
        rows += len(batch.tokens)  # type: ignore[attr-defined]
        return forward(batch, *taps)  # type: ignore[arg-type]

    made.runner.forward = counted  # type: ignore[method-assign, assignment]
    seen = drive(made, [], [])
    new = sum(len(text) - 1 for text in seen.texts.values())  # the last token of a text is never a row
    assert len(made.holds) == 0
    return seen.texts, rows - new, seen.preempted


def least(requests: list[Request]) -> int:
    """The prompt tokens that must be computed: each document once."""
    return DOCUMENT * len({(one.salt, *one.prompt[:DOCUMENT]) for one in requests}) + QUESTION * len(requests)


def test_each_document_is_computed_once_and_the_texts_are_those_of_other_schedulers() -> None:
    plain_texts, computed, _ = run("sarathi", questions(6, 4))
    texts, ours, preempted = run("batchllm", questions(6, 4))
    assert texts == plain_texts and len(texts) == 24
    assert ours == least(questions(6, 4)) < computed and not preempted


def test_tenants_share_nothing() -> None:
    salts = ("a", "b")
    _, ours, _ = run("batchllm", questions(3, 6, salts=salts))
    assert ours == least(questions(3, 6, salts=salts))


def test_growth_is_reserved_so_that_nobody_is_preempted() -> None:
    requests = questions(6, 3)
    for one in requests:
        one.params = one.params.but(max_tokens=50)
    _, ours, preempted = run("batchllm", requests, pool=9)
    assert ours == least(requests) and not preempted


@pytest.mark.parametrize("pool", [4, 6, 9])
def test_too_low_an_expectation_costs_time_only(pool: int) -> None:
    def requests() -> list[Request]:
        found = questions(4, 3)
        for one in found:
            one.params = one.params.but(max_tokens=50)
        return found

    truth, _, _ = run("sarathi", requests(), pool=60)
    texts, _, preempted = run("batchllm:expected=1", requests(), pool=pool)
    assert texts == truth and (preempted or pool == 4)


def test_requests_that_share_nothing_keep_their_order() -> None:
    dice, admitted = Random(2), []
    made = engine(scheduler="batchllm", max_seqs=1)
    for i in range(6):
        made.add(Request(str(i), [dice.randrange(plain.VOCAB) for _ in range(40)], NEW))
    made.arrange()
    while made.has_work:
        made.step()
        admitted += [seq.request.id for seq in made.running]
    assert [one for one, after in pairwise([*admitted, ""]) if one != after] == list("012345")


def test_an_expectation_below_one_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"batchllm:expected=0: must be 1 or more"):
        engine(scheduler="batchllm:expected=0")


def test_the_short_form_of_the_proof() -> None:
    llm = proof.loaded("embedded", length=64, room=2, new=4)
    prompts = proof.batch(llm, documents=5, each=4, length=64)
    ours, other = (proof.counted(llm, prompts, scheduler, new=4) for scheduler in ("batchllm", "sarathi"))
    assert ours.texts == other.texts and ours.held == other.held == 0
    assert ours.prompt_rows == proof.least(prompts) < other.prompt_rows
