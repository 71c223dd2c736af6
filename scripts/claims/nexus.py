"""Nexus: shares that follow the load give up to 20 times lower times to the first token and 2.5 times lower gaps than vLLM, and more than
fixed shares. One simulated A100 with OPT-13B; bursts of long prompts and of long answers in turn. Ratios above 1 are gains."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import numpy as np

from redraft import registry
from redraft.sim.cluster import Cluster
from redraft.sim.configuration import Configuration
from redraft.sim.shared import SharedDevice
from redraft.sim.shares import Controller, Fixed, Nexus
from redraft.sim.trace import Arrival, Trace
from scripts.claims.distserve import BLOCKS, OWN
from scripts.claims.measure import gpu, interval, simulated, verdict

PHASES = ((1.5, 1500, 60), (2.0, 250, 300))  # requests a second, mean tokens read and written
LENGTH, TURNS = 20.0, 4  # seconds of a phase


def load(seed: int) -> Trace:
    draw, found = random.Random(seed), []
    for turn in range(TURNS):
        rate, prompt, output = PHASES[turn % 2]
        at = turn * LENGTH + draw.expovariate(rate)
        while at < (turn + 1) * LENGTH:
            found.append(Arrival(at, 1 + int(draw.expovariate(1 / prompt)), 1 + int(draw.expovariate(1 / output))))
            at += draw.expovariate(rate)
    return Trace(found, "phases")


def shared(controller: Controller) -> Callable[[], Cluster]:
    prompts, rest = "fcfs:token_budget=2048,max_seqs=256", "sarathi:max_seqs=256"
    return lambda: SharedDevice(gpu(), controller, registry.create("sched", prompts), registry.create("sched", rest), blocks=BLOCKS)


def run(seeds: int) -> Iterator[str]:
    systems = {f"fixed {share}": shared(Fixed(share)) for share in (0.3, 0.5, 0.54, 0.7)}
    systems["whole prompts"] = lambda: Configuration(1, "fcfs:token_budget=2048,max_seqs=256", **OWN).cluster(gpu())
    systems["chunks of 512"] = lambda: Configuration(1, "sarathi:token_budget=512,max_seqs=256", **OWN).cluster(gpu())
    systems["nexus"] = shared(Nexus())
    means: dict[str, list[tuple[float, float]]] = {name: [] for name in systems}
    for seed in range(seeds):
        for name, build in systems.items():
            values = simulated(build(), load(seed), 0.0).values
            means[name].append((values.mean("ttft"), values.mean("itl")))
    for name, some in means.items():
        ttft, itl = np.mean(some, 0)
        yield f"  {name}: first token {1000 * ttft:.0f} ms, gap {1000 * itl:.1f} ms, means"
    for name in (name for name in systems if name != "nexus"):
        for place, metric in enumerate(("first token", "gap")):
            ratio = interval([other[place] / own[place] for other, own in zip(means[name], means["nexus"], strict=True)])
            yield f"{name} / nexus, {metric}: {ratio}  {verdict(ratio)}"
