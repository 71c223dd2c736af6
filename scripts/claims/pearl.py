"""PEARL: draft and target at the same time are up to 1.52 times as fast as one after the other (3.79 times plain decoding), the more the
slower the draft. 4,000 tokens a seed, of which the target accepts a given share; each method with its best draft length of 1 to 12."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from redraft.sim.pearl import parallel, plain, speculative
from scripts.claims.measure import interval, verdict

GAMMAS = range(1, 13)
RATES = (0.5, 0.7, 0.9)
DEVICES: dict[str, tuple[float, Callable[[int], float]]] = {  # seconds of a drafted token, and of a step of the target with so many rows
    "GPU, target 10 x draft": (0.1, lambda rows: 1.0),
    "GPU, target 5 x draft": (0.2, lambda rows: 1.0),
    "GPU, target 3 x draft": (1 / 3, lambda rows: 1.0),
    "measured, pilot-1m for pilot-16m, a core each": (1.2e-3, lambda rows: 5.1e-3 + (rows - 1) * (8.1e-3 - 5.1e-3) / 16),
}


def run(seeds: int) -> Iterator[str]:
    for rate in RATES:
        means = []
        for name, (draft, target) in DEVICES.items():
            gains, speedups = [], []
            for seed in range(seeds):
                draw = random.Random(seed)
                accepts = [draw.random() < rate for _ in range(4000)]
                best = min(parallel(accepts, gamma, draft, target).seconds for gamma in GAMMAS)
                gains.append(min(speculative(accepts, gamma, draft, target).seconds for gamma in GAMMAS) / best)
                speedups.append(plain(accepts, target).seconds / best)
            found = interval(gains)
            means.append(found.mean)
            yield f"  {rate:.0%} accepted, {name}: {found} times speculation, {interval(speedups)} times plain: {verdict(found)}"
        rises = means[0] < means[1] < means[2]
        yield f"{rate:.0%} accepted: gains more with a slower draft: {'confirmed' if rises else 'refuted'}"
