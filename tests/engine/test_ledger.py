"""Two engines with hardly any memory, and requests that change from one to the other in any order of events, with copies that fail, aborts
and deaths: no page is lost or owned twice, nothing waits for ever, and each text is the one that a single engine gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from random import Random
from typing import Any

import numpy as np
import pytest

from redraft import registry
from redraft.config import SamplingParams
from redraft.core.sequence import Request, Space
from redraft.engine.engine import Engine
from redraft.engine.output import Event
from redraft.engine.parcel import Parcel
from redraft.errors import Unsupported
from tests.contracts import identity
from tests.contracts.drafters import RandomTrees
from tests.contracts.identity import prompts
from tests.contracts.plain import VOCAB
from tests.engine.test_resume import Received

POLICIES: list[dict[str, str]] = [
    {}, {}, {}, {"codec": "int8"}, {"codec": "int4:block=32"}, {"keep": "streaming-llm:sinks=2,recent=14"},
    {"keep": "scissorhands:budget=32,recent=4,sinks=1"},
    {"read": "page-top-k:tokens=64,sinks=0"}, {"depth": "layer-skip:speedup=2"}, {"codec": "int8", "read": "page-top-k:tokens=64,sinks=0"},
]  # fmt: skip
DRAFTERS: list[str | Callable[..., Any]] = ["none", "token-recycling", lambda runner, sampler: RandomTrees(VOCAB, seed=1)]
MOST_STEPS = 4000


def made(drafter: Any, pool: int, chunk: int) -> Engine:
    return identity.engine(drafter, pool=pool, chunk=chunk, max_seqs=4 if chunk >= 4 else chunk, layers=4)


def asked(dice: Random, name: str) -> Request:
    params = SamplingParams(
        temperature=dice.choice([0, 0.8, 1.5]), max_tokens=dice.choice([1, 2, 7, 20]), n=dice.choice([1, 1, 1, 2, 3]),
        seed=dice.randrange(4), **dice.choice(POLICIES),
    )  # fmt: skip
    return Request(name, list(dice.choice([*prompts(), *prompts()[:2], *prompts()[:2]])), params)


@cache
def expected(prompt: tuple[int, ...], chosen: str) -> list[list[int]]:
    """The texts of one engine with enough memory. chosen: the parameters as JSON."""
    params = SamplingParams.model_validate_json(chosen)
    engine, received = made("none", 40, 512), Received(params.n)
    engine.add(Request("whole", list(prompt), params))
    while engine.has_work:
        received.take(engine.step())
    return received.tokens


@dataclass
class Front:
    """Requests and what was received of them. Two engines and the messages between them, which are delivered later, in any order."""

    dice: Random
    first: Engine
    second: Engine
    faults: float
    open: dict[str, Received] = field(default_factory=dict)
    asked: dict[str, Request] = field(default_factory=dict)
    messages: list[Callable[[], None]] = field(default_factory=list)
    tries: dict[str, int] = field(default_factory=dict)
    done: int = 0
    made: int = 0

    def add(self) -> None:
        request = asked(self.dice, f"r{self.made}")
        self.made += 1
        self.open[request.id], self.tries[request.id] = Received(request.params.n), 0
        self.asked[request.id] = request
        self.first.add(request, parks=True)

    def step(self, engine: Engine) -> None:
        for event in engine.step():
            self.take(event)
        if engine is self.first:
            self.messages += [lambda name=name: self.give(name) for name in engine.ready()]  # type: ignore[misc]
        else:
            self.messages += [lambda name=name: self.first.forget(name) for name in engine.settled()]  # type: ignore[misc]

    def take(self, event: Event) -> None:
        name = event.request.id.partition(".")[0]
        assert event.error is None, repr(event.error)
        received = self.open[name]
        received.take([event])
        if all(received.ended):
            asked = self.asked[name]
            assert received.tokens == expected(tuple(asked.prompt), asked.params.model_dump_json()), f"{name}: {asked.params}"
            del self.open[name]
            self.done += 1

    def give(self, name: str) -> None:
        """Unless it was aborted or began again meanwhile."""
        if name.partition(".")[0] not in self.open or name != self.id(name.partition(".")[0]):
            return
        parcel = self.first.release(name)
        self.second.adopt(Parcel.of(parcel.request, json.loads(json.dumps(parcel.numbers()))), self)

    def read(self, space: Space, pages: np.ndarray) -> Any:
        """The memory of the first engine, as a source that may fail."""
        if self.dice.random() < self.faults:
            if self.dice.random() < 0.5:
                raise ConnectionResetError("the other side ended")
            pages = np.roll(pages, 1) if len(set(pages)) > 1 else (pages + 1) % self.first.memory.blocks
        return self.first.memory.read(space, pages)

    def abort(self) -> None:
        if self.open:
            name = self.dice.choice(list(self.open))
            del self.open[name]
            self.done += 1
            self.stop(name)

    def restart(self) -> None:
        """A request begins again where it began, with what was received of it, as after the death of an engine."""
        if self.open and self.tries[name := self.dice.choice(list(self.open))] < 2:
            self.stop(name)
            self.tries[name] += 1
            asked, received = self.asked[name], self.open[name]
            progress = received.progress if any(received.tokens) else ()
            self.first.add(Request(self.id(name), list(asked.prompt), asked.params), progress, parks=True)

    def stop(self, name: str) -> None:
        self.first.abort(self.id(name))
        self.second.abort(self.id(name))

    def id(self, name: str) -> str:
        """Of its current life."""
        return f"{name}.{self.tries[name]}" if self.tries[name] else name

    def deliver(self) -> None:
        if self.messages:
            self.messages.pop(self.dice.randrange(len(self.messages)))()

    def check(self) -> None:
        for engine in (self.first, self.second):
            engine.memory.check()

    def finish(self) -> None:
        for _ in range(MOST_STEPS):
            if not self.open and not self.messages:
                break
            self.step(self.first)
            self.step(self.second)
            for _ in range(len(self.messages)):
                self.deliver()
            self.check()
        assert not self.open, f"no progress: {len(self.first.waiting)} and {len(self.second.waiting)} texts wait"
        for engine in (self.first, self.second):
            assert engine.memory.used() == 0 and not engine.has_work and not len(engine.outputs)
            assert not engine.departures.parked and not engine.arrivals.awaited


def run(seed: int, events: int = 90) -> Front:
    dice = Random(seed)
    pools = dice.choice([(4, 4), (4, 9), (9, 4), (12, 12)])
    engines = [made(dice.choice(DRAFTERS), pool, dice.choice([7, 40, 512])) for pool in pools]
    front = Front(dice, *engines, faults=dice.choice([0.0, 0.3, 1.0]))
    for _ in range(events):
        kind = dice.random()
        if kind < 0.12:
            front.add()
        elif kind < 0.47:
            front.step(front.first)
        elif kind < 0.77:
            front.step(front.second)
        elif kind < 0.94:
            front.deliver()
        elif kind < 0.97:
            front.abort()
        else:
            front.restart()
        front.check()
    front.finish()
    assert front.done == front.made
    return front


def test_what_arrives_does_not_take_pages_that_others_match() -> None:
    """Both are admitted in one step, and the pages that the second one matches are the longest idle."""
    first, second = made("none", 12, 512), made("none", 5, 512)
    shared, other, moved = [1] * 65, [2] * 65, [3] * 40
    params, received = SamplingParams(temperature=0, max_tokens=4), {name: Received(1) for name in ("a", "b", "moved", "again")}

    def run(engine: Engine) -> None:
        while engine.has_work:
            for event in engine.step():
                received[event.request.id].take([event])

    for name, prompt in (("a", shared), ("b", other)):
        second.add(Request(name, prompt, params))
        run(second)
    assert second.memory.used() == 0 and len(second.table.prefix.idle) == 4
    first.add(Request("moved", moved, params), parks=True)
    run(first)
    second.adopt(first.release("moved"), first.memory)
    second.add(again := Request("again", shared, params))
    second.scheduler = replace(second.scheduler, watermark=0.0)
    run(second)
    assert again.cached_tokens == 64 and second.arrivals.copied == 40 and received["again"].tokens == received["a"].tokens
    assert received["moved"].tokens == expected(tuple(moved), params.model_dump_json())


def test_the_last_running_text_waits_while_parked_ones_hold_memory() -> None:
    """A prompt of one token forks before its first step, which the plan of that step does not know yet."""
    engine, received = made("none", 4, 512), {"a": Received(1), "n": Received(2), "b": Received(1)}

    def step() -> None:
        for event in engine.step():
            received[event.request.id].take([event])
        engine.memory.check()

    params = SamplingParams(temperature=0, max_tokens=4)
    engine.add(Request("a", [1] * 20, params), parks=True)
    step()
    engine.add(Request("n", [1], params.but(n=2)), parks=True)
    step()
    engine.add(Request("b", [1] * 45, params), parks=True)
    for _ in range(4):
        step()
    assert engine.ready() == ["a", "b", "n"] and engine.memory.available() == 0
    assert [len(one.tokens) for one in engine.release("n").progress] == [1, 0]


@pytest.mark.parametrize("seed", range(6))
def test_any_order_of_events(seed: int) -> None:
    run(seed)


def test_the_events_reach_all_cases() -> None:
    fronts = [run(seed) for seed in (100, 105, 106, 109, 111)]
    assert sum(front.second.arrivals.copied for front in fronts) > 100
    assert sum(front.second.arrivals.found for front in fronts) > 0
    assert sum(front.second.arrivals.lost for front in fronts) > 2
    assert sum(front.first.preemptions + front.second.preemptions for front in fronts) > 0


def test_methods_of_the_cases_exist() -> None:
    for policies in POLICIES:
        for seam, text in policies.items():
            registry.create(seam, text)
        try:
            made("none", 40, 512).policies.check(SamplingParams(**policies))
        except Unsupported as error:
            raise AssertionError(f"{policies}: {error}") from None
