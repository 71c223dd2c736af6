"""DistServe: 4.48 times the goodput of colocated serving. Four simulated A100 with OPT-13B; the best split against the same number of
workers that do both, with whole prompts (as vLLM of that time) and in chunks."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

from redraft.sim.configuration import Configuration
from redraft.sim.figures import Limits
from redraft.sim.trace import Poisson
from scripts.claims.measure import goodputs, gpu, interval, verdict

WORKERS = 4
LOADS = {"chat": (Poisson(prompt=755, output=200, spread=0.9, requests=240), (0.25, 0.1), (1.0, 0.04)),
         "summaries": (Poisson(prompt=1738, output=90, spread=0.3, requests=240), (1.0, 0.1), (1.0, 0.06))}  # fmt: skip
RATES = tuple(0.3 * 1.4**i for i in range(9))
BLOCKS = 66_144 // 32
LINK = "token_bytes=819200,bandwidth=3e11,latency=1e-4"  # 2 x 40 layers x 5120 x 2 bytes; NVLink
OWN = {"blocks": BLOCKS, "router": "least-load"}
WHOLE = {"whole prompts": Configuration(WORKERS, "fcfs:token_budget=2048,max_seqs=256", **OWN)}
CHUNKS = {f"chunks of {n}": Configuration(WORKERS, f"sarathi:token_budget={n},max_seqs={min(n, 256)}", **OWN) for n in (128, 512, 1024)}
SPLITS = {
    f"split {n}:{WORKERS - n}": Configuration(1, "fcfs:token_budget=2048,max_seqs=256", split=f"{n}:{WORKERS - n}", link=LINK, **OWN)
    for n in range(1, WORKERS)
}


def limits_of(ttft: float, tbt: float) -> dict[str, Limits]:
    """The paper's metric, and one that counts every pause."""
    name = f"{ttft:g}/{tbt:g} s"
    return {
        f"{name} mean": Limits.parse(f"ttft={ttft},tpot={tbt}"),
        f"{name} strict": Limits.parse(f"ttft={ttft},itl@99={tbt},second={2 * tbt}"),
    }


def run(seeds: int) -> Iterator[str]:
    cost, everything = gpu(), WHOLE | CHUNKS | SPLITS
    for load, (made, *pairs) in LOADS.items():
        limits = {name: one for pair in pairs for name, one in limits_of(*pair).items()}
        found: dict[str, dict[str, list[float]]] = {name: {system: [] for system in everything} for name in limits}
        for seed in range(seeds):
            trace = made.trace(seed)
            for system, one in everything.items():
                for name, value in goodputs(partial(one.cluster, cost), WORKERS, trace, limits, RATES).items():
                    found[name][system].append(value)
        for name, systems in found.items():
            means = {system: float(np.mean(values)) for system, values in systems.items()}
            yield f"{load}, {name}: " + ", ".join(f"{system} {value:.2f}" for system, value in means.items())
            split = max(SPLITS, key=lambda system: means[system])
            for label, others in (("whole prompts", WHOLE), ("the best chunks", CHUNKS)):
                other = max(others, key=lambda system: means[system])
                ratio = interval([a / max(b, RATES[0] / 2) for a, b in zip(systems[split], systems[other], strict=True)])
                yield f"  {split} / {other}: {ratio}  {verdict(ratio)}: more than {label}"
