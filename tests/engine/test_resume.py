"""A request that goes on in another engine from the tokens that were received of it: the same texts, events and statistics."""

from __future__ import annotations

from typing import Any

import pytest

from redraft import LLM, SamplingParams
from redraft.core.sequence import Request
from redraft.engine.engine import Engine
from redraft.engine.output import Event, Progress, Stats
from redraft.errors import InvalidInput

PROMPT = "def add(a, b):\n    return"


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("embedded", draft="token-recycling", max_model_len=256)


class Received:
    """What a client has of each text."""

    def __init__(self, n: int) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(n)]
        self.text, self.stats, self.ended = [""] * n, [Stats()] * n, [False] * n
        self.logprobs: list[list[Any]] = [[] for _ in range(n)]

    def take(self, events: list[Event]) -> None:
        for event in events:
            assert event.error is None and not self.ended[event.index]
            self.tokens[event.index] += event.tokens
            self.text[event.index] += event.text
            self.logprobs[event.index] += event.logprobs
            self.stats[event.index], self.ended[event.index] = event.stats.copy(), event.reason is not None

    @property
    def progress(self) -> list[Progress]:
        return [Progress(list(tokens), stats, ended) for tokens, stats, ended in zip(self.tokens, self.stats, self.ended, strict=True)]


def run(engine: Engine, request: Request, received: Received, steps: int) -> None:
    """Runs it for so many steps with new tokens, and then removes it."""
    engine.add(request, received.progress if any(received.tokens) else ())
    while engine.has_work and steps:
        received.take(events := engine.step())
        steps -= bool(events)
    engine.abort(request.id)
    engine.table.forget()
    assert engine.memory.used() == 0 and not len(engine.outputs)


CASES = {
    "greedy": SamplingParams(temperature=0, max_tokens=40),
    "sampled": SamplingParams(temperature=1.0, seed=3, max_tokens=40, repetition_penalty=1.2),
    "stop": SamplingParams(temperature=0.8, seed=4, max_tokens=60, stop=("\n\n", "  return")),
    "n": SamplingParams(temperature=1.0, seed=5, max_tokens=24, n=3, logprobs=2, provenance=True),
    "eviction": SamplingParams(temperature=0.7, seed=6, max_tokens=60, keep="streaming-llm:sinks=2,recent=30"),
}


@pytest.mark.parametrize("every", [1, 4, 9])
@pytest.mark.parametrize("case", CASES)
def test_a_text_that_changes_its_engine_is_the_same(llm: LLM, case: str, every: int) -> None:
    params = CASES[case].but(seed=CASES[case].seed or 0)
    prompt, engine = llm.tokenizer.encode(PROMPT), llm.engine
    whole, parts = Received(params.n), Received(params.n)
    run(engine, Request("whole", list(prompt), params), whole, 1000)
    assert all(whole.ended)
    moves = 0
    while not all(parts.ended):
        moves += 1
        run(engine, Request(f"part {moves}", list(prompt), params), parts, every)
    assert moves > 1
    assert parts.tokens == whole.tokens and parts.text == whole.text
    assert [[entry.token for entry in some] for some in parts.logprobs] == [[entry.token for entry in some] for some in whole.logprobs]
    assert [stats.steps > 0 and stats.accepted <= stats.drafted for stats in parts.stats] == [True] * params.n


@pytest.mark.parametrize(
    ("params", "progress", "error"),
    [
        (SamplingParams(seed=1, n=2), [Progress([5], Stats())], "progress of 1 texts: the request has n = 2"),
        (SamplingParams(), [Progress([5], Stats())], "only a request with a seed"),
        (SamplingParams(seed=1), [Progress([-1], Stats())], r"progress\[0\]\[0\] = -1: not a token id"),
    ],
)
def test_progress_is_checked(llm: LLM, params: SamplingParams, progress: list[Progress], error: str) -> None:
    with pytest.raises(InvalidInput, match=error):
        llm.engine.add(Request("r", [5, 6], params), progress)
    assert not llm.engine.has_work
