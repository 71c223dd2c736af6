"""What a layer costs in a set of layers, beside the whole model: `scripts/prove layer-sets smollm2`.

One row after 256 cached tokens, the head included, processor time of whole passes in turns. A set costs its layers and what every pass
costs once (embedding and head), which a set of one layer shows. The first set leaves out a run of layers, the second every fifth one, the
third half layers. Below each: what the set would cost if its layers cost as much as those of the whole model.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace

import numpy as np

from redraft import LLM
from redraft.core.batch import Batch
from redraft.core.layers import Layers
from redraft.core.plan import Accepted, Work
from redraft.core.taps import Taps
from redraft.core.testing import sequence
from redraft.core.tree import EMPTY

CACHED = 256


def main() -> None:
    parser = argparse.ArgumentParser(prog="prove layer-sets", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=200)
    given = parser.parse_args()
    runner = LLM(given.model, draft="none", threads=1, prefix_sharing=False).runner
    count = len(runner.spec.layers)
    seq = sequence([1 + i % 99 for i in range(CACHED + 1)])
    runner.memory.open(seq)
    work = [Work(seq, CACHED)]
    runner.forward(Batch.pack(work, [EMPTY], runner.memory.reserve(work, [EMPTY])), Taps(logits=True))
    runner.memory.commit(work, [Accepted()])
    seq.stored = CACHED
    work = [Work(seq, 1)]
    batch = Batch.pack(work, [EMPTY], runner.memory.reserve(work, [EMPTY]))
    every = range(count)
    halves = Layers(frozenset(i for i in every if i % 5 != 2), frozenset(i for i in every if i % 5 != 3))
    sets = {
        "whole, in one call": None,
        "whole, as a set": Layers.whole(every),
        "one layer": Layers.whole([0]),
        "without a run of layers": Layers.whole([*range(count // 3), *range(count // 3 + count // 5, count)]),
        "without every fifth layer": Layers.whole(i for i in every if i % 5 != 2),
        "without every fifth half": halves,
    }
    seconds: dict[str, list[float]] = {name: [] for name in sets}
    for _ in range(given.rounds):
        for name, layers in sets.items():
            began = time.process_time()
            runner.forward(replace(batch, layers=[layers]), Taps(top_k=1))
            seconds[name].append(time.process_time() - began)
    middle = {name: statistics.median(found) for name, found in seconds.items()}
    once = middle["one layer"]
    each = (middle["whole, in one call"] - once) / (count - 1)
    for name, layers in sets.items():
        run = count if layers is None else (len(layers.attention) + len(layers.mlp)) / 2
        fair = once + each * (run - 1)
        low, high = np.quantile(np.array(seconds[name]) / fair, [0.25, 0.75])
        print(f"{name:26s} {run:4.0f} layers {1e3 * middle[name]:6.2f} ms, of fair {middle[name] / fair:.2f} ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
