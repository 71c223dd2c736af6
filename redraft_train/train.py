"""The trainer of heads: AdamW with a rate that falls with the share of the budget that is spent, resumable, best weights kept."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from redraft_train.heads.head import Head, Window
from redraft_train.states import States
from redraft_train.windows import Windows

SAVE_EVERY = 60.0  # seconds
LEAD = 64  # tokens of a prompt that held-out texts keep
MEASUREMENTS = 24  # of held-out accuracy, evenly over the budget
SHOW_EVERY = 1.0  # seconds between two reports of progress


@dataclass(frozen=True)
class Plan:
    """seconds: the budget; steps: instead of it, so that a seed gives the same bits on the same machine; rate: the peak learning rate, None
    for the head's own; rows, length: texts of a step, and tokens of each; warmup: share of the budget in which the rate rises; held: the
    most held-out tokens of a measurement; prompts, lead: see Windows."""

    seconds: float
    steps: int | None = None
    rate: float | None = None
    rows: int = 4
    length: int = 256
    warmup: float = 0.03
    weight_decay: float = 0.01
    clip: float = 1.0
    seed: int = 0
    held: int = 6144
    prompts: bool = True
    lead: int | None = None


@dataclass(frozen=True)
class Measured:
    """Of held-out texts, greedily. accuracy[d]: the share of tokens at depth d that the head guesses; chain[d]: with all before it."""

    step: int
    loss: float
    accuracy: list[float]
    chain: list[float]

    @property
    def tokens(self) -> float:
        """Tokens of a step that drafts one chain of all depths."""
        return 1 + sum(self.chain)


@dataclass(frozen=True)
class Moment:
    """How training stands. loss: a running mean, nats; speed: tokens a second; left: seconds."""

    step: int
    loss: float
    speed: float
    left: float
    measured: Measured


def rate(share: float, warmup: float) -> float:
    """The learning rate over its peak where `share` of the budget is spent: linear up, then a cosine down to 0.

    >>> [round(rate(share, 0.1), 2) for share in (0, 0.05, 0.1, 0.55, 1)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    if share < warmup:
        return share / warmup
    return (1 + math.cos(math.pi * min(1.0, (share - warmup) / (1 - warmup)))) / 2


@dataclass
class Progress:
    """What a checkpoint holds besides tensors."""

    step: int = 0
    epoch: int = 0
    window: int = 0  # of the epoch, the next one
    seconds: float = 0.0
    tokens: int = 0
    loss: float = 0.0
    measured: list[Measured] = field(default_factory=list)


class Trainer:
    """Trains a head on states. `file` is the checkpoint, from which a new trainer with the same head and states continues."""

    def __init__(self, head: Head, states: States, plan: Plan, file: Path, *, tag: str = "") -> None:
        """tag: what else must be equal for a checkpoint to be continued; another one is ignored."""
        self.head, self.plan, self.file, self.tag = head, plan, file, f"{tag} {plan.steps} {plan.seed} {plan.rows}x{plan.length}"
        texts = np.arange(len(states.held))
        size: dict[str, Any] = {"batch": plan.rows, "length": plan.length, "layers": head.layers}
        self.windows = Windows(states, [*texts[~states.held]], **size, prompts=plan.prompts, lead=plan.lead)
        self.held = Windows(states, [*texts[states.held]], **size, lead=LEAD)
        self.parameters = [parameter for parameter in head.parameters() if parameter.requires_grad]
        groups = [
            {"params": [one for one in self.parameters if one.ndim > 1], "weight_decay": plan.weight_decay},
            {"params": [one for one in self.parameters if one.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0, betas=(0.9, 0.95))
        self.at = Progress()
        self.best: dict[str, torch.Tensor] = {}
        self._load()

    @property
    def share(self) -> float:
        if self.plan.steps is not None:
            return self.at.step / self.plan.steps
        return min(1.0, self.at.seconds / self.plan.seconds)

    @property
    def last(self) -> Measured:
        return self.at.measured[-1]

    def run(self, tick: Callable[[Moment], None] = lambda moment: None, until: int | None = None) -> Measured:
        """Trains to the end of the budget, or up to step `until`, and loads the best measured weights if it reached the end. Returns their
        measurement."""
        saved = shown = began = time.monotonic()
        before, first = self.at.seconds, self.at.tokens
        if not self.at.step:
            self.head.begin(self.windows.epoch(self.plan.seed))
        for window in self._stream():
            if self.share >= 1 or (until is not None and self.at.step >= until):
                break
            loss = self._update(window, rate(self.share, self.plan.warmup))
            self.at.step, self.at.window = self.at.step + 1, self.at.window + 1
            self.at.tokens += int((window.text >= 0).sum())
            self.at.loss = loss if self.at.step == 1 else 0.98 * self.at.loss + 0.02 * loss
            self.at.seconds = before + time.monotonic() - began
            if self.share >= len(self.at.measured) / MEASUREMENTS and self.share < 1:
                self._measure()
            if time.monotonic() - saved > SAVE_EVERY:
                self.save()
                saved = time.monotonic()
            if time.monotonic() - shown > SHOW_EVERY:
                shown = time.monotonic()
                speed = (self.at.tokens - first) / (shown - began)
                tick(Moment(self.at.step, self.at.loss, speed, self._left(), self.at.measured[-1]))
        if self.share < 1:
            self.save()
            return self.last
        self._measure()
        self.save()
        self.head.load_state_dict(self.best)
        return max(self.at.measured, key=lambda one: one.tokens)

    def _left(self) -> float:
        done = self.share
        return max(0.0, self.plan.seconds - self.at.seconds) if self.plan.steps is None else self.at.seconds * (1 - done) / done

    def _stream(self) -> Iterator[Window]:
        """Windows of one pass over the texts after the other, from the current one on."""
        while True:
            yield from islice(self.windows.epoch(self.plan.seed + self.at.epoch), self.at.window, None)
            self.at.epoch, self.at.window = self.at.epoch + 1, 0

    def _update(self, window: Window, share: float) -> float:
        with torch.autocast("cpu", torch.bfloat16):
            loss = self.head.loss(window).loss
        if not loss.requires_grad:  # no place of the window counts
            return self.at.loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.plan.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = share * (self.plan.rate or self.head.rate)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    @torch.no_grad()
    def _measure(self) -> None:
        """Measures the held-out texts and keeps the weights if they are the best so far."""
        loss, weight, tokens = 0.0, 0, 0
        totals: Any = None
        for window in self.held.epoch(0):
            with torch.autocast("cpu", torch.bfloat16):
                found = self.head.loss(window)
            counts = torch.stack([found.hits, found.all_hits, found.counts]).double()
            totals = counts if totals is None else totals + counts
            places = int(found.counts[0])
            loss, weight, tokens = loss + float(found.loss) * places, weight + places, tokens + int((window.text >= 0).sum())
            if tokens >= self.plan.held:
                break
        hits, chain = ((totals[i] / totals[2].clamp_min(1)).tolist() for i in (0, 1))
        one = Measured(self.at.step, loss / max(1, weight), hits, chain)
        if not self.at.measured or one.tokens >= max(other.tokens for other in self.at.measured):
            self.best = {name: value.clone() for name, value in self.head.state_dict().items()}
        self.at.measured.append(one)

    # ---- the checkpoint

    def save(self) -> None:
        """Writes the checkpoint whole or not at all."""
        state = {
            "tag": self.tag, "at": self.at, "head": self.head.state_dict(), "best": self.best,
            "optimizer": self.optimizer.state_dict(), "random": torch.get_rng_state(),
        }  # fmt: skip
        self.file.parent.mkdir(parents=True, exist_ok=True)
        partial = self.file.with_name(f"{self.file.name}.partial")
        torch.save(state, partial)
        os.replace(partial, self.file)

    def _load(self) -> None:
        if not self.file.exists():
            return
        with torch.serialization.safe_globals([Progress, Measured]):
            state = torch.load(self.file, weights_only=True)
        if state["tag"] != self.tag:
            return
        self.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.at, self.best = state["at"], state["best"]
        torch.set_rng_state(state["random"])
