"""The simulator beside the real engine: the same requests at the same times.

The engine reads random prompts and generates a fixed number of tokens, in this process, on one thread, without drafts. Lengths are those
of --trace (columns of Azure's traces), or drawn like them, and shrunk; arrivals are Poisson at --load of the most requests a second that
the simulator finds. What a step takes is measured before, between and after the runs, as `redraft bench profile` does.

--clock cpu counts the processor time of this process and skips the time without work: for a machine that others use too.

Example: scripts/prove simulator smollm2.gguf --trace AzureLLMInferenceTrace_conv.csv
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from redraft import LLM, SamplingParams, registry
from redraft.bench import files, profile
from redraft.bench.load.workload import poisson, read_trace
from redraft.columns import fold
from redraft.core.sequence import Request
from redraft.core.step_cost import Step, StepCost
from redraft.core.tree import F64
from redraft.engine.engine import Engine
from redraft.sim.cluster import Cluster
from redraft.sim.trace import Arrival, requests
from redraft.sim.worker import Worker

LIKE_AZURE = ((6.633, 0.985), (5.019, 0.859))  # mean and deviation of the logarithms of the conversations' tokens, read and written
PERCENTILES = (50, 99)
METRICS = {"ttft": "first token", "itl": "between tokens", "e2el": "whole"}
WITHIN = 0.1  # of the medians
BINS = (1, 2, 5, 17, 65, 257)  # from so many rows on


class Lengths(NamedTuple):
    prompt: int
    output: int


# ---- time


class Clock(Protocol):
    """Seconds since it was made."""

    def now(self) -> float: ...
    def wait(self, until: float) -> None: ...
    def step(self, engine: Engine) -> tuple[Step | None, list[Any]]:
        """One step of the engine."""
        ...


class Wall:
    def __init__(self) -> None:
        self.began = time.perf_counter()

    def now(self) -> float:
        return time.perf_counter() - self.began

    def wait(self, until: float) -> None:
        time.sleep(max(0.0, until - self.now()))

    def step(self, engine: Engine) -> tuple[Step | None, list[Any]]:
        return profile.timed(engine)


class Processor:
    """Processor time of this process; waiting takes none."""

    def __init__(self) -> None:
        self.began = time.process_time()

    def now(self) -> float:
        return time.process_time() - self.began

    def wait(self, until: float) -> None:
        self.began -= max(0.0, until - self.now())

    def step(self, engine: Engine) -> tuple[Step | None, list[Any]]:
        return profile.timed(engine, time.process_time)


class Modelled:
    """A step takes what the cost says, and nothing else takes time. The simulator must then find the same times."""

    def __init__(self, cost: StepCost) -> None:
        self.cost, self.time = cost, 0.0

    def now(self) -> float:
        return self.time

    def wait(self, until: float) -> None:
        self.time = max(self.time, until)

    def step(self, engine: Engine) -> tuple[Step | None, list[Any]]:
        step, events = profile.timed(engine)
        if step is not None:
            step = step._replace(seconds=self.cost.seconds(*step.size))
            self.time += step.seconds
        return step, events


CLOCKS: dict[str, tuple[Callable[[], Clock], Callable[[], float]]] = {
    "wall": (Wall, time.perf_counter),
    "cpu": (Processor, time.process_time),
}


# ---- both sides


@dataclass
class Ran:
    """Values of METRICS in seconds; seconds: from the start to the last token; tokens: of all texts; steps: of the real engine; idle:
    seconds in which it had no work."""

    ttft: F64
    itl: F64
    e2el: F64
    seconds: float
    tokens: int
    steps: list[Step] = field(default_factory=list)
    idle: float = 0.0

    @property
    def between(self) -> float:
        """The share of the time with work that no step took."""
        return 1 - sum(step.seconds for step in self.steps) / (self.seconds - self.idle)

    def at(self, metric: str, percent: float) -> float:
        return float(np.percentile(getattr(self, metric), percent))


def real(llm: LLM, lengths: Seq[Lengths], due: Seq[float], clock: Clock, seed: int = 0) -> Ran:
    """The engine serves all requests, each from its due time on."""
    engine, draw = llm.engine, np.random.default_rng(seed)
    asked = [
        Request(str(i), draw.integers(0, llm.runner.spec.vocab, one.prompt).tolist(), _params(one.output)) for i, one in enumerate(lengths)
    ]
    engine.table.forget()  # else a second run would find the prompts of the first
    times: list[list[float]] = [[] for _ in lengths]
    steps, sent, idle = [], 0, 0.0
    while sent < len(due) or engine.has_work:
        while sent < len(due) and due[sent] <= clock.now():
            engine.add(asked[sent])
            sent += 1
        if not engine.has_work:
            before = clock.now()
            clock.wait(due[sent])
            idle += clock.now() - before
            continue
        step, events = clock.step(engine)
        now = clock.now()
        steps += [] if step is None else [step]
        for event in events:
            times[int(event.request.id)] += [now] * len(event.tokens)
    firsts, lasts = (np.array([own[i] for own in times]) for i in (0, -1))
    gaps = np.concatenate([np.diff(own) for own in times])
    return Ran(firsts - due, gaps, lasts - due, float(lasts.max()), sum(map(len, times)), steps, idle)


def _params(tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, seed=0)


def simulated(llm: LLM, lengths: Seq[Lengths], due: Seq[float], cost: StepCost) -> Ran:
    """The simulator with the same scheduler, memory and requests."""
    worker = Worker(0, cost, llm.engine.scheduler, blocks=llm.engine.memory.blocks, context=llm.max_model_len)
    arrivals = [Arrival(at, *one) for at, one in zip(due, lengths, strict=True)]
    records = Cluster([worker], registry.create("route", "round-robin").open()).run(requests(arrivals))
    arrived, first, end, output = (records.column(name) for name in ("arrived", "first", "end", "output"))
    gaps = np.concatenate([np.repeat(values, counts) for values, counts in records.gaps])
    return Ran(first - arrived, gaps, end - arrived, float(end.max()), int(output.sum()))


# ---- the load


def sizes(trace: Path | None, count: int, shrink: float, longest: int, seed: int) -> list[Lengths]:
    """Lengths in tokens, `shrink` times as short as those of the trace, at least 1 and together at most `longest`."""
    if trace is None:
        draw = random.Random(f"lengths {seed}")
        pairs: list[tuple[float, float]] = [
            (draw.lognormvariate(*LIKE_AZURE[0]), draw.lognormvariate(*LIKE_AZURE[1])) for _ in range(count)
        ]
    else:
        rows = read_trace(trace, count)
        pairs = [(read, written) for _, read, written in (rows * (count // len(rows) + 1))[:count]]
    found = []
    for read, written in pairs:
        output = min(max(1, round(written / shrink)), longest // 2)
        found.append(Lengths(min(max(1, round(read / shrink)), longest - output), output))
    return found


def rate(llm: LLM, lengths: Seq[Lengths], load: float, cost: StepCost) -> float:
    """Requests a second at this share of the most, which all requests at once reach."""
    return load * len(lengths) / simulated(llm, lengths, [0.0] * len(lengths), cost).seconds


# ---- the comparison


@dataclass(frozen=True)
class Line:
    """One percentile of one metric. runs: of the real engine; found: of the simulation with the profile; own: of simulations with the steps
    of each run, which say what the profile's error does not explain."""

    metric: str
    percent: float
    runs: tuple[float, ...]
    found: float
    own: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """Simulated over the median of the runs."""
        return self.found / statistics.median(self.runs)

    @property
    def own_ratio(self) -> float:
        return statistics.median(found / run for found, run in zip(self.own, self.runs, strict=True))

    @property
    def held(self) -> bool:
        if self.percent == 50:
            return abs(self.ratio - 1) <= WITHIN
        return min(self.runs) <= self.found <= max(self.runs)


def lines(runs: Seq[Ran], found: Ran, own: Seq[Ran]) -> list[Line]:
    def values(some: Seq[Ran], metric: str, percent: float) -> tuple[float, ...]:
        return tuple(one.at(metric, percent) for one in some)

    every = [(metric, percent) for metric in METRICS for percent in PERCENTILES]
    return [Line(*which, values(runs, *which), found.at(*which), values(own, *which)) for which in every]


def table(compared: Seq[Line]) -> Iterator[str]:
    yield f"{'ms':<22}{'real':>9}{'smallest':>9}{'largest':>9}{'simulated':>11}{'ratio':>7}{'own':>7}"
    for line in compared:
        shown = "".join(f"{1000 * value:>{width}.1f}" for value, width in zip(_spread(line.runs), (9, 9, 9), strict=True))
        name, mark = f"{METRICS[line.metric]}, {'median' if line.percent == 50 else f'P{line.percent}'}", "" if line.held else "  out"
        yield f"{name:<22}{shown}{1000 * line.found:>11.1f}{line.ratio:>7.3f}{line.own_ratio:>7.3f}{mark}"


def _spread(runs: Seq[float]) -> tuple[float, float, float]:
    return statistics.median(runs), min(runs), max(runs)


def terms(runs: Seq[Ran], cost: StepCost) -> Iterator[str]:
    """Where the cost is wrong: predicted over measured seconds of the real steps, by rows, and by whether the step had prompts."""
    steps = [step for run in runs for step in run.steps]
    total = sum(step.seconds for step in steps)
    yield f"{'rows of a step':<20}{'steps':>9}{'of the time':>12}{'predicted':>11}{'error P50':>11}{'P95':>7}"
    groups = {f"{low} to {high - 1}" if high else f"{low} or more": (low, high or 1 << 30) for low, high in zip(BINS, (*BINS[1:], None))}
    chosen = {name: [step for step in steps if low <= step.size.rows < high] for name, (low, high) in groups.items()}
    chosen["decoding alone"] = [step for step in steps if step.size.rows == step.size.texts]
    chosen["with prompts"] = [step for step in steps if step.size.rows > step.size.texts]
    chosen["all"] = steps
    for name, own in chosen.items():
        if own:
            measured, errors = sum(step.seconds for step in own), np.abs(cost.errors(own))
            ratio = sum(cost.seconds(*step.size) for step in own) / measured
            middle, high = np.percentile(errors, (50, 95))
            yield f"{name:<20}{len(own):>9}{measured / total:>12.1%}{ratio:>11.3f}{middle:>11.1%}{high:>7.1%}"


def verdict(runs: Seq[Ran], found: Ran, compared: Seq[Line]) -> bool:
    """Whether the medians are close and all sides wrote the same number of tokens."""
    return all(line.held for line in compared if line.percent == 50) and {run.tokens for run in runs} == {found.tokens}


def report(
    model: str,
    given: argparse.Namespace,
    lengths: Seq[Lengths],
    every: float,
    runs: Seq[Ran],
    found: Ran,
    compared: Seq[Line],
    cost: StepCost,
) -> Iterator[str]:
    read, written = (sum(values) for values in zip(*lengths, strict=True))
    fit = cost.about["fit"]
    yield from fold(
        f"{model}, 1 thread, {given.scheduler}; {len(lengths)} requests, {read} tokens read and {written} written, {every:.2f} requests a "
        f"second, {given.load:.0%} of the most; {len(runs)} runs, {given.clock} time",
        80,
    )
    yield f"profile: error {fit['median_error']:.1%} (median), {fit['p95_error']:.1%} (P95) for steps left out of the fit"
    yield from ("", *table(compared), "own: the ratio with the steps of each run in place of the profile", "", *terms(runs, cost), "")
    idle, between = (statistics.median(values) for values in zip(*((run.idle / run.seconds, run.between) for run in runs), strict=True))
    yield f"without work {idle:.1%} of the time, between steps {between:.1%} of the rest"
    yield f"tokens of the runs {', '.join(str(run.tokens) for run in runs)}, of the simulation {found.tokens}"
    medians = "held" if all(line.held for line in compared if line.percent == 50) else "MISSED"
    yield f"medians within {WITHIN:.0%}: {medians}"
    tails = [f"{METRICS[line.metric]} {line.ratio:.3f}" for line in compared if line.percent != 50 and not line.held]
    yield f"P99 within the runs: {', '.join(tails) or 'held'}"


def document(lengths: Seq[Lengths], due: Seq[float], runs: Seq[Ran], compared: Seq[Line], cost: StepCost) -> dict[str, Any]:
    steps = [[[*step.size, step.seconds] for step in run.steps] for run in runs]
    return {
        "cost": cost.document(),
        "requests": [[at, *one] for at, one in zip(due, lengths)],
        "compared": [dataclasses.asdict(one) for one in compared],
        "steps": steps,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--trace", type=Path, help="a CSV file of lengths; else they are drawn like Azure's conversations")
    parser.add_argument("--shrink", type=float, default=20.0, help="how many times shorter prompts and outputs are")
    parser.add_argument("--load", type=float, default=0.65)
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    parser.add_argument("--rounds", type=int, default=2, help="of the profile before the first run; each run is followed by one")
    parser.add_argument("--quick", action="store_true", help="a small profile")
    parser.add_argument("--scheduler", default="sarathi")
    parser.add_argument("--token-budget", type=int, default=512)
    parser.add_argument("--max-seqs", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write all steps and figures to this file")
    given = parser.parse_args()
    if given.json is not None:
        files.check_writable(given.json)

    schedule = {"scheduler": given.scheduler, "token_budget": given.token_budget, "max_seqs": given.max_seqs}
    llm = LLM(given.model, draft="none", threads=1, **schedule)
    lengths = sizes(given.trace, given.requests, given.shrink, llm.max_model_len, given.seed)
    make, seconds = CLOCKS[given.clock]

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    options = profile.ProfileOptions.of(given.quick, given.rounds, given.seed)
    measured = profile.measure(llm, profile.plan(llm, options), options.rounds, lambda what: None, seconds)
    cost = measured.fit(profile.about(llm))
    every = rate(llm, lengths, given.load, cost)
    due = poisson(len(lengths), every, given.seed)
    say(f"{len(lengths)} requests, {every:.2f} a second, {due[-1]:.0f} s a run")
    runs = []
    for number in range(given.runs):
        runs.append(real(llm, lengths, due, make(), given.seed))
        say(f"run {number + 1} of {given.runs}: {runs[-1].seconds:.1f} s, first token {1000 * runs[-1].at('ttft', 50):.1f} ms")
        profile.add_round(llm.engine, measured, lambda what: None, seconds)
    cost = measured.fit(profile.about(llm))
    found = simulated(llm, lengths, due, cost)
    compared = lines(runs, found, [simulated(llm, lengths, due, StepCost.fit(run.steps)) for run in runs])

    for line in report(llm.name, given, lengths, every, runs, found, compared, cost):
        print(line)
    if given.json is not None:
        files.write(given.json, document(lengths, due, runs, compared, cost))
    return 0 if verdict(runs, found, compared) else 1


if __name__ == "__main__":
    sys.exit(main())
