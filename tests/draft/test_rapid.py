"""RAPID's drafter: which parts of a prompt are read, and that both models write the same text."""

from __future__ import annotations

from functools import cache

import pytest

from redraft import LLM, SamplingParams
from redraft.draft.rapid import RapidDraft, ranked
from redraft.errors import InvalidInput

PROMPTS = ["def add(a, b):\n    return a + b\n" * 12 + "class Stack:\n", "import os"]


@cache
def llm() -> LLM:
    return LLM("embedded", draft="none", dtype="float32", cache_memory=1 << 26, threads=1)


def test_the_best_chunks_in_the_order_of_the_text_then_the_query() -> None:
    method = RapidDraft(context=10, chunk=3, query=4)
    prompt = [1, 1, 1, 7, 8, 2, 3, 3, 3, 9, 7, 4, 5, 5, 5, 7, 8, 9, 0]
    assert method.shortened(prompt) == [7, 8, 2, 9, 7, 4, 7, 8, 9, 0]
    assert method.shortened(prompt[:10]) == prompt[:10], "short enough"
    assert RapidDraft(context=3, chunk=3, query=4).shortened(prompt) == [8, 9, 0]


def test_rare_words_count_more_and_later_chunks_break_ties() -> None:
    assert ranked([[1, 2], [1, 3], [1, 4]], [1, 3]) == [1, 2, 0]
    assert ranked([], [1]) == []


@pytest.mark.parametrize(
    "params", [SamplingParams(temperature=0, max_tokens=24), SamplingParams(temperature=0.8, seed=3, max_tokens=24, n=2)]
)
def test_the_text_is_that_of_plain_decoding_and_the_draft_reads_less(params: SamplingParams) -> None:
    method = "rapid:model=embedded-draft,context=48,chunk=16,query=16,length=3"
    made = llm().sibling(draft=method)
    begun: list[tuple[int, int]] = []
    own = made.engine.drafter.own.drafter
    begins = own._begins

    def seen(seq):
        tokens, read = begins(seq)
        begun.append((len(tokens), read))
        return tokens, read

    own._begins = seen
    found, plain = (one.generate(PROMPTS, params) for one in (made, llm()))
    texts = [[[text.token_ids for text in one.outputs] for one in outputs] for outputs in (found, plain)]
    assert texts[0] == texts[1]
    stats = [text.stats for one in found for text in one.outputs]
    assert not any(one.fault for one in stats) and sum(one.accepted for one in stats) > 0
    assert all(tokens <= 48 for tokens, _ in begun) and max(read for _, read in begun) > 100


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(InvalidInput, match="rapid:context=0"):
        RapidDraft(context=0)
