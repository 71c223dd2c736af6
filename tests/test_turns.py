"""Threads that share one LLM. Each gets the same text as alone, and none waits forever."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import sleep
from typing import Any, Self

import numpy as np
import pytest

from redraft import LLM, Patch, SamplingParams, registry
from redraft.errors import Unsupported
from redraft.sample.processors.processor import Row, Vocabulary
from redraft.turns import Turns
from tests.checkpoints import tiny_llama

SAMPLED = SamplingParams(temperature=0.9, max_tokens=24, seed=3, ignore_eos=True)
PROMPTS = ["def f(x):", "a b a b a b", "once upon a time", "import os"]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    path = tiny_llama(tmp_path_factory.mktemp("turns") / "llama")
    return LLM(str(path), dtype="float64", draft="token-recycling", threads=1, cache_memory=1 << 22)


@pytest.fixture
def llm(loaded: LLM) -> Iterator[LLM]:
    yield loaded
    loaded.engine.memory.check()
    assert loaded.engine.memory.used() == 0 and not loaded.engine.has_work and not loaded.engine.outputs and not loaded._inboxes


def together(tasks: list[Callable[[], Any]], turns: Turns) -> list[Any]:
    """What the tasks return or raise, each in its own thread. All of them wait for the first turn."""
    found: list[Any] = [None] * len(tasks)

    def run(i: int) -> None:
        try:
            found[i] = tasks[i]()
        except BaseException as error:
            found[i] = error

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(tasks))]
    with turns:
        for thread in threads:
            thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    return found


@pytest.fixture
def often() -> Iterator[None]:
    """Makes Python switch threads as often as it can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def text(llm: LLM, prompt: str, seed: int) -> list[int]:
    return llm.generate(prompt, SAMPLED.but(seed=seed))[0].outputs[0].token_ids


def streamed(llm: LLM, prompt: str, seed: int) -> list[int]:
    return [token for delta in llm.stream(prompt, SAMPLED.but(seed=seed)) for token in delta.token_ids]


@pytest.mark.usefixtures("often")
def test_threads_get_the_texts_that_they_get_alone(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = [text(llm, prompt, seed) for seed, prompt in enumerate(PROMPTS)]
    step, beside = llm.engine.step, []

    def counted(*args: Any) -> Any:
        beside.append(len(llm.engine.running))
        return step(*args)

    monkeypatch.setattr(llm.engine, "step", counted)
    for _ in range(3):
        asked = [lambda i=i: text(llm, PROMPTS[i], i) for i in range(4)] + [lambda i=i: streamed(llm, PROMPTS[i], i) for i in range(4)]
        assert together(asked, llm._turns) == truth * 2
    assert max(beside) > 1, "they run in one batch"


@pytest.mark.usefixtures("often")
def test_every_method_in_threads(llm: LLM) -> None:
    def edited() -> Any:
        return llm.edit("def f(x): return x", Patch(4, 5, "g"), SAMPLED)[0].outputs[0].token_ids

    def said() -> Any:
        return llm.chat([{"role": "user", "content": "hi"}], SAMPLED)[0].outputs[0].token_ids

    asked = [edited, said, lambda: llm.embed(PROMPTS[2])[0].tolist(), lambda: text(llm, PROMPTS[0], 1)]
    alone = [one() for one in asked]
    for own, other in zip(together(asked * 2, llm._turns), alone * 2, strict=True):
        assert np.allclose(own, other, rtol=0, atol=1e-9)  # embeddings of the float64 backend may differ in the last bit


def test_a_caller_that_stops_reading_keeps_nobody_waiting(llm: LLM) -> None:
    truth = text(llm, PROMPTS[0], 1)
    stream = llm.stream(PROMPTS[1], SAMPLED)
    next(stream)
    assert together([lambda: text(llm, PROMPTS[0], 1)], llm._turns) == [truth]
    stream.close()


def test_siblings_run_one_at_a_time(llm: LLM) -> None:
    other = llm.sibling(draft="none")
    truth = text(other, PROMPTS[0], 1)
    stream = llm.stream(PROMPTS[1], SAMPLED)
    (refused,) = together([lambda: text(other, PROMPTS[0], 1)], llm._turns)
    assert isinstance(refused, Unsupported) and "siblings share pages and run one at a time" in str(refused)
    (output,) = other.generate([PROMPTS[0]], SAMPLED)
    assert output.error == str(refused)
    stream.close()
    assert text(other, PROMPTS[0], 1) == truth == text(llm, PROMPTS[0], 1)


@dataclass(frozen=True)
class Failing:
    """Raises for requests with this seed."""

    @classmethod
    def of(cls, params: SamplingParams, vocabulary: Vocabulary) -> Self | None:
        return cls() if params.seed == 13 else None

    def apply(self, row: Row) -> None:
        raise ZeroDivisionError("thirteen")


def test_a_fault_reaches_its_own_caller_alone(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.PROCESSORS, "failing", f"{__name__}:Failing")
    own = llm.sibling()
    truth = text(own, PROMPTS[0], 1)
    good, bad = own.stream(PROMPTS[0], SAMPLED.but(seed=1)), own.stream(PROMPTS[1], SAMPLED.but(seed=13))
    assert [token for delta in good for token in delta.token_ids] == truth
    with pytest.raises(ZeroDivisionError, match="thirteen"):
        next(bad)
    assert not own.engine.has_work and not own._inboxes


def test_a_stream_that_is_collected_within_a_step_is_aborted_after_it(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    truth, forward = text(llm, PROMPTS[0], 1), llm.runner.forward
    cycle: list[Any] = [llm.stream(PROMPTS[1], SAMPLED)]
    cycle.append(cycle)
    held = [cycle]
    del cycle

    def collecting(*args: Any) -> Any:
        if held:
            held.clear()
            gc.collect()
        return forward(*args)

    monkeypatch.setattr(llm.runner, "forward", collecting)
    assert together([lambda: text(llm, PROMPTS[0], 1)], llm._turns) == [truth]


# ---- Turns


def test_a_task_runs_now_or_right_after_the_turn() -> None:
    turns, found = Turns(), []
    turns.soon(lambda: found.append("now"))
    assert found == ["now"]
    with turns:
        turns.soon(lambda: (found.append("later"), turns.soon(lambda: found.append("nested"))))
        assert found == ["now"]
    assert found == ["now", "later", "nested"]


def test_a_task_runs_after_a_turn_that_raised() -> None:
    turns, found = Turns(), []

    def failing() -> None:
        with turns:
            turns.soon(lambda: found.append("after"))
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert found == ["after"]


def test_a_thread_that_takes_turn_after_turn_lets_the_other_in_between() -> None:
    turns, order, left = Turns(), [], {"a": 50, "b": 50}

    def work(name: str, other: str) -> None:
        while left[name]:
            with turns:
                order.append(name)
                left[name] -= 1
                while left[other] and not turns._gate.locked():
                    sleep(0)  # until the other waits

    together([lambda: work("a", "b"), lambda: work("b", "a")], turns)
    assert order in (["a", "b"] * 50, ["b", "a"] * 50)
