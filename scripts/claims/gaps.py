"""Split workers pause less: the 99th percentile of the time between two tokens, for two workers at one rate: A100 with OPT-13B, and a core
each with SmolLM2-135M. The cost of the cores was measured while other programs ran, so only ratios count."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from redraft.core.step_cost import StepCost
from redraft.sim.configuration import Configuration
from redraft.sim.trace import Poisson
from scripts.claims.distserve import BLOCKS, LINK
from scripts.claims.measure import COSTS, gpu, interval, simulated, verdict

MACHINES = {
    "A100": (gpu(), Poisson(rate=3.0, prompt=755, output=200, spread=0.9, requests=300), BLOCKS, (128, 512), LINK),
    "two cores": (
        StepCost.read(COSTS / "smollm2-cpu.json"),
        Poisson(rate=0.7, prompt=120, output=40, spread=0.9, requests=200),
        1024,
        (32, 128),
        "token_bytes=23040,bandwidth=1e9,latency=2e-3,blocking=true",  # SmolLM2 in bfloat16, through shared memory
    ),
}


def run(seeds: int) -> Iterator[str]:
    for name, (cost, made, blocks, chunks, link) in MACHINES.items():
        whole = "fcfs:token_budget=2048,max_seqs=256"
        systems = {"whole prompts": Configuration(2, whole, "least-load", blocks)}
        for size in chunks:
            seqs = min(size, 256)
            systems[f"chunks of {size}"] = Configuration(2, f"sarathi:token_budget={size},max_seqs={seqs}", "least-load", blocks)
        systems["split 1:1"] = Configuration(1, whole, "least-load", blocks, "1:1", link)
        gaps: dict[str, list[float]] = {}
        for system, one in systems.items():
            found = [simulated(one.cluster(cost), made.trace(seed)).values for seed in range(seeds)]
            gaps[system] = [values.percentile("itl", 99) for values in found]
            texts = ", ".join(
                f"{label} {1000 * np.mean([values.percentile(metric, percent) for values in found]):.0f} ms"
                for label, metric, percent in (
                    ("P99 gap", "itl", 99), ("P50", "itl", 50), ("P90 second token", "second", 90), ("P90 first", "ttft", 90),
                )
            )  # fmt: skip
            yield f"  {name}, {system}: {texts}"
        for system in list(systems)[:-1]:
            ratio = interval([a / b for a, b in zip(gaps[system], gaps["split 1:1"], strict=True)])
            yield f"{name}, P99 gap of {system} / split 1:1: {ratio}  {verdict(ratio)}"
