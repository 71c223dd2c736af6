"""The trainer: next-token loss on packed rows, Muon and AdamW, a warm-up/stable/decay schedule, resumable.

Everything that decides a run's weights is in its `Plan`, its rows and its seed, so a run that was interrupted and
resumed ends with the same bits as one that was not.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from redraft_train.embedded_pair.corpus import Mixture

EVALUATION_BATCH = 8192
"""Tokens per forward pass when measuring the held-out loss."""


@dataclass(frozen=True)
class Phase:
    """A stretch of training at one context: `share` of all tokens, in rows of `context` tokens."""

    share: float
    context: int


@dataclass(frozen=True)
class Plan:
    """What a run does. Rates are peaks; `warmup` and `decay` are shares of `tokens`."""

    tokens: int
    batch: int = 8192
    phases: tuple[Phase, ...] = (Phase(0.75, 256), Phase(0.25, 1024))
    warmup: float = 0.02
    decay: float = 0.25
    matrix_rate: float = 0.02
    other_rate: float = 3e-3
    weight_decay: float = 0.05
    clip: float = 1.0
    seed: int = 1
    autocast: bool = True
    evaluate_every: int = 100
    save_every: int = 25

    def __post_init__(self) -> None:
        if abs(sum(phase.share for phase in self.phases) - 1) > 1e-6:
            raise ValueError("the phases' shares must add up to 1")
        if any(self.batch % phase.context for phase in self.phases):
            raise ValueError(f"a batch of {self.batch} tokens is not whole rows of every phase's context")
        if self.tokens < self.batch * len(self.phases):
            raise ValueError(f"{self.tokens} tokens are less than a step of {self.batch} in each phase")

    def steps(self) -> list[int]:
        """Optimizer steps of each phase."""
        return [max(1, round(phase.share * self.tokens / self.batch)) for phase in self.phases]


def rate_at(progress: float, warmup: float, decay: float) -> float:
    """The learning rate as a share of its peak at `progress` in [0, 1]: linear up, flat, linear down to 0."""
    up = progress / warmup if warmup else 1.0
    down = (1 - progress) / decay if decay else 1.0
    return max(0.0, min(1.0, up, down))


def build(config: LlamaConfig, seed: int) -> LlamaForCausalLM:
    """A model with random weights, the same for the same seed."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


class Trainer:
    """Trains one model; its `folder` holds `checkpoint.pt`, from which a new trainer continues, and `log.jsonl`."""

    def __init__(
        self,
        model: LlamaForCausalLM,
        plan: Plan,
        mixture: Mixture,
        held_out: dict[str, np.ndarray],
        folder: Path,
    ) -> None:
        """`held_out`: per source, (n, longest context + 1) rows to measure on."""
        self.model, self.plan, self.held_out, self.folder = model, plan, held_out, folder
        self.step = 0
        self.rows = [
            mixture.rows(steps * plan.batch // phase.context, phase.context) for steps, phase in zip(plan.steps(), plan.phases, strict=True)
        ]
        self.optimizers = optimizers(model, plan)
        folder.mkdir(parents=True, exist_ok=True)
        if self.checkpoint.exists():
            self.load()

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    def run(self, until: int | None = None) -> None:
        """Train up to step `until` (the plan's end if None), saving and measuring on the way."""
        last = sum(self.plan.steps())
        stop = last if until is None else min(until, last)
        with Meter(self.folder.name, last) as progress:
            started, first = time.perf_counter(), self.step
            for batch in self.batches():
                if self.step >= stop:
                    break
                loss = self.update(batch, rate_at(self.step / last, self.plan.warmup, self.plan.decay))
                self.step += 1
                speed = (self.step - first) * self.plan.batch / (time.perf_counter() - started)
                progress.show(self.step, loss, speed)
                if self.step % self.plan.evaluate_every == 0 or self.step == last:
                    self.log(loss, speed)
                if self.step % self.plan.save_every == 0 or self.step == stop:
                    self.save()

    def batches(self) -> Iterator[torch.Tensor]:
        """From the current step on, (batch // context, context + 1) ids of each step."""
        skip = self.step
        for phase, steps, rows in zip(self.plan.phases, self.plan.steps(), self.rows, strict=True):
            size = self.plan.batch // phase.context
            for i in range(min(skip, steps), steps):
                yield torch.from_numpy(rows[i * size : (i + 1) * size].astype(np.int64))
            skip -= min(skip, steps)

    def update(self, batch: torch.Tensor, rate: float) -> float:
        """One step at `rate` of the peak learning rates; returns the batch's loss in nats per token."""
        loss = self.loss(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.plan.clip)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        """Mean next-token loss of (rows, context + 1) ids, in nats per token."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.plan.autocast):
            logits = self.model(input_ids=batch[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())

    @torch.no_grad()
    def evaluate(self, limit: int | None = None) -> dict[str, float]:
        """Held-out loss by source, in nats per token, over `limit` rows spread over each (all if None)."""
        losses = {}
        for source, rows in self.held_out.items():
            spread = rows[:: max(1, len(rows) // limit)] if limit else rows
            chosen = torch.from_numpy(spread.astype(np.int64))
            size = max(1, EVALUATION_BATCH // (chosen.shape[1] - 1))
            parts = [(self.loss(part).item(), len(part)) for part in chosen.split(size)]
            losses[source] = sum(loss * n for loss, n in parts) / len(chosen)
        return losses

    def log(self, loss: float, speed: float) -> None:
        """Append the training loss and a sample of the held-out loss to `log.jsonl`."""
        entry = {
            "step": self.step,
            "tokens": self.step * self.plan.batch,
            "loss": round(loss, 4),
            "held_out": {source: round(value, 4) for source, value in self.evaluate(limit=16).items()},
            "tokens_per_second": round(speed),
        }
        with open(self.folder / "log.jsonl", "a") as file:
            file.write(json.dumps(entry) + "\n")

    def save(self) -> None:
        """Write the checkpoint beside the old one, then rename it, so that a reader never sees half a file."""
        state = {
            "step": self.step,
            "tokens": self.step * self.plan.batch,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self.checkpoint)

    def load(self) -> None:
        """Continue from the checkpoint in `folder`."""
        state = torch.load(self.checkpoint, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step = state["step"]


def optimizers(model: nn.Module, plan: Plan) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices; AdamW for the embedding (tied to the head) and the norms."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and "embed" not in name else others).append(parameter)
    return [
        torch.optim.Muon([{"params": matrices, "peak": plan.matrix_rate}], weight_decay=plan.weight_decay),
        torch.optim.AdamW([{"params": others, "peak": plan.other_rate}], betas=(0.9, 0.95), weight_decay=0.0),
    ]


class Meter:
    """A progress bar on a terminal, a plain line every 20 steps elsewhere."""

    def __init__(self, name: str, last: int) -> None:
        self.name, self.last = name, last
        columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}")
        self.bar = Progress(*columns, TimeRemainingColumn(), disable=not sys.stderr.isatty())
        self.task = self.bar.add_task(name, total=last)

    def __enter__(self) -> Meter:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def show(self, step: int, loss: float, speed: float) -> None:
        """Report a finished step: its loss in nats per token, the run's tokens per second so far."""
        line = f"{self.name} loss {loss:.3f} {speed:,.0f} tokens/s"
        self.bar.update(self.task, completed=step, description=line)
        if self.bar.disable and (step % 20 == 0 or step == self.last):
            print(f"{time.strftime('%H:%M:%S')} {line} step {step}/{self.last}", flush=True)
