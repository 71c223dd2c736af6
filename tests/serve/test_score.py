"""Scores and rankings equal those computed from the log-probabilities that /v1/completions echoes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from redraft.llm import LLM
from redraft.serve import score_schema
from redraft.serve.prompts import INPUTS
from redraft.serve.score import DOCUMENT
from tests.serve.live import Live
from tests.serve.test_openai import call, complete

DOCUMENTS = ["A list is a sequence of values that can change.", "The sea is deep and blue.", "A tuple cannot change, a list can."]
QUERY = "What is a list?"


@pytest.fixture
def fresh(live: Live) -> Live:
    """Nothing is in the prefix cache."""
    call(live, "/reset_prefix_cache", {})
    return live


def tokens_of(llm: LLM, before: str, text: str) -> tuple[list[int], int]:
    """(tokens of both texts, the number of those that the first text alone has at the beginning)."""
    whole, alone = llm.tokenizer.encode(before + text), llm.tokenizer.encode(before)
    common = next((i for i, (a, b) in enumerate(zip(whole, alone, strict=False)) if a != b), len(alone))
    return whole, max(common, 1)


def echoed(client: openai.OpenAI, llm: LLM, before: str, text: str) -> float:
    """The mean log-probability of `text` after `before`, from an echo of both."""
    whole, begin = tokens_of(llm, before, text)
    (choice,) = complete(client, whole, echo=True, logprobs=0, max_tokens=0).choices
    found = choice.logprobs.token_logprobs[begin:]
    assert found and None not in found
    return math.fsum(found) / len(found)


def refused(live: Live, path: str, body: Any) -> openai.BadRequestError:
    with pytest.raises(openai.BadRequestError) as error:
        call(live, path, body)
    return error.value


# ---- scores


@pytest.mark.parametrize(
    ("before", "texts"),
    [
        ("A list is", [" a sequence of values.", "a sequence", "\n\n", "zzz éé"]),
        ("def add(a, b):\n    retu", ["rn a + b", "rned"]),  # the first token after the border belongs to both texts
        ("", ["A list is a sequence.", "a"]),
        (["A list is", "The sea is"], [" blue", " blue"]),
    ],
)
def test_a_score_is_the_mean_log_probability(live: Live, client: openai.OpenAI, llm: LLM, before: Any, texts: list[str]) -> None:
    reply = call(live, "/v1/score", {"text_1": before, "text_2": texts})
    several = before if isinstance(before, list) else [before] * len(texts)
    known = [echoed(client, llm, one, text) for one, text in zip(several, texts, strict=True)]
    assert [one["score"] for one in reply["data"]] == pytest.approx(known, abs=1e-4)
    assert [(one["index"], one["object"]) for one in reply["data"]] == [(i, "score") for i in range(len(texts))]
    count = sum(len(tokens_of(llm, one, text)[0]) for one, text in zip(several, texts, strict=True))
    assert reply["usage"]["prompt_tokens"] == reply["usage"]["total_tokens"] == count
    assert (reply["object"], reply["model"], reply["id"][:6]) == ("list", "embedded", "score-")
    score_schema.Scores.model_validate(reply, strict=True)


def test_both_names_and_both_paths(live: Live) -> None:
    known = call(live, "/v1/score", {"text_1": "A list is", "text_2": " long"})["data"]
    assert call(live, "/score", {"queries": ["A list is"], "documents": " long", "model": "embedded", "user": "u"})["data"] == known


def test_a_token_of_both_texts_counts_with_the_second(llm: LLM) -> None:
    before, text = "def add(a, b):\n    retu", "rn a + b"
    whole, begin = tokens_of(llm, before, text)
    assert begin < len(llm.tokenizer.encode(before)) and llm.tokenizer.decode(whole[begin:]).startswith(" return")


def test_the_text_before_comes_from_the_prefix_cache(fresh: Live, client: openai.OpenAI, llm: LLM) -> None:
    before = "one two three four five six seven. " * 10
    texts = [" A list", " The sea"]

    def cached(path: str, body: Any) -> int:
        return int(call(fresh, path, body)["usage"]["prompt_tokens_details"]["cached_tokens"])

    bodies = [{"text_1": before, "text_2": text} for text in texts]
    counts = [cached("/v1/score", body) for body in bodies]
    begin = tokens_of(llm, before, texts[1])[1]
    assert counts[0] == 0 and 64 <= counts[1] < begin
    again = call(fresh, "/v1/score", bodies[1])["data"][0]["score"]
    assert again == pytest.approx(echoed(client, llm, before, texts[1]), abs=1e-4)
    assert cached("/v1/score", {**bodies[1], "cache_salt": "other"}) == 0


def test_a_text_in_several_steps(client: openai.OpenAI, llm: LLM) -> None:
    before, text = "one two three four five six seven. " * 10, " A list is a sequence of values, and a tuple is one too."
    with Live(llm.sibling(token_budget=16, draft_rows=0)) as narrow:
        for _ in range(2):  # the second time the text before is in the cache
            (found,) = call(narrow, "/score", {"text_1": before, "text_2": text})["data"]
            assert found["score"] == pytest.approx(echoed(client, llm, before, text), abs=1e-4)
        narrow.settle()


def test_more_texts_than_may_wait(llm: LLM) -> None:
    with Live(llm.sibling(max_seqs=1), max_queue=2) as narrow:
        many = [f" {i}" for i in range(9)]
        whole = call(narrow, "/score", {"text_1": "A list of", "text_2": many})
        single = [call(narrow, "/score", {"text_1": "A list of", "text_2": text})["data"][0]["score"] for text in many]
        assert [one["score"] for one in whole["data"]] == pytest.approx(single, abs=1e-4)
        narrow.settle()


# ---- rankings


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_documents_are_ranked_by_the_likelihood_of_the_query(live: Live, client: openai.OpenAI, llm: LLM, path: str) -> None:
    reply = call(live, path, {"query": QUERY, "documents": [*DOCUMENTS[:2], {"text": DOCUMENTS[2]}]})
    score_schema.Ranking.model_validate(reply, strict=True)
    known = [math.exp(echoed(client, llm, DOCUMENT.format(text), f" {QUERY}")) for text in DOCUMENTS]
    assert {one["index"]: one["relevance_score"] for one in reply["results"]} == pytest.approx(dict(enumerate(known)), abs=1e-5)
    assert [one["index"] for one in reply["results"]] == sorted(range(3), key=lambda i: -known[i])
    assert all(one["document"] == {"text": DOCUMENTS[one["index"]]} for one in reply["results"])
    assert (reply["model"], reply["id"][:7]) == ("embedded", "rerank-")


def test_the_best_of_them_and_no_texts(live: Live) -> None:
    body = {"query": QUERY, "documents": DOCUMENTS}
    whole = call(live, "/rerank", body)["results"]
    best = call(live, "/rerank", {**body, "top_n": 2, "return_documents": False})["results"]
    assert best == [{name: one[name] for name in ("index", "relevance_score")} for one in whole[:2]]
    assert len(call(live, "/rerank", {**body, "top_n": 99})["results"]) == 3


def test_of_equal_documents_the_first_stays_first(live: Live) -> None:
    results = call(live, "/rerank", {"query": QUERY, "documents": [DOCUMENTS[0]] * 3})["results"]
    assert [one["index"] for one in results] == [0, 1, 2]


def test_documents_that_were_ranked_before_come_from_the_cache(fresh: Live) -> None:
    documents = ["one two three four five six seven. " * 8, "a b c d e f g h i j k l m n o p q r s t u v w x y z " * 3]
    first = call(fresh, "/rerank", {"query": QUERY, "documents": documents})["usage"]["prompt_tokens_details"]["cached_tokens"]
    other = call(fresh, "/rerank", {"query": "Why is the sea blue?", "documents": documents})["usage"]["prompt_tokens_details"][
        "cached_tokens"
    ]
    assert first < 64 <= other


# ---- errors


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        ("/score", {"text_1": "a"}, "text_1", "either text_1 and text_2 are needed, or queries and documents"),
        ("/score", {"text_1": "a", "text_2": "b", "queries": "a"}, "text_1", "either"),
        ("/score", {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "text_1", "2 texts and text_2 3"),
        ("/score", {"queries": ["a", "b"], "documents": "a"}, "queries", "2 texts and documents 1"),
        ("/score", {"text_1": "a", "text_2": ["b", ""]}, "text_2", "text 1 adds no token"),
        ("/score", {"text_1": "a", "text_2": []}, "text_2", "at least 1"),
        ("/score", {"text_1": "a", "text_2": ["b", "c " * 600]}, "text_2", "text 1 .* max_model_len = 512"),
        ("/score", {"text_1": "a", "text_2": "b", "truncate_prompt_tokens": 5}, "truncate_prompt_tokens", "does not support truncation"),
        ("/score", {"text_1": "a", "text_3": "b"}, "text_3", "did you mean 'text_2'"),
        ("/score", {"text_1": "a", "text_2": [["b"]]}, "text_2.0", "valid string"),
        ("/rerank", {"query": QUERY}, "documents", "required"),
        ("/rerank", {"query": "", "documents": ["a"]}, "query", "at least 1"),
        ("/rerank", {"query": "a", "documents": []}, "documents", "at least 1"),
        ("/rerank", {"query": "a", "documents": ["b"] * (INPUTS + 1)}, "documents", f"at most {INPUTS}"),
        ("/rerank", {"query": "a", "documents": ["b", {"image": "c"}]}, "documents.1.text", "required"),
        ("/rerank", {"query": "a", "documents": ["b", "c " * 600]}, "documents", "text 1 .* max_model_len = 512"),
        ("/rerank", {"query": "a", "documents": ["b"], "top_n": 0}, "top_n", "greater than or equal to 1"),
        ("/rerank", {"query": "a", "documents": ["b"], "max_tokens_per_doc": 9}, "max_tokens_per_doc", "does not support truncation"),
    ],
)
def test_a_wrong_field_is_named(live: Live, path: str, body: dict[str, Any], param: str, message: str) -> None:
    error = refused(live, path, body)
    assert error.param == param
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(str(error))


def test_a_model_that_is_not_here(live: Live) -> None:
    with pytest.raises(openai.NotFoundError):
        call(live, "/rerank", {"query": "a", "documents": ["b"], "model": "gpt"})


# ---- keys


@pytest.fixture(scope="module")
def keyed(llm: LLM) -> Iterator[Live]:
    with Live(llm.sibling(), api_key=("key-a",)) as live:
        yield live


def test_a_key_is_needed(keyed: Live) -> None:
    for path, body in (("/score", {"text_1": "a", "text_2": "b"}), ("/v2/rerank", {"query": "a", "documents": ["b"]})):
        assert call(keyed, path, body, api_key="key-a")
        with pytest.raises(openai.AuthenticationError):
            call(keyed, path, body)
    keyed.settle()
