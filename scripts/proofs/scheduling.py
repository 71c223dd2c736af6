"""Delays under each scheduler on the real engine: time to the first token, and gaps between tokens.

Short and long prompts arrive at random (Poisson) at a share of what the engine can serve. Each round has its own trace, on which the
schedulers take turns; ratios are to the first one, within a round. The clock counts the processor's seconds of this process on one thread,
and jumps to the next arrival when nothing runs, so that other programs on the machine count little. Texts must be equal under all of
them.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from itertools import pairwise
from math import ceil
from statistics import mean, median
from typing import NamedTuple

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from redraft import LLM, SamplingParams
from redraft.core.sequence import Request
from redraft.engine.output import checked

SCHEDULERS = "sarathi", "fcfs", "piggyback:rows=240", "spf:gamma=0", "spf:gamma=15", "spf:gamma=150"
BUDGETS = {"token_budget": 256, "max_seqs": 16}
FIGURES = ("TTFT mean", "short mean", "long mean", "long P99", "gap P99", "gap max")


class Arrival(NamedTuple):
    at: float
    prompt: list[int]
    new: int


@dataclass
class Served:
    """What a text got: its tokens, and when each came, in seconds since the request arrived."""

    prompt: int
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)


def trace(count: int, rate: float, long: int, vocab: int, seed: int) -> list[Arrival]:
    """A fifth of the prompts, one at least, have 3/4 to 4/4 of `long` tokens, the others up to 1/16."""
    dice, at, found = random.Random(seed), 0.0, []
    chosen = dice.sample(range(count), max(1, count // 5))
    for i in range(count):
        at += dice.expovariate(rate)
        length = dice.randint(3 * long // 4, long) if i in chosen else dice.randint(1, max(1, long // 16))
        found.append(Arrival(at, [dice.randrange(vocab) for _ in range(length)], dice.randint(16, 32)))
    return found


def serve(llm: LLM, arrivals: Seq[Arrival]) -> list[Served]:
    """Runs the trace on the model's engine."""
    engine, now, left = llm.engine, 0.0, list(enumerate(arrivals))
    engine.clock = lambda: now
    found = [Served(len(one.prompt)) for one in arrivals]
    while left or engine.has_work:
        if not engine.has_work:
            now = max(now, left[0][1].at)
        while left and left[0][1].at <= now:
            i, one = left.pop(0)
            params = SamplingParams(max_tokens=one.new, ignore_eos=True, seed=i)
            engine.add(Request(str(i), one.prompt, params, arrived=one.at))
        began = time.process_time()
        events = checked(engine.step())
        now += time.process_time() - began
        for event in events:
            served = found[int(event.request.id)]
            served.tokens += event.tokens
            served.times += [now - arrivals[int(event.request.id)].at] * len(event.tokens)
    return found


def figures(served: Seq[Served], long: int) -> dict[str, float]:
    """FIGURES in seconds: times to the first token, of all, short and long prompts, and gaps between the tokens of a text."""
    every = [one.times[0] for one in served]
    short = [one.times[0] for one in served if one.prompt <= long // 2]
    longs = [one.times[0] for one in served if one.prompt > long // 2]
    gaps = [after - before for one in served for before, after in pairwise(one.times)]
    values = mean(every), mean(short), mean(longs), percentile(longs), percentile(gaps), max(gaps)
    return dict(zip(FIGURES, values, strict=True))


def percentile(values: Seq[float], share: float = 0.99) -> float:
    """The smallest value that is not exceeded by `share` of them."""
    return sorted(values)[ceil(share * len(values)) - 1]


def capacity(llm: LLM, long: int, count: int) -> float:
    """Requests per second if all are there at once."""
    served = serve(llm, [one._replace(at=0.0) for one in trace(count, 1.0, long, llm.engine.runner.spec.vocab, seed=99)])
    return count / max(one.times[-1] for one in served)


def table(found: dict[str, list[dict[str, float]]]) -> Table:
    shown = Table(box=SIMPLE, caption="TTFT: time to the first token; gap: between two tokens of a text")
    shown.add_column("seconds, ratio", no_wrap=True)
    for name in FIGURES:
        shown.add_column(name.replace(" ", "\n"))
    first = next(iter(found))
    for name, rounds in found.items():
        ratios = {f: median(one[f] / base[f] for one, base in zip(rounds, found[first], strict=True)) for f in FIGURES}
        shown.add_row(name, *(f"{median(one[f] for one in rounds):.3f}\n{ratios[f]:.2f} x" for f in FIGURES))
    return shown


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="embedded")
    parser.add_argument("--schedulers", nargs="+", default=SCHEDULERS, help="name:option=value; ratios are to the first")
    parser.add_argument("--requests", type=int, default=50, help="of a round")
    parser.add_argument("--long", type=int, default=1024, help="tokens of the longest prompt")
    parser.add_argument("--load", type=float, default=0.8, help="arrivals as a share of what the engine can serve")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()

    sizes = {"max_model_len": options.long + 64, "prefix_sharing": False, "cache_memory": 1 << 30}
    llm = LLM(options.model, draft="none", threads=1, **BUDGETS, **sizes)
    engines = {name: llm.sibling(scheduler=name, **BUDGETS) for name in options.schedulers}
    rate = options.load * capacity(engines[options.schedulers[0]], options.long, 20)
    print(f"{options.model}: {options.requests} requests a round, {rate:.2f} a second, {options.load:.0%} load", flush=True)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in engines}
    differing = 0
    for seed in range(options.rounds):
        arrivals = trace(options.requests, rate, options.long, llm.engine.runner.spec.vocab, seed)
        texts = []
        for name, one in random.Random(seed).sample(sorted(engines.items()), len(engines)):
            served = serve(one, arrivals)
            found[name].append(figures(served, options.long))
            texts.append([text.tokens for text in served])
            print(f"  {seed} {name}: " + ", ".join(f"{value:.3f}" for value in found[name][-1].values()), flush=True)
        differing += sum(text != texts[0] for text in texts)
    Console(width=80).print(table(found))
    print(f"texts that differ between schedulers: {differing}")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
