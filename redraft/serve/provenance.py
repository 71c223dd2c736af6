"""The origin of tokens and the drafts of steps, as replies and recorded runs have them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from typing import Any

from redraft.core.distribution import TopLogprobs
from redraft.engine.output import Provenance
from redraft.models.tokenizer import Tokenizer

ALTERNATIVES = 4  # for each token


def parts(tokenizer: Tokenizer, tokens: Seq[int], logprobs: Seq[TopLogprobs], sources: Seq[Provenance]) -> dict[str, Any]:
    """The fields `provenance`, one entry a token, and `trees`, one entry a step. logprobs: with ALTERNATIVES + 1 likeliest tokens."""
    origins = [_origin(tokenizer, *entry) for entry in zip(tokens, logprobs, sources, strict=True)]
    return {"provenance": origins, "trees": [_tree(tokenizer, one) for one in sources if one.tree is not None]}


def _origin(tokenizer: Tokenizer, token: int, one: TopLogprobs, of: Provenance) -> dict[str, Any]:
    raw = tokenizer.bytes_of(token)
    part = {"bytes": list(raw)} if raw.decode("utf-8", "ignore").encode() != raw else {}
    beside = [(other, logprob) for other, logprob in one.top if other != token][:ALTERNATIVES]
    return {
        **_named(tokenizer, token),
        **part,
        "step": of.step,
        "origin": of.drafter or "model",
        "probability": math.exp(one.logprob),
        "rank": one.rank,
        "alternatives": [_named(tokenizer, other) | {"probability": math.exp(logprob)} for other, logprob in beside],
    }


def _tree(tokenizer: Tokenizer, of: Provenance) -> dict[str, Any]:
    return {"step": of.step, "nodes": list(_nodes(tokenizer, of))}


def _nodes(tokenizer: Tokenizer, of: Provenance) -> Iterator[dict[str, Any]]:
    tree = of.tree
    assert tree is not None
    origins = [0] * len(tree) if tree.origins is None else tree.origins.tolist()
    for i, (token, parent, origin) in enumerate(zip(tree.tokens.tolist(), tree.parents.tolist(), origins, strict=True)):
        yield _named(tokenizer, token) | {"parent": parent, "origin": of.names[origin], "accepted": i in of.path}


def _named(tokenizer: Tokenizer, token: int) -> dict[str, Any]:
    return {"token": tokenizer.bytes_of(token).decode("utf-8", "replace"), "token_id": token}
