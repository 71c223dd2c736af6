"""A spelling for the tiny model's 24 tokens: bytes, some of them parts of one character. And engines that return text."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

from redraft.config import SamplingParams
from redraft.core.sequence import Request
from redraft.draft.drafter import OpenDrafter
from redraft.engine.engine import Engine
from redraft.engine.output import Event, checked
from redraft.models.tokenizer import Decoder
from tests.contracts import plain
from tests.contracts.drafters import RandomTrees
from tests.contracts.identity import engine

PIECES: tuple[bytes, ...] = (
    b"a", b"\xe2", b"\x82", b"\xac", b"ab", b" the", b"\xc3\xa9", b"\xc3", b"\xa9", b"\n", b"stop", b"st", b"op", b"o", b" ",
    b"\xf0\x9f", b"\x98\x80", b"xyz", b"b", b"\xe2\x82", b"c", b"ba", b"", b".",
)  # fmt: skip
assert len(PIECES) == plain.VOCAB
PROMPT = [3, 9, 14, 20, 7, 1, 5, 11, 16, 2, 8, 13, 0, 17, 21, 4, 6, 10, 12, 15, 18, 19, 22, 23, 5, 6, 7]


def decode(ids: Seq[int]) -> str:
    return b"".join(PIECES[i] for i in ids).decode("utf-8", errors="replace")


def truth(params: SamplingParams, prompt: Seq[int] = PROMPT, index_seed: int | None = None, new: int = 60) -> list[int]:
    """The plain loop's tokens, without an early end."""
    spec, weights = plain.tiny()
    return plain.generate(spec, weights, list(prompt), params.but(max_tokens=new, min_tokens=0), seed=index_seed)


def oracle(known: dict[tuple[str, int], Seq[int]]) -> RandomTrees:
    """Right in four of five cases, so that most steps accept several tokens."""
    return RandomTrees(plain.VOCAB, seed=4, right=0.8, known=known)


def telling(drafter: OpenDrafter | str = "none", **options: Any) -> Engine:
    return engine(drafter, **{"decode": Decoder(decode), "decode_all": Decoder(decode), **options})


def finish(made: Engine, *requests: Request) -> dict[str, list[Event]]:
    """All events of each request, by its id."""
    for request in requests:
        made.add(request)
    reported: dict[str, list[Event]] = {request.id: [] for request in requests}
    while made.has_work:
        for event in checked(made.step()):
            reported[event.request.id].append(event)
        made.memory.check()
    assert made.memory.used() == 0 and not made.outputs
    return reported


def one(made: Engine, params: SamplingParams, prompt: Seq[int] = PROMPT) -> tuple[list[int], str, str]:
    """(tokens, text, reason) of a single request."""
    events = finish(made, Request("r", list(prompt), params))["r"]
    return [t for e in events for t in e.tokens], "".join(e.text for e in events), str(events[-1].reason)
