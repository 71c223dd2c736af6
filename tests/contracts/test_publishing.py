"""Blocks that a request under a policy leaves in the prefix cache have the bits that a request without a policy would compute."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import numpy as np
import pytest

from redraft import LLM, SamplingParams
from redraft.engine.policies import Policies
from redraft.ops import library
from redraft.ops.arrays import array
from redraft.ops.backend import Feature
from tests.contracts import trained
from tests.contracts.test_policies import SINGLE, ids

PROMPT = """def area(width, height):
    return width * height

class Shape:
    def __init__(self, width, height):
        self.width = width
"""
NATIVE = library.load() is not None
EXACT = [("native", "float32"), ("native", "bfloat16"), ("numpy", "float32")]
OTHERS = [("numpy", "bfloat16"), ("torch", "float32"), ("torch", "bfloat16"), ("reference", "float64")]
LATE = ("keep", "streaming-llm:sinks=2,recent=40")
TWO = (LATE, ("read", "page-top-k:tokens=64,sinks=0"))
POLICIES = [*SINGLE, (LATE,), TWO]
# others: PyTorch's backends never publish under a policy
CASES = [(policy, *way) for policy, way in [*itertools.product(POLICIES, EXACT), *itertools.product([(LATE,), TWO], OTHERS)]]
names = [*ids, "streaming-llm, late", "streaming-llm, page-top-k"]
IDS = [" ".join((names[POLICIES.index(policy)], *way)) for policy, *way in CASES]


@cache
def engine(backend: str, dtype: str) -> LLM:
    if backend == "native" and not NATIVE:
        pytest.skip("no compiled kernels here")
    return LLM("embedded", backend=backend, dtype=dtype, max_model_len=256, cache_memory=32 << 20, threads=1)


@cache
def alone(backend: str, dtype: str, new: int) -> tuple[Any, list[np.ndarray]]:
    """The result of a request without a policy in a new engine, and the blocks of its prompt."""
    llm = engine(backend, dtype)
    llm.engine.memory.paged.table.forget()
    wanted = ask(llm, new)
    assert len(wanted.prompt_token_ids) > 64
    return wanted, blocks(llm, wanted.prompt_token_ids)


def blocks(llm: LLM, tokens: list[int]) -> list[np.ndarray]:
    """The cached blocks of a text, in text order."""
    nodes = llm.engine.memory.paged.table.prefix.walk(tokens, "")
    return [array(llm.engine.memory.paged.store.pool.data)[node.page].copy() for node in nodes]


def ask(llm: LLM, new: int, **policy: Any) -> Any:
    repeated = PROMPT * (2 if llm.runner.backend.name == "reference" else 4)  # the reference is slow
    return llm.generate(repeated, SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, logprobs=2, **policy))[0]


def same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    return one.tobytes() == other.tobytes()


@pytest.mark.parametrize(("policy", "backend", "dtype"), CASES, ids=IDS)
def test_a_plain_request_after_a_policy(policy: tuple[tuple[str, str], ...], backend: str, dtype: str) -> None:
    """In every backend and dtype, the cached blocks and the log-probabilities have the bits of a request that runs alone."""
    new = 16 if backend == "native" else 4
    wanted, expected = alone(backend, dtype, new)
    assert len(expected) > 1
    shared = engine(backend, dtype)
    shared.engine.memory.paged.table.forget()
    after = ask(shared, new, **trained.fitted(dict(policy), shared.runner))
    left = blocks(shared, after.prompt_token_ids + after.outputs[0].token_ids)
    if Feature.BIT_EXACT not in shared.runner.backend.features:
        assert not left, "only a backend that promises bits may publish"
    assert all(same_bits(one, other) for one, other in zip(left, expected, strict=False))
    found = ask(shared, new)
    assert found.cached_tokens == 32 * len(left[: (len(found.prompt_token_ids) - 1) // 32])
    assert found.outputs[0].token_ids == wanted.outputs[0].token_ids
    assert found.outputs[0].logprobs == wanted.outputs[0].logprobs


@pytest.mark.skipif(not NATIVE, reason="no compiled kernels here")
def test_blocks_are_published_under_a_policy_while_they_are_plain() -> None:
    """A control: otherwise the test above proves nothing."""
    llm = engine("native", "bfloat16")
    llm.engine.memory.paged.table.forget()
    ask(llm, 24, keep="streaming-llm:sinks=2,recent=70")
    assert ask(llm, 4).cached_tokens == 64


@pytest.mark.skipif(not NATIVE, reason="no compiled kernels here")
def test_a_policy_that_publishes_too_much_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    fit = Policies.fit

    def all_is_plain(self: Policies, seq: Any) -> None:
        fit(self, seq)
        seq.shareable_tokens = 1 << 30

    monkeypatch.setattr(Policies, "fit", all_is_plain)
    with pytest.raises(AssertionError):
        test_a_plain_request_after_a_policy((("keep", "streaming-llm:sinks=2,recent=14"),), "native", "bfloat16")
