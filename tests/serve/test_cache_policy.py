"""The server's cache policy: requests get it, may leave it, and replies say which one ran."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from redraft import LLM, SamplingParams
from redraft.config import EngineConfig
from redraft.errors import InvalidInput
from redraft.serve.config import ServeConfig
from redraft.serve.run import described, run
from tests.serve.raw import Live, live

POLICY = "keep=streaming-llm:sinks=2,recent=6+codec=int8"
PROMPT = '''class Stack:
    """A last-in, first-out collection of items."""

    def __init__(self, items=()):
        self._items = list(items)

    def push(self, item):
'''


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live(LLM(max_model_len=160, cache_memory=24 << 20, threads=1, cache_policy=POLICY)) as made:
        yield made
        made.idle()


@pytest.mark.parametrize(
    ("given", "ran"),
    [
        ({}, POLICY),
        ({"cache": "off"}, "none"),
        ({"cache": {"keep": "none"}}, "none"),
        ({"cache": {"codec": "int8"}}, "codec=int8"),
        ({"cache": {}}, POLICY),
    ],
)
def test_a_reply_says_which_policy_ran(server: Live, given: dict[str, Any], ran: str) -> None:
    reply = server.complete(PROMPT, **given).json
    assert reply["metrics"]["cache_policies"] == [ran]
    chosen = dict(part.split("=", 1) for part in ran.split("+")) if ran != "none" else {"keep": "none"}
    output = server.llm.sibling().generate(PROMPT, temperature=0, max_tokens=24, ignore_eos=True, **chosen)[0]
    assert reply["choices"][0]["text"] == output.outputs[0].text


def test_it_changes_the_text_here(server: Live) -> None:
    assert server.alone(PROMPT) != server.alone(PROMPT, cache="off")


def test_vectors_and_scores_have_the_whole_cache(server: Live) -> None:
    plain, body = LLM(max_model_len=160, cache_memory=24 << 20, threads=1), {"input": PROMPT, "encoding_format": "float"}
    assert server.ask("POST", "/v1/embeddings", body).json["data"][0]["embedding"] == pytest.approx(plain.embed(PROMPT)[0].tolist())


def test_the_server_says_what_requests_get(server: Live) -> None:
    said = server.ask("GET", "/server_info").json
    assert said["cache_policy"] == [{"prompt_tokens": 1, "policy": POLICY}] and said["guarantee"] == "lossy"
    first, *_, last = described(server.llm, "m", ["0"], SamplingParams())
    assert last == f"cache policy of prompts from 1 token on: {POLICY}" and first.endswith(", lossy")
    assert described(server.llm, "m", ["0"], SamplingParams(keep="none"))[0].endswith(", same-text")


def test_a_choice_that_is_none_is_refused(server: Live) -> None:
    answer = server.complete(PROMPT, cache="on")
    assert answer.status == 400 and answer.json["error"]["param"] == "cache"


def test_two_defaults_exclude_each_other() -> None:
    with pytest.raises(InvalidInput, match="cache_policy and keep exclude each other"):
        run(EngineConfig.of(cache_policy=POLICY), ServeConfig(keep="streaming-llm"), [])
