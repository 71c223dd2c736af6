"""Policies that evict when the prompt ends: what its last rows find, and how layers share a budget."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import numpy as np

from redraft.bench.tasks import NEEDLE
from scripts.claims.claim import Claim, Found
from scripts.claims.lab import Lab
from scripts.claims.methods.merging import against

LENGTH = 400  # tokens of a text


def needle(one: str, other: str):  # type: ignore[no-untyped-def]
    """A run whose number is what one policy keeps beyond another, where the question stands in the prompt."""

    def run(lab: Lab) -> Found:
        task = lab.tasks(LENGTH, 8)[NEEDLE[1]]
        a, b = lab.nats(task, keep=one), lab.nats(task, keep=other)
        right = [f"{lab.scores(task, keep=policy).right.mean():.0%}" for policy in (one, other)]
        return Found(a - b, [f"right: {right[0]}, the other {right[1]}, the full cache {lab.scores(task).right.mean():.0%}"])

    return run


def votes(lab: Lab, *, random: bool = False) -> str:
    """CompressKV at a tenth, with heads that were found, or drawn."""
    from redraft.kv.eviction.compress_kv import CompressKV, HeadScores

    path = lab.folder / f"votes-{random}.safetensors"
    if not path.exists():
        text = (Path(sysconfig.get_path("stdlib")) / "tarfile.py").read_text(encoding="utf-8")
        made = CompressKV.calibrate(lab.llm.runner, [lab.llm.tokenizer.encode(text)], samples=8)
        if random:
            heads = np.random.default_rng(lab.seed).random(made.heads.shape, np.float32)
            made = HeadScores(heads, made.damage, made.model, made.tokens, made.texts)
        made.save(path)
    return f"compresskv:budget=0.1,profile={path}"


def found_heads(lab: Lab) -> Found:
    return needle(votes(lab) + ",even=true", votes(lab, random=True) + ",even=true")(lab)


def all_heads(lab: Lab) -> Found:
    every = lab.llm.runner.spec.attention[0].heads
    return needle(votes(lab) + ",even=true", votes(lab) + f",even=true,heads={every}")(lab)


def by_damage(lab: Lab) -> Found:
    return needle(votes(lab), votes(lab) + ",even=true")(lab)


def recall(other: str):  # type: ignore[no-untyped-def]
    """A run whose number is what LazyEviction keeps of running text beyond another policy."""
    return against("running", "lazy-eviction:budget=0.5,window=24", other)


TENTH = f"a fact in {LENGTH} tokens of filler, the question at their end, 10 %"
WITHIN = f"a fact in {LENGTH} tokens of filler, the question at their end, 25 %"
CLAIMS = (
    Claim("snapkv-window", ("keep=snapkv",), "The last rows of a prompt know what its answer needs, all rows together do not",
          f"{WITHIN}; against the attention of all rows (H2O)", "nats a token, last rows minus all",
          needle("snapkv:budget=0.25", "h2o:budget=0.25,drop=1024")),
    Claim("snapkv-pool", ("keep=snapkv",), "Neighbours of an attended token must stay too", f"{WITHIN}; pool=15 against 1",
          "nats a token, pooled minus not", needle("snapkv:budget=0.25", "snapkv:budget=0.25,pool=1")),
    Claim("h2o-heavy", ("keep=h2o",), "Heavy hitters beside the newest tokens lose less than the newest alone",
          "running text, 96 tokens behind 224, 20 %; newest=0.5 against 0.98", "nats a token, with minus without heavy hitters",
          against("running", "h2o:budget=0.2", "h2o:budget=0.2,newest=0.98")),
    Claim("prefixkv-layers", ("keep=prefixkv",), "Layers that keep equal shares of their attention lose less than equal budgets",
          "running text, 96 tokens behind 224, 20 %; against H2O's sums with even budgets of heads", "nats a token, shares minus even",
          against("running", "prefixkv:budget=0.2", "h2o:budget=0.2,newest=0.13,drop=1024")),
    Claim("compresskv-heads", ("keep=compresskv",), "Four heads that retrieve choose better than four others", f"{TENTH}; even budgets",
          "nats a token, found minus random heads", found_heads),
    Claim("compresskv-all", ("keep=compresskv",), "and better than all heads together", "the same", "nats a token, found minus all heads",
          all_heads),
    Claim("compresskv-damage", ("keep=compresskv",), "Budgets by the damage of a layer lose less than even ones", TENTH,
          "nats a token, by damage minus even", by_damage),
    Claim("lazy-eviction-h2o", ("keep=lazy-eviction",), "Slots that come back after quiet times are worth more than heavy hitters",
          "running text, 96 tokens behind 224, 50 %; window 24, against H2O", "nats a token, lazy minus H2O",
          recall("h2o:budget=0.5,drop=24")),
    Claim("lazy-eviction-last", ("keep=lazy-eviction",), "and more than those seldom below an even share",
          "the same, against Scissorhands", "nats a token, lazy minus Scissorhands", recall("scissorhands:budget=184,drop=0.13")),
)  # fmt: skip
