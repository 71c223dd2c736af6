"""Prompts and decoding on one device: two engines over one pool, and a controller of the share of the device that each has.

Nexus: Xiaoxiang Shi, Colin Cai, Junjia Du, Zhanda Zhu, Xingda Wei, Zhihao Jia, Nexus: Proactive Intra-GPU Disaggregation of Prefill and
Decode in LLM Serving, 2025, arXiv 2507.06608.
semi-PD: Ke Hong, Lufang Chen, Zhong Wang, Xiuhong Li, Qiuli Mao, Jianping Ma, Chao Xiong, Guanyu Wu, Buhe Han, Guohao Dai, Yun Liang, Yu
Wang, semi-PD: Towards Efficient LLM Serving via Phase-Wise Disaggregated Computation and Unified Storage, 2025, arXiv 2504.19867.

Differs: a step has the share that the device had when it began. Prompts are bound by arithmetic: their time is that of the whole device
over their share. Decoding is bound by memory, which half of the device saturates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Protocol

import numpy as np

from redraft.sim.runner import Cost

SATURATED = 0.5  # share of the device with which decoding is as fast as with all of it
LEAST = 0.05
PROMPT, DECODE = 0, 1


def slowdown(stage: int, share: float) -> float:
    """How much longer a step takes than on the whole device."""
    return 1 / share if stage == PROMPT else max(1.0, SATURATED / share)


class Controller(Protocol):
    """Decides the share of prompts; decoding has the rest."""

    def before(self, device: Device) -> float:
        """Before a step; returns the share from now on."""
        ...


class Device:
    """One device for two engines. share: of prompts; needed[stage]: seconds of all steps of a stage, had they the whole device; usage: the
    share of the pool that is used; busy: whether a stage has work; contention: how much longer steps take while both stages run; changes:
    of the share."""

    def __init__(self, cost: Cost, controller: Controller, share: float = 0.5, contention: float = 1.1) -> None:
        self.cost, self.controller, self.share, self.contention = cost, controller, share, contention
        self.needed = [0.0, 0.0]
        self.usage: Callable[[], float] = lambda: 0.0
        self.busy: Callable[[int], bool] = lambda stage: True
        self.changes = 0

    def part(self, stage: int) -> Part:
        return Part(self, stage)


@dataclass(frozen=True)
class Part:
    """The cost of the steps of one stage."""

    device: Device
    stage: int

    def seconds(self, rows: int, texts: int, cells: float, read: float) -> float:
        device = self.device
        alone = device.cost.seconds(rows, texts, cells, read)
        device.needed[self.stage] += alone
        share = device.controller.before(device)
        device.changes += share != device.share
        device.share = share
        if not device.busy(1 - self.stage):
            return alone  # the other stage has nothing to do, and its share is used
        return alone * device.contention * slowdown(self.stage, share if self.stage == PROMPT else 1 - share)


@dataclass(frozen=True)
class Fixed:
    share: float

    def before(self, device: Device) -> float:
        return self.share


@dataclass(frozen=True)
class Nexus:
    """alpha, beta: how much longer prompts and decoding may take than alone on the device; switch: usage of the pool above which
    decoding comes first; delta: a smaller change is not made; step: of the search."""

    alpha: float = 1.3
    beta: float = 1.1
    switch: float = 0.7
    delta: float = 0.05
    step: float = 0.01

    def before(self, device: Device) -> float:
        found = self.search(device.share, device.usage() > self.switch)
        return found if abs(found - device.share) > self.delta else device.share

    def search(self, share: float, decode_first: bool) -> float:
        """From `share`: the largest share of the stage that comes first with which the other one keeps its slack, or LEAST."""
        first, slack = (DECODE, self.alpha) if decode_first else (PROMPT, self.beta)
        own = 1 - share if decode_first else share
        steps = round(own / self.step)
        while steps * self.step > LEAST and slowdown(1 - first, 1 - steps * self.step) > slack + 1e-9:
            steps -= 1
        while (steps + 1) * self.step <= 1 - LEAST and slowdown(1 - first, 1 - (steps + 1) * self.step) <= slack + 1e-9:
            steps += 1
        own = steps * self.step
        return 1 - own if decode_first else own


class SemiPD:
    """ttft, tpot: limits in seconds, for `percent` of the requests; window: requests after which it decides; step: how much of the device
    changes its stage at once, at most `most` times."""

    def __init__(self, ttft: float, tpot: float, percent: float = 90.0, window: int = 20, step: float = 0.05, most: int = 4) -> None:
        self.ttft, self.tpot, self.percent, self.window, self.step, self.most = ttft, tpot, percent, window, step, most
        self.seen: list[tuple[float, float]] = []
        self.points: list[tuple[float, float, float]] = []  # share, and what it gave: ttft, tpot
        self.load = 0.0  # share of the device that prompts need
        self.share = 0.5

    def before(self, device: Device) -> float:
        return self.share

    def observe(self, ttft: float, tpot: float) -> None:
        """A request has ended. After `window` of them the share may change."""
        self.seen.append((ttft, tpot))
        if len(self.seen) == self.window:
            first, per = (float(np.percentile(column, self.percent)) for column in zip(*self.seen, strict=True))
            self.points.append((self.share, first, per))
            self.seen = []
            self.share = self.decide(first, per)

    def decide(self, ttft: float, tpot: float) -> float:
        """The next share. Only if one of the limits fails, and at most as far as the models say that it then holds."""
        slow, stalls = ttft > self.ttft, tpot > self.tpot
        if slow == stalls:
            return self.share
        share = self.share
        for _ in range(self.most):
            moved = min(1 - LEAST, max(LEAST, share + (self.step if slow else -self.step)))
            if moved == share:
                break
            share = moved
            if self.predicted_ttft(share) <= self.ttft if slow else self.predicted_tpot(share) <= self.tpot:
                break
        return share

    def predicted_ttft(self, share: float) -> float:
        """a / (share - load) + b."""
        if share <= self.load:
            return inf
        a, b = _line([(1 / max(x - self.load, 0.01), ttft) for x, ttft, _ in self.points[-self.window :]])
        return a / (share - self.load) + b

    def predicted_tpot(self, share: float) -> float:
        """a / (1 - share) + b."""
        a, b = _line([(1 / (1 - x), tpot) for x, _, tpot in self.points[-self.window :]])
        return a / (1 - share) + b


def _line(points: list[tuple[float, float]]) -> tuple[float, float]:
    """a, b of 0 or more of y = a x + b; b = 0 from points with one x."""
    x, y = np.array(points).T
    spread = float(np.ptp(x))
    a = float(np.cov(x, y, bias=True)[0, 1] / np.var(x)) if spread > 1e-9 else float(y.mean() / x.mean())
    a = max(a, 0.0)
    return a, max(0.0, float(y.mean() - a * x.mean()))
