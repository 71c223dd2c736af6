"""Heads that retrieve: RazorAttention and streaming heads on a needle in 512 tokens of filler."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from redraft.bench.tasks import Task
from scripts.claims.claim import Claim, Found
from scripts.claims.lab import Lab

LENGTH = 512
WINDOW = "sinks=4,recent=32,share=0.05,every=32"
STREAM = "sinks=4,local=64"


def needle(lab: Lab) -> Task:
    return lab.tasks(LENGTH, 6)["needle"]


def running(lab: Lab) -> Task:
    return lab.tasks(LENGTH, 6)["standard library"]


def profile(lab: Lab, kind: str = "found") -> Path:
    """Scores of the heads: as found, in random order, or negated."""
    from redraft.kv.eviction.retrieval_heads import HeadProfile, calibrate

    path = lab.folder / f"heads-{kind}.safetensors"
    if not path.exists():
        made = calibrate(lab.llm.runner)
        echo, induction = made.echo, made.induction
        if kind == "random":
            order = np.random.default_rng(lab.seed).permutation(echo.size)
            echo, induction = (scores.ravel()[order].reshape(echo.shape) for scores in (echo, induction))
        if kind == "negated":
            echo, induction = -echo, -induction
        HeadProfile(echo, induction, made.model, made.tokens).save(path)
    return path


def razor(lab: Lab, kind: str = "found", options: str = "") -> dict[str, str]:
    return {"keep": f"razor:{WINDOW},{options}{options and ','}profile={profile(lab, kind)}"}


def duo(lab: Lab, kind: str = "found") -> dict[str, str]:
    return {"keep": f"duo:{STREAM},profile={profile(lab, kind)}"}


def compared(lab: Lab, task: Task, one: dict[str, str], other: dict[str, str]) -> Found:
    a, b = lab.nats(task, **one), lab.nats(task, **other)
    right = [lab.scores(task, **policy).right.mean() for policy in ({}, one, other)]
    shares = ", ".join(f"{share:.0%}" for share in right)
    return Found(a - b, [f"against the full cache {a.mean():+.3f}, the other {b.mean():+.3f}; right answers, full cache first: {shares}"])


def against_random(lab: Lab) -> Found:
    return compared(lab, needle(lab), razor(lab), razor(lab, "random"))


def collapse(lab: Lab) -> Found:
    """All other heads keep all: the 14 % that were found are the last in the negated order."""
    return compared(lab, needle(lab), razor(lab), razor(lab, "negated", "echo=0,induction=0.85"))


def mean(lab: Lab) -> Found:
    return compared(lab, running(lab), razor(lab), razor(lab, options="mean=0"))


def needle_loss(lab: Lab) -> Found:
    return Found(lab.nats(needle(lab), **razor(lab)), [f"right answers {lab.scores(needle(lab), **razor(lab)).right.mean():.0%}"])


def halves(lab: Lab) -> Found:
    return compared(lab, needle(lab), duo(lab), duo(lab, "negated"))


def half_loss(lab: Lab) -> Found:
    return Found(lab.nats(needle(lab), **duo(lab)), [f"right answers {lab.scores(needle(lab), **duo(lab)).right.mean():.0%}"])


NATS = "nats a token, change"
CLAIMS = (
    Claim("razor-heads", ("keep=razor",), "The heads that a random text finds keep the needle, random heads do not",
          "needle in 512 tokens; 15 % of the heads keep all, others a window and a mean", "nats a token, found minus random heads",
          against_random, border=0.5),
    Claim("razor-collapse", ("keep=razor",), "Without the found heads retrieval breaks, although all others keep all",
          "the same, against the found 15 % of the heads windowed and all others whole", "nats a token, found whole minus found windowed",
          collapse, border=0.5),
    Claim("razor-loss", ("keep=razor",), "70 % less cache without noticeable loss (here: 0.1 nats)", "the needle, as above", NATS,
          needle_loss, border=-0.1),
    Claim("razor-mean", ("keep=razor",), "The mean of what was dropped is better than nothing",
          "running text of 512 tokens, with the slot of the mean and without", "nats a token, with minus without", mean),
    Claim("duo-halves", ("keep=duo",), "Windows on the half of the heads with the smallest scores cost little, on the other half retrieval",
          "needle in 512 tokens, 4 sinks and 64 newest", "nats a token, smallest minus largest half windowed", halves, border=0.5),
    Claim("duo-loss", ("keep=duo",), "Half of the heads can stream with little loss (here: 0.1 nats)", "the same", NATS,
          half_loss, border=-0.1),
)  # fmt: skip
