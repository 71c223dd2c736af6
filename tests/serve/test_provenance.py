"""The origin of tokens as replies have it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from redraft.core.distribution import TopLogprobs
from redraft.core.tree import TokenTree
from redraft.engine.output import Provenance
from redraft.models.tokenizer import Tokenizer
from redraft.serve import provenance

SPELLINGS = {0: b"a", 1: "é".encode(), 2: "🌊".encode()[:2], 3: "🌊".encode()[2:], 4: b" \xf0"}
TOKENIZER = cast(Tokenizer, SimpleNamespace(bytes_of=SPELLINGS.__getitem__))


def test_a_token_that_is_a_part_of_a_character_has_its_bytes() -> None:
    tokens = list(SPELLINGS)
    logprobs = [TopLogprobs(token, -0.5, 1, ((token, -0.5), (0, -1.0))) for token in tokens]
    found: dict[str, Any] = provenance.parts(TOKENIZER, tokens, logprobs, [Provenance(i + 1, "") for i in range(5)])
    assert [one.get("bytes") for one in found["provenance"]] == [None, None, [0xF0, 0x9F], [0x8C, 0x8A], [0x20, 0xF0]]
    assert [one["token"] for one in found["provenance"]] == ["a", "é", "\ufffd", "\ufffd\ufffd", " \ufffd"]
    assert found["trees"] == []


def test_a_tree_names_the_drafter_of_each_node() -> None:
    tree = TokenTree.chain([0, 1])
    found = provenance.parts(TOKENIZER, [0], [TopLogprobs(0, 0.0, 1, ((0, 0.0),))], [Provenance(7, "suffix", tree, ("suffix",), (0,))])
    (shown,) = found["trees"]
    assert shown["step"] == 7
    assert [(node["token"], node["parent"], node["origin"], node["accepted"]) for node in shown["nodes"]] == [
        ("a", -1, "suffix", True),
        ("é", 0, "suffix", False),
    ]
