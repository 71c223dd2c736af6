"""APE: chunks that do not see each other, attended as one group by later rows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from redraft import LLM, registry
from redraft.config import SamplingParams
from redraft.core.sequence import Request, Sequence
from redraft.core.view import Parallel
from redraft.engine.engine import Engine
from redraft.errors import InvalidInput
from redraft.ops import library
from redraft.ops.places import grouped
from tests.contracts import identity
from tests.kv.reuse.joined import CHUNKS, GREEDY, HEAD, LONGEST, joined, reported, text_of, together

SOME, NEUTRAL = "ape:temperature=0.6,scale=0.7", "ape:temperature=1,scale=1"
LONGER = GREEDY.but(max_tokens=12)


def engine(**options: Any) -> Engine:
    return identity.engine(max_model_len=LONGEST, **options)


def running(made: Engine, request: Request) -> Sequence:
    """The text, once its prompt is in the cache."""
    made.add(request)
    while not (seq := next((one for one in made.running if one.request is request and one.generated), None)):
        made.step()
    return seq


def held(made: Engine, request: Request, first: int, count: int) -> list[Any]:
    """Keys and values of some tokens in all layers."""
    seq, rows = running(made, request), np.arange(first, first + count, dtype=np.int32)
    return [made.memory.paged.layer(seq, rows, layer) for layer in range(2)]


@pytest.mark.parametrize("reuse", [SOME, NEUTRAL])
def test_a_chunk_is_that_of_its_own_text(reuse: str) -> None:
    """Keys of the first layer are those of the new positions, values of all layers those that see the head and the chunk alone."""
    request = joined("new", reuse=reuse)
    for i, (first, end) in zip((2, 0, 3, 1), request.chunks, strict=True):
        alone = Request("alone", [*HEAD, *CHUNKS[i], 1], GREEDY)
        truth = held(engine(), alone, len(HEAD), end - first)
        found = held(engine(), joined("new", reuse=reuse), first, end - first)
        for (_, values), (_, own) in zip(found, truth, strict=True):
            assert np.array_equal(values, own)
        keys = held(engine(), joined("plain"), first, end - first)[0][0]
        assert found[0][0] == pytest.approx(keys, abs=1e-10)


@pytest.mark.parametrize("backend", ["torch", "reference", "numpy", "native"])
def test_neutral_is_reuse_without_a_repair(backend: str) -> None:
    if backend == "native":
        return  # in bfloat16, below
    made = engine(backend=backend)
    request = joined("new", reuse=NEUTRAL)
    assert reported(made, request) == reported(engine(backend=backend), joined("new", reuse="cacheblend:ratio=0"))
    assert request.repair_rows == 0 and request.reused_tokens + (request.cached_tokens or 0) == len(HEAD) + sum(map(len, CHUNKS))
    assert reported(made, joined("again", reuse=SOME)) == pytest.approx(reported(engine(), joined("new", reuse=SOME)), abs=1e-9)
    assert reported(made, joined("again", reuse=SOME)) != reported(made, joined("new", reuse=NEUTRAL))


def test_one_chunk_and_neutral_is_a_plain_prompt() -> None:
    assert reported(engine(), joined("new", (2,), NEUTRAL)) == reported(engine(), joined("plain", (2,)))


def test_a_prompt_in_the_cache_does_not_show_its_chunks_to_each_other() -> None:
    truth = reported(engine(), joined("new", reuse=SOME))
    made = engine()
    text_of(made, joined("plain"))
    request = joined("new", reuse=SOME)
    assert reported(made, request) == truth
    assert request.cached_tokens == 32, "the head and the first chunk"


def test_nobody_gets_what_was_computed_behind_a_group() -> None:
    """Not even with one chunk, whose own cache is exact."""
    for order in ((2, 0, 3, 1), (2,)):
        made = engine()
        text_of(made, joined("new", order, SOME, GREEDY.but(max_tokens=40)))
        text = joined("plain", order)
        assert reported(made, text) == pytest.approx(reported(engine(), joined("plain", order)), abs=1e-10)
        assert (text.cached_tokens or 0) <= len(HEAD) + len(CHUNKS[2])
        made.memory.check()


def test_chunks_in_another_order_move_only() -> None:
    """Without rotation by position, the new tokens would be the same: the values that a group adds do not depend on the order."""
    chosen = [held(engine(), joined("new", order, SOME), 5 + sum(len(CHUNKS[i]) for i in before), 20)
              for order, before in (((2, 1), (2,)), ((1, 2), ()))]  # fmt: skip
    for (_, one), (_, other) in zip(*chosen, strict=True):
        assert np.array_equal(one, other)


def test_steps_drafts_batches_and_preemption_change_nothing() -> None:
    alone = text_of(engine(), joined("new", reuse=SOME, params=LONGER))
    for drafter, chunk, pool in (("none", 8, 40), ("random", 24, 40), ("token-recycling", 512, 40), ("none", 33, 17)):
        made = engine(drafter=identity.drafter(drafter, {}), chunk=chunk, pool=pool)
        others = [joined(f"o{i}", order, reuse) for i, (order, reuse) in enumerate([((1, 3), ""), ((3, 1, 0), "cacheblend"), ((0,), SOME)])]
        seen = identity.drive(made, [joined("new", reuse=SOME, params=LONGER), *others], [0, 0, 1, 3])
        assert pool < 40 or seen.texts["new"] == alone, (drafter, chunk)
        assert made.memory.used() == 0


def test_preempted_and_two_texts() -> None:
    truth = text_of(engine(), joined("new", reuse=SOME, params=LONGER))
    made = engine()
    seq = running(made, joined("new", reuse=SOME, params=LONGER))
    made._preempt(seq)
    tokens = list(seq.tokens[seq.prompt_len :])  # their events were given
    while made.has_work:
        tokens += [token for event in made.step() for token in event.tokens]
    assert tokens == truth
    texts = together(engine(), joined("two", reuse=SOME, params=LONGER.but(n=2))).texts
    assert texts["two/0"] == texts["two/1"] == truth


@pytest.mark.parametrize("drafter", [name for name in sorted(registry.METHODS["draft"]) if identity.complete("draft", name)])
def test_every_drafter_keeps_the_text(drafter: str) -> None:
    layers = identity.DEEPER.get(drafter, 2)
    truth = text_of(engine(layers=layers), joined("new", (2, 0), SOME, LONGER))
    made = engine(drafter=identity.drafter(drafter, {}), layers=layers, chunk=24)
    assert identity.drive(made, [joined("new", (2, 0), SOME, LONGER), joined("other", (1,))], [0, 2]).texts["new"] == truth


SEGMENTS = [
    "def head():\n",
    "    return 1\n\n\n" * 6,
    "class Shape:\n    area = 3\n" * 5,
    "import os\nimport sys\n" * 7,
    "def size(self):\n",
]


@pytest.mark.skipif(library.load() is None, reason="no compiled kernels here")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_natively_drafts_steps_and_batches_change_no_bit(dtype: str) -> None:
    params = SamplingParams(temperature=0, max_tokens=24, logprobs=3, ignore_eos=True)
    common = {"backend": "native", "dtype": dtype, "max_model_len": 512, "cache_memory": 64 << 20, "threads": 1}
    alone, busy = (LLM("embedded", **common, **own) for own in ({"draft": "none"}, {"draft": "ngram", "draft_rows": 4, "token_budget": 48}))

    def given(reuse: str, first: int = 0) -> dict[str, Any]:
        return {"segments": SEGMENTS[first:], "reuse": reuse}

    one = alone.generate(given(SOME), params)[0].outputs[0]
    other = busy.generate([given(SOME), given(NEUTRAL, 1), "def f(" * 40], params)[0].outputs[0]
    assert one.token_ids == other.token_ids and one.logprobs == other.logprobs, "to the last bit"
    blend, neutral = (alone.generate(given(reuse), params)[0].outputs[0] for reuse in ("cacheblend:ratio=0", NEUTRAL))
    assert blend.logprobs == neutral.logprobs != one.logprobs


def test_refusals() -> None:
    for text, message in (("temperature=0", "above 0"), ("temperature=1.1", "1 or less"), ("scale=-1", "0 to 1"), ("scale=2", "0 to 1")):
        with pytest.raises(InvalidInput, match=message):
            engine().add(joined("r", reuse=f"ape:{text}"))


def test_a_group_weighs_as_its_sum_says() -> None:
    """By the definition of the paper: two softmaxes, merged by their sums. A group twice weighs 2^(scale * temperature) times as much."""
    dice, temperature, scale = np.random.default_rng(3), 0.6, 0.7
    scores, values = dice.normal(size=14), dice.normal(size=14)
    inside = np.array([0, 0, 1, 1, 1, 0, 1, 1, 0, 0, 0, 0, 0, 0], bool)
    place = SimpleNamespace(parallel=Parallel(((2, 5), (6, 8)), temperature, scale), where=np.arange(14)[None, None], at=np.array([13]))
    weights = np.exp(grouped(0, scores[None, None, None], np.ones((1, 1, 1, 14), bool), place)[0, 0, 0])  # type: ignore[arg-type]
    group, others = np.exp(scores[inside] / temperature), np.exp(scores[~inside])
    mass = group.sum() ** (scale * temperature)
    mixed = (mass * (group @ values[inside]) / group.sum() + others @ values[~inside]) / (mass + others.sum())
    assert weights @ values / weights.sum() == pytest.approx(mixed, abs=1e-12)
    twice = SimpleNamespace(
        parallel=Parallel(((2, 5), (6, 8), (14, 19)), temperature, scale), where=np.arange(20)[None, None], at=np.array([19])
    )
    more = np.concatenate([scores, scores[inside], [0.0]])
    found = np.exp(grouped(0, more[None, None, None], np.ones((1, 1, 1, 20), bool), twice)[0, 0, 0])  # type: ignore[arg-type]
    both = found[[*np.flatnonzero(inside), *range(14, 19)]].sum()
    assert both == pytest.approx(2 ** (scale * temperature) * weights[inside].sum(), rel=1e-12)
