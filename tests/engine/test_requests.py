"""n texts of one prompt, log-probabilities, aborts, prefix sharing: with and without drafts, chunks, preemption."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from redraft.config import SamplingParams
from redraft.core.noise import sample_seed
from redraft.core.sequence import FinishReason, Request, Wants
from redraft.engine.engine import Engine
from tests.contracts import plain
from tests.contracts.identity import drive, engine
from tests.engine.spelling import PROMPT, finish, oracle, truth

SAMPLED = SamplingParams(temperature=0.9, seed=21, max_tokens=40)
DRAFTED = (False, True)


def made(known: dict[tuple[str, int], list[int]], drafted: bool, **options: Any) -> Engine:
    return engine(oracle(known) if drafted else "none", **options)


# ---- n


@pytest.mark.parametrize("pool", [40, 5])
@pytest.mark.parametrize("drafted", DRAFTED)
@pytest.mark.parametrize("prompt", [PROMPT, PROMPT[:1], PROMPT + PROMPT[:6]], ids=["27", "1", "33"])
def test_n_texts_are_n_requests_with_their_seeds(prompt: list[int], drafted: bool, pool: int) -> None:
    n = 4
    texts = [truth(SAMPLED, prompt, sample_seed(21, i), 40) for i in range(n)]
    assert len({tuple(text) for text in texts}) == n
    together = made({("r", i): text for i, text in enumerate(texts)}, drafted, pool=pool)
    seen = drive(together, [Request("r", list(prompt), SAMPLED.but(n=n))], [0])
    assert [seen.texts[f"r/{i}"] for i in range(n)] == texts
    assert bool(seen.preempted) == (pool == 5) or len(prompt) == 1
    if drafted:
        assert seen.accepted and seen.rejected


def test_siblings_share_the_prompts_full_pages() -> None:
    wide = engine(pool=40)
    wide.add(Request("r", PROMPT * 4, SAMPLED.but(n=4, max_tokens=8)))
    while any(not seq.generated for seq in wide.running) or wide.waiting:
        wide.step()
    assert len(wide.running) == 4 and wide.memory.used() == 3 + 4  # 108 tokens: three full pages, and one more page each
    wide.abort("r")
    assert wide.memory.used() == 0


def test_n_beyond_max_seqs_waits() -> None:
    texts = [truth(SAMPLED, PROMPT, sample_seed(21, i), 10) for i in range(5)]
    narrow = engine(max_seqs=2)
    seen = drive(narrow, [Request("r", list(PROMPT), SAMPLED.but(n=5, max_tokens=10))], [0])
    assert [seen.texts[f"r/{i}"] for i in range(5)] == texts


# ---- logprobs


def dense(tokens: list[int]) -> plain.Numbers:
    return np.log(plain.softmax(plain.logits(*plain.tiny(), tokens)))


@pytest.mark.parametrize("pool", [40, 5])
@pytest.mark.parametrize("chunk", [512, 9])
@pytest.mark.parametrize("drafted", DRAFTED)
def test_logprobs_are_those_of_the_raw_logits(drafted: bool, chunk: int, pool: int) -> None:
    params = SAMPLED.but(logprobs=3, prompt_logprobs=2, top_p=0.9, repetition_penalty=1.2)
    prompts = [PROMPT, PROMPT[::-1], PROMPT + PROMPT[:9]]
    texts = [truth(params, prompt, new=40) for prompt in prompts]
    several = made({(str(i), 0): text for i, text in enumerate(texts)}, drafted, pool=pool, chunk=chunk, max_seqs=3)
    for repeat in range(2):  # the second time the prompts are in the prefix cache
        requests = [Request(str(i), list(prompt), params) for i, prompt in enumerate(prompts)]
        reported = finish(several, *requests)
        for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            assert [t for event in reported[str(i)] for t in event.tokens] == text, repeat
            rows = dense([*prompt, *text])
            own = [entry for event in reported[str(i)] for entry in event.logprobs]
            assert requests[i].prompt_logprobs[0] is None and len(requests[i].prompt_logprobs) == len(prompt)
            for at, entry in enumerate([*requests[i].prompt_logprobs[1:], *own]):
                row, k = rows[at], 2 if at < len(prompt) - 1 else 3
                token = [*prompt, *text][at + 1]
                assert entry.token == token and entry.logprob == pytest.approx(row[token].item(), abs=1e-9)
                order = sorted(range(plain.VOCAB), key=lambda t, row=row: (-row[t].item(), t))
                assert entry.rank == order.index(token) + 1
                assert [t for t, _ in entry.top] == order[:k]
                assert [p for _, p in entry.top] == pytest.approx([row[t].item() for t in order[:k]], abs=1e-9)
    assert bool(several.preemptions) == (pool == 5 and chunk > 9) or chunk == 9


@pytest.mark.parametrize("chunk", [512, 9])
@pytest.mark.parametrize("of", [range(1, 81), range(40, 81), range(64, 81), [80], [], [33, 34, 47, 66], [1, 80]])
def test_rows_before_the_first_wanted_log_probability_may_come_from_the_prefix_cache(of: list[int], chunk: int) -> None:
    params, prompt = SamplingParams(temperature=0, max_tokens=1), PROMPT * 3
    several = made({}, False, pool=40, chunk=chunk)
    whole = Request("whole", list(prompt), params.but(prompt_logprobs=1))
    part = Request("part", list(prompt), params, wants=Wants(prompt_logprobs=1, logprobs_of=of))
    finish(several, whole)
    finish(several, part)
    assert whole.cached_tokens == 0 and len(prompt) == 81
    first = min(of, default=81)
    assert part.cached_tokens is not None and part.cached_tokens < first and bool(part.cached_tokens) == (first > 1)
    assert [at for at, found in enumerate(part.prompt_logprobs) if found is not None] == [*of] and len(part.prompt_logprobs) == 81
    for at in of:
        found, known = part.prompt_logprobs[at], whole.prompt_logprobs[at]
        assert found is not None and known is not None
        assert (found.token, found.rank) == (known.token, known.rank) and found.logprob == pytest.approx(known.logprob, abs=1e-9)


# ---- abort


@pytest.mark.parametrize("drafted", DRAFTED)
@pytest.mark.parametrize("steps", [0, 1, 3, 12])
def test_abort_frees_everything_and_spares_the_others(steps: int, drafted: bool) -> None:
    texts = {str(i): truth(SAMPLED, PROMPT[i:], new=40) for i in range(4)}
    crowd = made({(name, 0): text for name, text in texts.items()}, drafted, chunk=20, max_seqs=2)
    for i in range(4):
        crowd.add(Request(str(i), PROMPT[i:], SAMPLED))
    reported: dict[str, list[int]] = {name: [] for name in texts}
    gone = [crowd.running, crowd.waiting]
    for _ in range(steps):
        for event in crowd.step():
            reported[event.request.id] += event.tokens
    victims = [seqs[0].request for seqs in gone if seqs]
    for victim in victims:
        assert crowd.abort(victim.id) and not crowd.abort(victim.id)
        assert victim.sequences[0].reason is FinishReason.ABORT and not victim.sequences[0].state
        crowd.memory.check()
    while crowd.has_work:
        for event in crowd.step():
            reported[event.request.id] += event.tokens
    for name, text in texts.items():
        if name not in {victim.id for victim in victims}:
            assert reported[name] == text
    assert crowd.memory.used() == 0 and not crowd.outputs


# ---- prefix sharing


@pytest.mark.parametrize("drafted", DRAFTED)
def test_a_cached_prefix_is_reported_and_changes_nothing(drafted: bool) -> None:
    prompt = PROMPT * 3
    text = truth(SAMPLED, prompt, new=40)
    for sharing in (True, False):
        shared = made({(name, 0): text for name in "abc"}, drafted, sharing=sharing)
        cached = []
        for name in "abc":
            request = Request(name, list(prompt), SAMPLED, salt="other" if name == "c" else "")
            assert drive(shared, [request], [0]).texts[name] == text
            cached.append(request.cached_tokens)
        assert cached == ([0, 64, 0] if sharing else [0, 0, 0])


def test_generated_text_is_shared_too() -> None:
    shared = engine()
    first = drive(shared, [Request("a", PROMPT, SAMPLED)], [0]).texts["a"]
    longer = Request("b", PROMPT + first, SAMPLED.but(max_tokens=5))
    assert drive(shared, [longer], [0]).texts["b"] == truth(SAMPLED, PROMPT + first, new=5)
    assert longer.cached_tokens == 64
