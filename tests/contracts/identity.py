"""The engine's tokens against plain.py's, for one condition: drafter, chunks, batch, pool, lanes, sampling."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache, partial
from random import Random
from typing import cast

import numpy as np

from redraft import registry
from redraft.config import SamplingParams
from redraft.core.sequence import CachePlan, Lanes, Request
from redraft.draft.drafter import OpenDrafter
from redraft.draft.second import SecondModel, SecondModelDrafter
from redraft.engine.engine import Engine
from redraft.engine.output import Event, checked
from redraft.errors import InvalidInput
from redraft.models.runner import Runner
from redraft.ops.arrays import array
from redraft.ops.backend import Linear
from redraft.sample.sampler import Sampler
from redraft.sched.scheduler import Scheduler
from tests.arrays import QUICK, placed
from tests.contracts import plain
from tests.contracts.drafters import FullFanOut, RandomTrees

SAMPLING = {
    "greedy": SamplingParams(temperature=0, max_tokens=26),
    "sampled": SamplingParams(temperature=0.8, max_tokens=26),
    "filtered": SamplingParams(temperature=0.8, top_p=0.9, repetition_penalty=1.1, max_tokens=26),
}

DEEPER = {"del": 3, "s2d": 3, "self-skip": 3, "swift": 3}  # layers of the tiny model for drafters that need more than 2

Opener = Callable[[Runner, Sampler], OpenDrafter]


class Different(AssertionError):
    """A token differs from the definition. A planted fault must cause this."""


@dataclass(frozen=True)
class Condition:
    """`chunk`: rows a step; `arrivals`: the step before which each request comes; `pool`: blocks; `lanes`: of each request."""

    drafter: str = "none"
    sampling: str = "greedy"
    backend: str = QUICK
    chunk: int = 512
    arrivals: tuple[int, ...] = (0,)
    pool: int = 40
    lanes: tuple[Lanes, ...] = (Lanes.SHARED,)
    window: int | None = None
    sharing: bool = True
    scheduler: str = "sarathi"

    def __str__(self) -> str:
        kinds = "+".join(kind.value for kind in self.lanes)
        mix = "alone" if len(self.arrivals) == 1 else f"{len(self.arrivals)} requests"
        window = f" window {self.window}" if self.window else ""
        rules = f"{self.backend} {self.drafter} {self.sampling} {self.scheduler}"
        return f"{rules} chunk {self.chunk} {mix} pool {self.pool} {kinds}{window}"


@dataclass
class Run:
    """Events of a run. A condition that never reaches the case that it is about proves nothing."""

    texts: dict[str, list[int]] = field(default_factory=dict)
    accepted: int = 0
    rejected: int = 0
    preempted: int = 0
    cached: int = 0
    steps: int = 0


@lru_cache
def prompts() -> tuple[tuple[int, ...], ...]:
    """Several lengths around the page size of 32. The second prompt shares more than a page with the first; the last is one token."""
    dice = Random(5)

    def some(n: int) -> tuple[int, ...]:
        return tuple(dice.randrange(plain.VOCAB) for _ in range(n))

    first = some(45)
    return first, first[:38] + some(3), some(29), some(20), some(32), some(1)


@cache
def expected(window: int | None, prompt: tuple[int, ...], sampling: str, seed: int, layers: int = 2) -> tuple[int, ...]:
    return tuple(plain.generate(*plain.tiny(window, layers=layers), prompt, SAMPLING[sampling], seed=seed))


def engine(
    drafter: OpenDrafter | str | Opener = "none", *, backend: str = QUICK, window: int | None = None, pool: int = 40,
    sharing: bool = True, scheduler: str = "sarathi", chunk: int = 512, max_seqs: int | None = None, layers: int = 2, **options: object
) -> Engine:  # fmt: skip
    """An engine with the tiny model, float64. drafter: an opened drafter, a registered name, or a function that opens one."""
    spec, weights = plain.tiny(window, layers=layers)
    own = registry.backend(backend)("float64")
    runner = Runner(spec, placed(own, weights), own, pool, sharing=sharing)
    verifier = registry.create("verify", str(options.pop("verify", "coupled")))
    sampler = Sampler(spec.vocab, frozenset(options.get("eos", ())), drafts=verifier.drafts)  # type: ignore[call-overload]
    if isinstance(drafter, str):
        drafter = partial(opened_by_name, drafter)
    opened = drafter(runner, sampler) if callable(drafter) else drafter
    budgets = {"token_budget": chunk, "max_seqs": max_seqs or min(8, chunk), "draft_rows": 80, "draft_total": 160}
    made = registry.create("sched", scheduler, **budgets)
    return Engine(runner, made, opened, verifier, sampler, **{"max_model_len": 128, **options})  # type: ignore[arg-type]


def preempts(scheduler: str) -> bool:
    """Whether texts of this scheduler run out of memory in a small pool. One that reserves the memory that texts will need has none."""
    return registry.method("sched", scheduler).reserve is Scheduler.reserve


def complete(seam: str, name: str) -> bool:
    """Whether a registered method can be used without options. A wrapper needs the option that names its inner method."""
    try:
        registry.create(seam, name)
    except InvalidInput:
        return False
    return True


def opened_by_name(name: str, runner: Runner, sampler: Sampler) -> OpenDrafter:
    """A registered drafter. Its second model, if any, is the tiny target with a slightly changed head."""
    made = registry.create("draft", name)
    return second(made, runner, sampler) if isinstance(made, SecondModel) else cast(OpenDrafter, made.open(runner, sampler))


def second(
    made: SecondModel, runner: Runner, sampler: Sampler, *, off: float = 0.4, blocks: int | None = None, context: int = 256
) -> SecondModelDrafter:
    head = array(runner.weights.head.weight)
    noise = np.random.default_rng(3).standard_normal(head.shape)
    weights = replace(runner.weights, head=Linear(runner.backend.place(head + off * head.std() * noise)))
    spec = replace(runner.spec, context=context)
    return SecondModelDrafter(
        made,
        Runner(spec, weights, runner.backend, blocks or runner.memory.blocks, sharing=runner.memory.paged.table.sharing),
        sampler,
    )


def drafter(name: str, known: dict[tuple[str, int], Seq[int]]) -> OpenDrafter | str:
    match name:
        case "random":
            return RandomTrees(plain.VOCAB, seed=1)
        case "oracle":
            return RandomTrees(plain.VOCAB, seed=2, right=0.8, known=known)
        case "fan-out":
            return FullFanOut(plain.VOCAB)
    return name


def drive(engine: Engine, requests: Seq[Request], arrivals: Seq[int], *, check: bool = True) -> Run:
    """Steps until all requests are finished. Each request is added before its step in `arrivals`."""
    memories = [engine.memory]
    if isinstance(engine.drafter.own.drafter, SecondModelDrafter):
        memories.append(engine.drafter.own.drafter.memory)
    seen, waiting = Run(), sorted(zip(arrivals, range(len(requests)), requests, strict=True))
    while waiting or engine.has_work:
        while waiting and (waiting[0][0] <= seen.steps or not engine.has_work):
            engine.add(waiting.pop(0)[2])
        events = checked(engine.step())
        seen.steps += 1
        assert seen.steps < 5000, "the engine makes no progress"
        if check:
            for memory in memories:
                memory.check()
        for event in events:
            _note(seen, event)
    seen.preempted = engine.preemptions
    seen.cached = sum(request.cached_tokens for request in requests)
    if check:
        for memory in memories:
            memory.check()
            assert memory.used() == 0, "pages are held after the last text"
        assert not engine.outputs
    return seen


def _note(seen: Run, event: Event) -> None:
    name = event.request.id if event.request.params.n == 1 else f"{event.request.id}/{event.index}"
    seen.texts.setdefault(name, []).extend(event.tokens)
    assert not event.stats.fault, f"{name}: {event.stats.fault}"
    if event.reason is not None:
        seen.accepted += event.stats.accepted
        seen.rejected += event.stats.drafted - event.stats.accepted


def check(condition: Condition, *, strict: bool = True) -> Run:
    """Runs a condition. Raises Different if a token differs from the definition. strict: check the table after each step."""
    chosen = [prompts()[i % len(prompts())] for i in range(len(condition.arrivals))]
    layers = DEEPER.get(condition.drafter, 2)
    truth = {str(i): list(expected(condition.window, prompt, condition.sampling, 100 + i, layers)) for i, prompt in enumerate(chosen)}
    requests = [Request(str(i), list(prompt), SAMPLING[condition.sampling].but(seed=100 + i)) for i, prompt in enumerate(chosen)]
    made = engine(
        drafter(condition.drafter, {(name, 0): text for name, text in truth.items()}), backend=condition.backend,
        window=condition.window, pool=condition.pool, sharing=condition.sharing, chunk=condition.chunk, scheduler=condition.scheduler,
        layers=layers,
    )  # fmt: skip
    add = made.add

    def add_with_lanes(request: Request) -> None:  # only policies choose lanes, and no policy needs these yet
        add(request)
        made.waiting[-1].cache = CachePlan(lanes=condition.lanes[int(request.id) % len(condition.lanes)])

    made.add = add_with_lanes  # type: ignore[method-assign]
    seen = drive(made, requests, condition.arrivals, check=strict)
    for name, text in truth.items():
        if seen.texts[name] != text:
            at = next((i for i, (a, b) in enumerate(zip(seen.texts[name], text, strict=False)) if a != b), len(text))
            raise Different(f"{condition}: request {name} token {at}: {seen.texts[name][at : at + 3]} instead of {text[at : at + 3]}")
    return seen
