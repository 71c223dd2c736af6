"""semi-PD: prompts and decoding with shares of one device, over one pool, serve 1.55 to 1.72 times the requests within the limits that
vLLM, SGLang and DistServe do, per device. One simulated A100 with OPT-13B against chunks on it, and against a split of two."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from redraft import registry
from redraft.sim.cluster import Cluster
from redraft.sim.configuration import Configuration
from redraft.sim.figures import Limits
from redraft.sim.shared import SharedDevice
from redraft.sim.shares import SemiPD
from redraft.sim.trace import Poisson
from scripts.claims.distserve import BLOCKS, LINK, OWN
from scripts.claims.measure import goodputs, gpu, interval, verdict

LOAD = Poisson(prompt=755, output=200, spread=0.9, requests=160)
TTFT, TPOT = 1.0, 0.06
LIMITS = {"mean": Limits.parse(f"ttft={TTFT},tpot={TPOT}"), "strict": Limits.parse(f"ttft={TTFT},itl@99={TPOT},second={2 * TPOT}")}
RATES = tuple(0.3 * 1.3**i for i in range(10))


def shared() -> Cluster:
    prompts = registry.create("sched", "fcfs:token_budget=2048,max_seqs=256")
    return SharedDevice(gpu(), SemiPD(TTFT, TPOT), prompts, registry.create("sched", "sarathi:max_seqs=256"), blocks=BLOCKS)


def run(seeds: int) -> Iterator[str]:
    cost = gpu()
    systems: dict[str, tuple[Callable[[], Cluster], int]] = {
        "semi-PD": (shared, 1),
        "chunks of 128": (partial(Configuration(1, "sarathi:token_budget=128,max_seqs=128", **OWN).cluster, cost), 1),
        "chunks of 512": (partial(Configuration(1, "sarathi:token_budget=512,max_seqs=256", **OWN).cluster, cost), 1),
        "split 1:1": (partial(Configuration(1, "fcfs:token_budget=2048,max_seqs=256", split="1:1", link=LINK, **OWN).cluster, cost), 2),
    }
    found: dict[str, dict[str, list[float]]] = {name: {system: [] for system in systems} for name in LIMITS}
    for seed in range(seeds):
        for system, (build, devices) in systems.items():
            trace = LOAD.trace(seed).cut(LOAD.requests * devices)
            for name, value in goodputs(build, devices, trace, LIMITS, RATES).items():
                found[name][system].append(value)
    for name, values in found.items():
        yield f"{name}: " + ", ".join(f"{system} {np.mean(some):.2f}" for system, some in values.items()) + " requests a second and device"
        for other in ("chunks of 128", "chunks of 512", "split 1:1"):
            ratio = interval([a / max(b, RATES[0] / 2) for a, b in zip(values["semi-PD"], values[other], strict=True)])
            yield f"  semi-PD / {other}: {ratio}  {verdict(ratio)}"
