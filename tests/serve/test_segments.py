"""Prompts of segments over HTTP: the reply is that of `LLM`, and says what was reused and what ran again."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from redraft.llm import LLM
from tests.serve.live import Live

SEGMENTS = [
    "def head():\n",
    "    return 1\n\n\n" * 6,
    "class Shape:\n    area = 3\n" * 5,
    "import os\nimport sys\n" * 7,
    "def size(self):\n",
]
SWAPPED = [SEGMENTS[0], *reversed(SEGMENTS[1:-1]), SEGMENTS[-1]]
REUSE = "cacheblend:ratio=0.3"


def asked(live: Live, body: dict[str, Any], path: str = "/completions") -> Any:
    return live.client().post(path, body={"model": "embedded", **body}, cast_to=object)


def test_completions(live: Live, llm: LLM) -> None:
    body = {"segments": SWAPPED, "reuse": REUSE, "max_tokens": 8, "temperature": 0, "cache_salt": "segments"}
    found = asked(live, body)
    truth = llm.generate({"segments": SWAPPED}, temperature=0, max_tokens=8, reuse=REUSE)[0]
    assert found["choices"][0]["text"] == truth.outputs[0].text
    details = found["usage"]["prompt_tokens_details"]
    assert (details["reused_tokens"], details["repaired_tokens"]) == (truth.reused_tokens, truth.repaired_tokens)
    assert details["repaired_tokens"] > 0 and details["repair_rows"] == pytest.approx(truth.repair_rows, abs=1e-3)
    plain = asked(live, {**body, "reuse": None})
    assert plain["usage"]["prompt_tokens"] == found["usage"]["prompt_tokens"]
    assert "reused_tokens" not in plain["usage"]["prompt_tokens_details"]


def test_token_ids(live: Live, llm: LLM) -> None:
    tokens = [llm.tokenizer.encode(segment, special=i == 0) for i, segment in enumerate(SEGMENTS)]
    body = {"reuse": "cacheblend:ratio=1", "max_tokens": 6, "temperature": 0, "cache_salt": "ids"}
    texts = [asked(live, {**body, "segments": given})["choices"][0]["text"] for given in (SEGMENTS, tokens)]
    assert texts[0] == texts[1] == asked(live, {**body, "segments": SEGMENTS, "reuse": None})["choices"][0]["text"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"segments": SEGMENTS[:1]}, "segments"),
        ({"segments": ["a", "", "b"]}, "segments[1] is empty"),
        ({"segments": SEGMENTS, "prompt": "a"}, "segments exclude it"),
        ({"segments": SEGMENTS, "suffix": "a"}, "segments exclude it"),
        ({"segments": SEGMENTS, "reuse": "nothing"}, "nothing"),
        ({"segments": SEGMENTS, "reuse": "pie"}, "it reuses the text before an edit"),
        ({"segments": SEGMENTS, "reuse": "cacheblend:ratio=2"}, "ratio"),
        ({"prompt": "a", "reuse": REUSE}, "a prompt of segments is needed"),
        ({"segments": SEGMENTS, "reuse": REUSE, "cache": {"codec": "int8"}}, "takes over plain pages"),
    ],
)
def test_refusals(live: Live, more: dict[str, object], message: str) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        asked(live, {"max_tokens": 2, **more})
    assert message in error.value.message


def test_chats(live: Live) -> None:
    """Segments come before the text of the last user message, as the template renders it."""
    said = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "def size("}]
    body = {"messages": said, "segments": SEGMENTS[1:-1], "max_tokens": 6, "temperature": 0, "cache_salt": "chats"}
    found = [asked(live, {**body, "reuse": reuse}, "/chat/completions") for reuse in ("cacheblend:ratio=1", None)]
    last = {"role": "user", "content": "".join(SEGMENTS[1:-1]) + "def size("}
    whole = asked(live, {**body, "segments": None, "messages": [*said[:2], last]}, "/chat/completions")
    assert found[0]["choices"][0]["message"]["content"] == found[1]["choices"][0]["message"]["content"]
    assert found[0]["usage"]["prompt_tokens_details"]["reused_tokens"] > 0
    assert abs(whole["usage"]["prompt_tokens"] - found[1]["usage"]["prompt_tokens"]) <= len(SEGMENTS), "joined texts may have other tokens"
    with pytest.raises(openai.BadRequestError, match="no message has the role user"):
        asked(live, {**body, "messages": [{"role": "system", "content": "a"}]}, "/chat/completions")
