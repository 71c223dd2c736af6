"""EPD: images are encoded on workers of their own, before the prompt; and workers change their stage when the load moves.

Gursimran Singh, Xinglu Wang, Yifan Hu, Timothy Yu, Linzi Xing, Wei Jiang, Zhefeng Wang, Xiaolong Bai, Yi Li, Ying Xiong, Yong Zhang,
Zhenan Fan, Efficiently Serving Large Multimodal Models Using EPD Disaggregation, 2025, arXiv 2501.05460.

1. The images of a request are spread evenly over all encoders, in turn. The prompt begins when the last one is encoded.
2. Encoded images and keys and values are pulled by the next stage.
3. Every `every` seconds a worker of the stage with the shorter queue changes to the other one, unless that is at least half as long.

Differs: encoders take a fixed time an image, and their output travels in no time. Switches concern prompts and decoding. A worker that
changes its stage finishes what it has.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from redraft.sched.router import FIRST
from redraft.sim.cluster import LAST, Cluster
from redraft.sim.runner import Cost


class Encoders:
    """count: of workers; seconds: an image; spread: whether the images of a request go to all of them. Requests come in order of time."""

    def __init__(self, count: int, seconds: float, spread: bool = True) -> None:
        self.seconds, self.spread = seconds, spread
        self.free = [0.0] * count  # when each has nothing to do
        self._turn = 0

    def shards(self, images: int) -> list[int]:
        """The encoder of each image, in order."""
        if self.spread:
            places = [(self._turn + i) % len(self.free) for i in range(images)]
            self._turn = (self._turn + images) % len(self.free)
            return places
        return [min(range(len(self.free)), key=self.free.__getitem__)] * images

    def encode(self, at: float, images: int) -> float:
        """When all images of a request that came at `at` are encoded. Without images at once."""
        done = [at]
        for place in self.shards(images):
            self.free[place] = max(self.free[place], at) + self.seconds
            done.append(self.free[place])
        return max(done)


class Encoding(NamedTuple):
    """The cost of prompt steps of a worker that encodes too. tokens: of an image, of which prompts consist; seconds: an image."""

    cost: Cost
    tokens: int
    image: float

    def seconds(self, rows: int, texts: int, cells: float, read: float) -> float:
        return self.cost.seconds(rows, texts, cells, read) + self.image * (rows - texts) / self.tokens


class Switching:
    """Changes the stages of a cluster's workers. every: seconds between two decisions, so also the least time between two changes."""

    def __init__(self, cluster: Cluster, every: float = 5.0) -> None:
        self.cluster, self.every, self.switches = cluster, every, 0
        self._next = every
        ends = cluster._end

        def checked(place: int) -> None:
            ends(place)
            if cluster.now >= self._next:
                self._next = cluster.now + every
                self.decide()

        cluster._end = checked  # type: ignore[method-assign]

    def queues(self) -> list[float]:
        """Requests of each stage, by the number of its workers: without a first token, and with one."""
        loads = self.cluster.front.loads
        counts = [sum(stage in load.stages for load in loads) for stage in (0, LAST)]
        waiting = sum(journey.first != journey.first and not journey.stop for journey in self.cluster._live.values())
        return [waiting / counts[0], (len(self.cluster._live) - waiting) / counts[1]]

    def decide(self) -> None:
        queues, loads = self.queues(), self.cluster.front.loads
        target = max((0, LAST), key=queues.__getitem__)
        other = LAST - target
        donors = [i for i, load in enumerate(loads) if other in load.stages]
        if queues[other] >= queues[target] / 2 or len(donors) < 2:
            return
        chosen = min(donors, key=lambda i: loads[i].tokens)
        loads[chosen] = loads[chosen]._replace(stages=FIRST if target == 0 else (LAST,))
        self.cluster.workers[chosen].stages = loads[chosen].stages
        self.switches += 1


def joined(shards: Iterable[tuple[int, Sequence[int]]]) -> list[int]:
    """The encoded images of a request in their order, whatever the order in which shards (index, tokens) came."""
    return [token for _, tokens in sorted(shards) for token in tokens]
