"""Prompts of chunks for tests of reuse methods, and what the cache of their texts holds."""

from __future__ import annotations

from random import Random

from redraft.config import SamplingParams
from redraft.core.sequence import Request
from redraft.engine.engine import Engine
from redraft.engine.output import checked
from tests.contracts import plain
from tests.contracts.identity import Run, drive

GREEDY = SamplingParams(temperature=0, max_tokens=6, seed=1, logprobs=5)
DICE = Random(7)
HEAD = [DICE.randrange(plain.VOCAB) for _ in range(5)]
CHUNKS = [[DICE.randrange(plain.VOCAB) for _ in range(length)] for length in (33, 20, 27, 41)]
QUESTION = [DICE.randrange(plain.VOCAB) for _ in range(4)]
LONGEST = 200


def joined(name: str, order: tuple[int, ...] = (2, 0, 3, 1), reuse: str = "", params: SamplingParams = GREEDY, salt: str = "") -> Request:
    """A prompt of the head, some chunks and the question."""
    prompt, spans = list(HEAD), []
    for i in order:
        spans.append((len(prompt), len(prompt) + len(CHUNKS[i])))
        prompt += CHUNKS[i]
    return Request(name, [*prompt, *QUESTION], params, salt, reuse=reuse, chunks=spans if reuse else [])


def text_of(engine: Engine, request: Request) -> list[int]:
    return drive(engine, [request], [0]).texts[request.id]


def reported(engine: Engine, request: Request) -> list[float]:
    """Log-probabilities of the likeliest tokens at every position of the new text."""
    engine.add(request)
    found = []
    while engine.has_work:
        found += [value for event in checked(engine.step()) for row in event.logprobs for _, value in sorted(row.top)]
    return found


def together(engine: Engine, *requests: Request) -> Run:
    return drive(engine, requests, [0] * len(requests))
