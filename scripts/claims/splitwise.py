"""Splitwise: 2.35 times the throughput at the same cost and power, with machines for prompts and machines for tokens. Here at equal cost
and of one kind: 4 simulated DGX-H100 with Llama-2-70B, the most requests a second within the paper's nine limits. A shift of the load from
code to conversations breaks the limits without the mixed pool."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from redraft.sim.cluster import Cluster
from redraft.sim.configuration import Configuration
from redraft.sim.records import Records
from redraft.sim.trace import Poisson, Trace, requests
from scripts.claims.measure import crossing, interval, verdict

MACHINES = 4
TOKENS = (1, 512, 1024, 2048, 4096, 8192, 32768)  # of a batch
H100 = (0.030, 0.054, 0.078, 0.134, 0.376, 0.832, 2.936), (0.0306, 0.0306, 0.0300, 0.0316, 0.0313, 0.0326, 0.0502)
A100 = (0.0451, 0.093, 0.150, 0.283, 0.708, 1.781, 7.554), (0.045, 0.045, 0.045, 0.0457, 0.0465, 0.0485, 0.0716)
TOKEN_BYTES = 2 * 80 * 8192 * 2
OPTIONS = {"blocks": 500_000_000_000 // TOKEN_BYTES // 32}
SCHEDULER = "fcfs:token_budget=2048,max_seqs=512"
LINK = f"token_bytes={TOKEN_BYTES},bandwidth=2e11"
CONVERSATION, CODE = Poisson(prompt=1155, output=211, spread=0.9, requests=300), Poisson(prompt=2048, output=28, spread=0.9, requests=300)
LIMITS = {"ttft": (2, 3, 6), "tbt": (1.25, 1.5, 5), "e2e": (1.25, 1.5, 5)}  # P50, P90, P99 of the slow-down against a request alone on A100
RATES = tuple(3.0 * 1.45**i for i in range(6))  # a machine


@dataclass(frozen=True)
class Table:
    """Times of a batch of prompts, or of one token of each text, by its tokens. Mixed batches take what prompts take."""

    prompts: tuple[float, ...]
    tokens: tuple[float, ...]

    def seconds(self, rows: int, texts: int, cells: float, read: float) -> float:
        return float(np.interp(rows, TOKENS, self.tokens if rows == texts else self.prompts))


def room(records: Records, first: int = 0) -> float:
    """How far below its limit the worst of the nine values is; negative above it."""
    kept = records.column("number") >= first
    arrived, begun, end, prompt, output = (records.column(name)[kept] for name in ("arrived", "first", "end", "prompt", "output"))
    alone = np.interp(prompt, TOKENS, A100[0])
    token = A100[1][0]
    slow = {
        "ttft": (begun - arrived) / alone,
        "tbt": ((end - begun) / np.maximum(output - 1, 1) / token)[output > 1],
        "e2e": (end - arrived) / (alone + (output - 1) * token),
    }
    found = [
        1 - np.percentile(slow[name], percent) / limit
        for name, limits in LIMITS.items()
        for percent, limit in zip((50, 90, 99), limits, strict=True)
    ]
    return float(min(found))


def cluster(name: str) -> Cluster:
    """ "baseline", "mixed 2:2" or "fixed 2:2"."""
    kind, _, split = name.partition(" ")
    router = "splitwise" if kind == "mixed" else "least-load"
    if kind == "baseline":
        return Configuration(MACHINES, SCHEDULER, router, **OPTIONS).cluster(Table(*H100))
    return Configuration(1, SCHEDULER, router, split=split, link=LINK, **OPTIONS).cluster(Table(*H100))


def highest(name: str, trace: Trace) -> float:
    """Requests a second and machine."""
    found: list[float] = []
    for rate in RATES:
        where = cluster(name)
        found.append(room(where.run(requests(trace.at_rate(rate * MACHINES).arrivals))))
        if found[-1] < 0:
            break
    return crossing(RATES, found)


def shift(seed: int, rate: float) -> Trace:
    """Code, then conversations."""
    one, other = (made.trace(seed).at_rate(rate) for made in (CODE, CONVERSATION))
    late = one.arrivals[-1].at + 1 / rate
    return Trace([*one.arrivals, *(arrival._replace(at=arrival.at + late) for arrival in other.arrivals)], "shift")


def run(seeds: int) -> Iterator[str]:
    names = ["baseline", "mixed 2:2", "mixed 3:1", "fixed 3:1"]
    for load, made in (("conversations", CONVERSATION), ("code", CODE)):
        rates = {name: [highest(name, made.trace(seed)) for seed in range(seeds)] for name in names}
        yield f"{load}: " + ", ".join(f"{name} {np.mean(values):.2f}" for name, values in rates.items()) + " requests a second and machine"
        for kind in ("mixed", "fixed"):
            best = max((name for name in names if name.startswith(kind)), key=lambda name: np.mean(rates[name]))
            ratio = interval([a / max(b, RATES[0] / 2) for a, b in zip(rates[best], rates["baseline"], strict=True)])
            yield f"  {best} / baseline: {ratio}  {verdict(ratio)}"
    held: dict[str, list[float]] = {"mixed 3:1": [], "fixed 3:1": [], "baseline": []}
    rate = 0.6 * float(np.mean(rates["mixed 3:1"])) * MACHINES
    for seed in range(seeds):
        for name, values in held.items():
            where = cluster(name)
            values.append(room(where.run(requests(shift(seed, rate).arrivals)), CODE.requests))
    for name, values in held.items():
        yield f"code, then conversations at {rate:.1f} requests a second, {name}: room below the limits {interval(values)} of them"
    better = interval([a - b for a, b in zip(held["mixed 3:1"], held["fixed 3:1"], strict=True)])
    breaks = max(held["fixed 3:1"]) < 0 <= min(held["mixed 3:1"])
    yield f"  the mixed pool gives {better} more room: {'confirmed' if breaks else verdict(better, 0.0) + ', but not what breaks'}"
