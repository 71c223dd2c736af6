"""The cost of a step: real engine steps of many sizes, and the fit of `StepCost` to them.

Each case runs a few steps of the engine, from prompts in chunks to decoding texts at several contexts, and mixed. The cached tokens are not
computed: their pages are zeros, which take as long to read. All cases take turns, and a step counts with the median of the rounds, because
other programs disturb single steps. A part of the cases is held out: they say how well the fit predicts.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.text import Text

from redraft.bench import report
from redraft.bench.decode import Tick
from redraft.columns import fold
from redraft.config import SamplingParams
from redraft.core.plan import Accepted, Work
from redraft.core.sequence import Request, Sequence
from redraft.core.step_cost import KNOTS, Size, Step, StepCost
from redraft.core.tree import EMPTY
from redraft.engine.engine import Engine
from redraft.engine.output import Event, checked
from redraft.errors import InvalidInput
from redraft.llm import LLM

CONTEXTS = (0, 512, 2048)
DECODED = 3  # steps of a case without prompts
HELD_OUT = 5  # one case in so many is not used for the fit that is judged
SHORTEST = (
    8  # rows of a measured prompt: to admit a shorter one takes longer than its rows, and so few rows are nearly always decoding texts
)
COLUMNS = 9  # numbers of rows in a line
Clock = Callable[[], float]  # seconds
SALT = "\0profile"  # no request of a user shares these pages


class Case(NamedTuple):
    """texts: that decode, each with `context` cached tokens; prompts: that are read beside them, each with `before` cached tokens and
    `chunk` others."""

    texts: int = 0
    context: int = 0
    prompts: int = 0
    before: int = 0
    chunk: int = 0

    @property
    def rows(self) -> int:
        return self.texts + self.prompts * self.chunk

    @property
    def tokens(self) -> int:
        """Of the cache."""
        return self.texts * (self.context + 2 + DECODED) + self.prompts * (self.before + self.chunk + 1)

    @property
    def longest(self) -> int:
        return max(self.context + 2 + DECODED, self.before + self.chunk + 1)


@dataclass(frozen=True)
class ProfileOptions:
    """rounds: of all cases; most: cached tokens of a step; mixed: cases of prompts beside decoding texts; seed: they are drawn from it."""

    rounds: int = 5
    most: int = 16384
    mixed: int = 40
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in (("rounds", self.rounds), ("most", self.most)):
            if value < 1:
                raise InvalidInput(f"{name} = {value}: must be 1 or more")

    @classmethod
    def of(cls, quick: bool, rounds: int | None, seed: int) -> ProfileOptions:
        """quick: fewer and smaller cases in fewer rounds; rounds: None for the usual number."""
        made = cls(rounds=3, most=2048, mixed=8, seed=seed) if quick else cls(seed=seed)
        return made if rounds is None else replace(made, rounds=rounds)


@dataclass
class Profile:
    """The steps of each case, a list for each round."""

    cases: list[Case]
    steps: dict[Case, list[list[Step]]] = field(default_factory=dict)

    def typical(self, cases: Seq[Case]) -> list[Step]:
        """Of each step the median of the rounds."""
        found = []
        for case in cases:
            for rounds in zip(*self.steps[case], strict=True):
                found.append(Step(rounds[0].size, median(step.seconds for step in rounds)))
        return found

    def fit(self, about: dict[str, Any]) -> StepCost:
        """From all steps. It adds to `about` how well a fit without some cases predicts their steps."""
        every, out = self.typical(self.cases), self.typical(self.cases[::HELD_OUT])
        rest = StepCost.fit(self.typical([case for i, case in enumerate(self.cases) if i % HELD_OUT]) or every)
        errors = np.abs(rest.errors(out))
        median_error, p95_error = np.percentile(errors, (50, 95)).tolist()
        fit = {"steps": len(every), "held_out": len(out), "median_error": median_error, "p95_error": p95_error}
        return StepCost.fit(every, about | {"fit": fit})


# ---- the cases


def cases(options: ProfileOptions, budget: int, max_seqs: int, longest: int, blocks: int) -> list[Case]:
    """Those that fit: `budget` rows and `max_seqs` texts in a step, `longest` tokens in a text, `blocks` blocks in the pool. In an order
    drawn at random, so that those that are held out are of all kinds."""
    draw = random.Random(f"cases {options.seed}")
    counts = sorted({n for n in KNOTS if n <= max_seqs} | {max_seqs})
    chunks = sorted({n for n in KNOTS if n <= budget} | {budget})
    found = [Case(texts=n, context=context) for n in counts for context in (32, *CONTEXTS[1:])]
    found += [Case(prompts=1, before=context, chunk=n) for n in chunks if n >= SHORTEST for context in CONTEXTS]
    found += [Case(prompts=n, chunk=chunk) for n in counts[1:] for chunk in (8, 32, 128)]
    for _ in range(options.mixed):
        texts = round(2 ** draw.uniform(0, math.log2(max(2, max_seqs - 1))))
        chunk = round(2 ** draw.uniform(3, math.log2(max(9, budget - texts))))
        context, before = (32 * round(2 ** draw.uniform(0, 6)) for _ in range(2))
        found.append(Case(texts, context, 1, before if draw.random() < 0.5 else 0, chunk))
    found = [
        case
        for case in dict.fromkeys(found)
        if case.rows <= budget
        and case.texts + case.prompts <= max_seqs
        and case.tokens <= options.most
        and case.longest <= longest
        and case.tokens + 64 * (case.texts + case.prompts) <= blocks * 16
    ]
    draw.shuffle(found)
    return found


# ---- the engine


def timed(engine: Engine, clock: Clock = perf_counter) -> tuple[Step | None, list[Event]]:
    """One step of the engine: what it was, None if there was nothing to run, and its events. What a step raises is raised."""
    began = clock()
    begun = engine.begin()
    if begun is None:
        return None, checked(engine.emit())
    events = engine.end(begun, engine.runner.forward(begun.batch, begun.taps))
    seconds = clock() - began
    return Step(Size.of(begun.batch), seconds), checked(events)


def plan(llm: LLM, options: ProfileOptions) -> list[Case]:
    """The cases that fit into the engine's steps, context and memory. InvalidInput if there are none."""
    schedule, blocks = llm.engine.scheduler, llm.engine.memory.blocks
    found = cases(options, schedule.token_budget, schedule.max_seqs, llm.max_model_len, blocks)
    if not found:
        raise InvalidInput(f"cache_memory: {blocks} blocks are too few for any step to measure")
    return found


def measure(llm: LLM, planned: list[Case], rounds: int, tick: Tick, clock: Clock = perf_counter) -> Profile:
    """Runs all cases in turns. `llm` must share prefixes and have no drafter."""
    profile = Profile(planned)
    run(llm.engine, planned[0], 0, clock)  # the first step of a process takes longer
    for _ in range(rounds):
        add_round(llm.engine, profile, tick, clock)
    return profile


def add_round(engine: Engine, profile: Profile, tick: Tick, clock: Clock = perf_counter) -> None:
    for case in profile.cases:
        own = profile.steps.setdefault(case, [])
        own.append(run(engine, case, len(own), clock))
        tick(f"{case.rows} rows")


def run(engine: Engine, case: Case, number: int, clock: Clock = perf_counter) -> list[Step]:
    """The measured steps of a case. number: of the round; no two rounds have the same new tokens."""
    draw = np.random.default_rng([number, *case])
    steps: list[Step | None] = []
    texts = [_prompt(engine, draw, case.context, 1) for _ in range(case.texts)]
    prompts = [_prompt(engine, draw, case.before, case.chunk) for _ in range(case.prompts)]
    for i, prompt in enumerate(texts):
        engine.add(_request(f"text {i}", prompt, 1 + (1 if prompts else DECODED)))
    if texts:
        timed(engine)  # their admission
    for i, prompt in enumerate(prompts):
        engine.add(_request(f"prompt {i}", prompt, 1))
    while engine.has_work:
        steps.append(timed(engine, clock)[0])
    engine.table.forget()
    return [step for step in steps if step is not None]


def _request(name: str, prompt: list[int], tokens: int) -> Request:
    return Request(name, prompt, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True), salt=SALT)


def _prompt(engine: Engine, draw: np.random.Generator, cached: int, rest: int) -> list[int]:
    """Random tokens, of which the first `cached` are in the prefix cache."""
    tokens: list[int] = draw.integers(0, engine.runner.spec.vocab, cached + rest).tolist()
    if cached:
        request = Request("", tokens, SamplingParams(temperature=0, max_tokens=1), salt=SALT)
        seq, memory = Sequence(-1, request, 0, list(tokens), len(tokens), 0, len(tokens)), engine.memory
        memory.open(seq)
        try:
            work = [Work(seq, cached)]
            memory.reserve(work, [EMPTY])
            memory.commit(work, [Accepted()])
            memory.publish(seq)
        finally:
            memory.free(seq)
    return tokens


def about(llm: LLM) -> dict[str, Any]:
    """What was measured and where."""
    backend, machine = llm.runner.backend, report.hardware()
    return {
        "model": llm.name,
        "quant": llm.config.model.quant,
        "dtype": str(backend.dtype),
        "backend": backend.name,
        "device": str(backend.device),
        "threads": backend.threads,
        "cpu": machine["cpu"],
        "cores": machine["cores"],
        "kernels": machine["kernels"],
        "gpu": machine["gpu"],
        "commit": report.commit(),
    }


def show(console: Console, cost: StepCost) -> None:
    """The terms, and how well they predict."""
    what, fit = cost.about, cost.about["fit"]
    quant = f", weights {what['quant']}" if what["quant"] else ""
    _print(console, f"{what['model']}, {what['dtype']}{quant}, {what['backend']} backend, {_count(what['threads'], 'thread')}", "bold")
    _print(console, f"{what['gpu'] or what['cpu']}, {_count(what['cores'], 'core')}", "bold")
    pairs = list(zip(cost.rows, cost.times, strict=True))
    for some in (pairs[at : at + COLUMNS] for at in range(0, len(pairs), COLUMNS)):
        _print(console, "")
        _print(console, "rows" + "".join(f"{rows:8}" for rows, _ in some))
        _print(console, "ms  " + "".join(f"{_ms(seconds):>8}" for _, seconds in some))
    _print(console, "")
    for count, seconds in (("a text", cost.text), ("1000 pairs of a row and a token that it sees", 1000 * cost.cell)):
        _print(console, f"- {count}: {_ms(seconds)} ms")
    _print(console, f"- 1000 tokens that are read: {_ms(1000 * cost.token)} ms")
    errors = f"median {fit['median_error']:.1%}, P95 {fit['p95_error']:.1%}"
    _print(console, f"- error for {_count(fit['held_out'], 'step')} that were left out of the fit: {errors}")


def _print(console: Console, text: str, style: str = "") -> None:
    for line in fold(text, console.width) or [""]:
        console.print(Text(line, style=style), soft_wrap=True)


def _ms(seconds: float) -> str:
    """Three digits, or all of a whole number.

    >>> [_ms(one) for one in (0.0134, 0.3071, 0.9999, 1.88)]
    ['13.4', '307', '1000', '1880']
    """
    return f"{1000 * seconds:.3g}" if seconds < 0.9995 else f"{1000 * seconds:.0f}"


def _count(number: int, unit: str) -> str:
    return f"{number} {unit}{'s' * (number != 1)}"
