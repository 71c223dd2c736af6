"""Schedulers and routers, on simulated time: OPT-13B on A100 (docs/simulation.md). A sample is a seed of the arrivals."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from redraft.sim.configuration import Configuration
from redraft.sim.figures import Limits, Values
from redraft.sim.trace import Poisson
from scripts.claims.claim import Claim, Found
from scripts.claims.distserve import BLOCKS, LINK, OWN
from scripts.claims.lab import Lab
from scripts.claims.measure import goodputs, gpu, simulated

LOAD = Poisson(rate=1.5, prompt=1024, output=128, spread=0.9, requests=150)
WHOLE = "fcfs:token_budget=4096,max_seqs=256"
CHUNKS = "sarathi:token_budget=512,max_seqs=256"


def values(one: Configuration, load: Poisson, seed: int) -> Values:
    return simulated(one.cluster(gpu()), load.trace(seed)).values


def ratio(one: Configuration, other: Configuration, load: Poisson, figure: Callable[[Values], float]):  # type: ignore[no-untyped-def]
    """A run whose number is a figure of `other` over that of `one`."""

    def run(lab: Lab) -> Found:
        pairs = [[figure(values(way, load, lab.seed + i)) for way in (one, other)] for i in range(lab.count(8))]
        mean = np.mean(pairs, 0)
        return Found([b / a for a, b in pairs], [f"means {mean[0]:.3g} and {mean[1]:.3g} s"])

    return run


def percentile(metric: str, percent: float) -> Callable[[Values], float]:
    return lambda found: float(found.percentile(metric, percent))


def mean(metric: str) -> Callable[[Values], float]:
    return lambda found: float(np.average(found.of[metric][0], weights=found.of[metric][1]))


def split_goodput(lab: Lab) -> Found:
    """4 workers; limits as for chat in serving-claims."""
    systems = {
        "split": Configuration(1, WHOLE, blocks=BLOCKS, router="splitwise", split="3:1", link=LINK),
        "both": Configuration(4, WHOLE, **OWN),
    }
    limits, rates = {"all": Limits.parse("ttft=1,tpot=0.1,second=0.3")}, tuple(0.4 * 1.4**i for i in range(7))
    load, found = Poisson(prompt=1020, output=129, spread=0.9, requests=160), []
    for i in range(lab.count(5)):
        trace = load.trace(lab.seed + i)
        got = {name: goodputs(lambda one=one: one.cluster(gpu()), 4, trace, limits, rates)["all"] for name, one in systems.items()}
        found.append(got["split"] / max(got["both"], 1e-9))
    return Found(found)


ONE = {"blocks": BLOCKS, "router": "least-load"}
SHARED = Poisson(rate=6.0, prompt=1200, output=64, shared=1024, groups=24, requests=300)
MANY = Poisson(rate=7.0, prompt=755, output=150, spread=1.2, requests=300)

CLAIMS = (
    Claim("sarathi-stalls", ("sched=sarathi",), "Prompts in chunks, behind texts that decode, end the pauses that whole prompts cause",
          "one worker, 1.5 requests a second; whole prompts / chunks of 512", "P99 of the time between two tokens, ratio",
          ratio(Configuration(1, CHUNKS, **ONE), Configuration(1, WHOLE, **ONE), LOAD, percentile("itl", 99)), border=1.0),
    Claim("piggyback-throughput", ("sched=piggyback",),
          "One chunk a step with all decoding texts: 1.25 to 1.33 times the throughput (here: more)",
          "all requests at once, whole prompts / one chunk of 256 a step", "time to the end, ratio",
          ratio(Configuration(1, "piggyback:token_budget=512,max_seqs=256,rows=256", **ONE), Configuration(1, WHOLE, **ONE),
                Poisson(rate=1000.0, prompt=1024, output=128, spread=0.5, requests=100), percentile("e2el", 100)), border=1.0),
    Claim("spf-first-token", ("sched=spf",), "Short prompts first lower the time to the first token",
          "one worker, 2.4 requests a second; sarathi / spf", "mean time to the first token, ratio",
          ratio(Configuration(1, "spf:token_budget=512,max_seqs=256", **ONE), Configuration(1, CHUNKS, **ONE),
                Poisson(rate=2.4, prompt=1024, output=128, spread=1.2, requests=200), mean("ttft")), border=1.0),
    Claim("prefix-affinity-cache", ("route=prefix-affinity",), "Requests sent where their prefix is cached wait less for the first token",
          "4 workers, 24 groups that share 1,024 of 1,200 tokens; in turns / by prefix", "median time to the first token, ratio",
          ratio(Configuration(4, CHUNKS, "prefix-affinity", BLOCKS // 8), Configuration(4, CHUNKS, "round-robin", BLOCKS // 8), SHARED,
                percentile("ttft", 50)), border=1.0),
    Claim("least-load-tail", ("route=least-load",), "The shortest queue lowers the tail of the time to the first token",
          "4 workers, unequal prompts; in turns / shortest queue", "P90 of the time to the first token, ratio",
          ratio(Configuration(4, CHUNKS, "least-load", BLOCKS), Configuration(4, CHUNKS, "round-robin", BLOCKS), MANY,
                percentile("ttft", 90)), border=1.0),
    Claim("splitwise-goodput", ("route=splitwise",),
          "Pools for prompts and for tokens with a mixed one: 2.35 times the requests at equal cost (here: more)",
          "4 workers, 3:1 / 4 that do both; see serving-claims for the paper's machine", "requests a second within limits, ratio",
          split_goodput, border=1.0),
)  # fmt: skip
