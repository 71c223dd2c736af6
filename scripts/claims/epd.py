"""EPD: encoders of their own lower the time to the first token (up to 71 %); spreading the images of a request keeps it from growing with
their number (from 1.46 to 4.27 s without, from 0.92 to 1.74 s with it, at 2 to 8 images); and changing stages halves the time of a token
when answers get longer (0.12 to 0.05 s). 8 simulated A100 with OPT-13B, 0.2 s an image of 640 tokens."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import accumulate

import numpy as np

from redraft import registry
from redraft.sim.cluster import LAST, Cluster
from redraft.sim.epd import Encoders, Encoding, Switching
from redraft.sim.link import Link
from redraft.sim.runner import Cost
from redraft.sim.trace import Arrival, requests
from redraft.sim.worker import Worker
from scripts.claims.distserve import BLOCKS
from scripts.claims.measure import gpu, interval, verdict

IMAGE, TOKENS, TEXT = 0.2, 640, 22
COUNT, RATE = 100, 1.0


def cluster(prompts: int, decoding: int, cost: Cost | None = None) -> Cluster:
    sched = registry.create("sched", "fcfs:token_budget=8192,max_seqs=128")
    link = Link(token_bytes=819200.0, bandwidth=3e11)
    stages = [(0,)] * prompts + [(LAST,)] * decoding
    workers = [
        Worker(i, (cost if own == (0,) else None) or gpu(), sched, blocks=BLOCKS, context=32 * BLOCKS, stages=own, link=link)
        for i, own in enumerate(stages)
    ]
    return Cluster(workers, registry.create("route", "least-load").open())


def first_token(images: int, seed: int, encoders: Encoders | None, where: Cluster) -> float:
    """Mean seconds. Without encoders, prompt workers encode."""
    draw = random.Random(seed)
    times = list(accumulate(draw.expovariate(RATE) for _ in range(COUNT)))
    ready = times if encoders is None else [encoders.encode(at, images) for at in times]
    order = sorted(range(COUNT), key=ready.__getitem__)
    records = where.run(requests(Arrival(ready[i], TEXT + TOKENS * images, 10) for i in order))
    came = np.array([times[i] for i in order])
    return float(np.mean(records.column("first") - came[records.column("number")]))


def token_time(seed: int, switches: bool) -> float:
    """Mean seconds of an output token of the last 90 requests; the first 10 are short."""
    draw = random.Random(seed)
    times = accumulate(draw.expovariate(12.0) for _ in range(400))
    where = cluster(7, 1)
    if switches:
        Switching(where)
    records = where.run(requests(Arrival(at, 800, 50 if i < 40 else 500) for i, at in enumerate(times)))
    late = records.column("number") >= 40
    per = (records.column("end") - records.column("first")) / (records.column("output") - 1)
    return float(np.mean(per[late]))


def run(seeds: int) -> Iterator[str]:
    grown: dict[str, list[float]] = {"spread": [], "one encoder each": []}
    for images in (2, 4, 6, 8):
        found: dict[str, list[float]] = {"spread": [], "one encoder each": [], "fused": []}
        for seed in range(seeds):
            found["spread"].append(first_token(images, seed, Encoders(5, IMAGE), cluster(2, 1)))
            found["one encoder each"].append(first_token(images, seed, Encoders(5, IMAGE, spread=False), cluster(2, 1)))
            found["fused"].append(first_token(images, seed, None, cluster(7, 1, Encoding(gpu(), TOKENS, IMAGE))))
        yield (
            f"  {images} images: " + ", ".join(f"{name} {np.mean(values):.2f} s" for name, values in found.items()) + " to the first token"
        )
        for name in ("fused", "one encoder each"):
            ratio = interval([other / own for other, own in zip(found[name], found["spread"], strict=True)])
            yield f"{images} images, {name} / spread (5 encoders, 2 prompts, 1 decoding): {ratio}  {verdict(ratio)}"
        for name, values in grown.items():
            values.append(float(np.mean(found[name])))
    growth = {name: values[-1] - values[0] for name, values in grown.items()}
    yield f"grows less with the images when they are spread: {'confirmed' if growth['spread'] < growth['one encoder each'] else 'refuted'}"
    fixed, moved = ([token_time(seed, switches) for seed in range(seeds)] for switches in (False, True))
    ratio = interval([a / b for a, b in zip(fixed, moved, strict=True)])
    yield f"answers of 50, then 500 tokens, fixed / changing stages, time of a token: {ratio}  {verdict(ratio)}"
