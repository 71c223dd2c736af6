"""Fewer kv heads: nats that running text loses when those of SmolLM2 become one (python -m redraft_train.gqa)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from redraft.bench import cache
from redraft.models import loader
from scripts.claims.claim import Claim, Found
from scripts.claims.lab import F64, Lab
from scripts.claims.methods.caches import running
from scripts.claims.methods.premises import calibration

KV_HEADS = 1


def logprobs(lab: Lab, pool: str | None) -> F64:
    """The mean log-probability of each text, of the model or of one whose kv heads were joined."""
    model = None
    if pool is not None:
        from redraft_train.gqa import write

        folder = lab.folder / f"kv-heads-{pool}"
        if not folder.exists():
            write(Path(loader.resolve(lab.model)), folder, KV_HEADS, calibration(), pool)
        model = str(folder)
    task = running(lab)
    return np.asarray(cache.score(lab.load(model), task, task.probes, cache.FULL, 4, lambda what: None).logprobs.mean(1))


def loss(lab: Lab) -> Found:
    return Found(logprobs(lab, "svd") - logprobs(lab, None), [f"kv heads of {lab.llm.spec.kv_heads} become {KV_HEADS}"])


def against_mean(lab: Lab) -> Found:
    exact, svd, mean = (logprobs(lab, pool) for pool in (None, "svd", "mean"))
    return Found(svd - mean, [f"against the model: by SVD {np.mean(svd - exact):+.2f}, by the mean {np.mean(mean - exact):+.2f} nats"])


CLAIMS = (
    Claim("kv-heads-svd", ("train=gqa",), "kv heads joined by SVD of their caches keep more than their mean",
          "all kv heads of SmolLM2 to one, calibrated on other text, not tuned", "nats a token, SVD minus mean", against_mean),
    Claim("kv-heads-loss", ("train=gqa",), "A quarter to a half of the kv heads does nearly as well (here: 0.1 nats)",
          "the same, 3 kv heads to one, without the tuning of the paper", "nats a token, change", loss, border=-0.1),
)  # fmt: skip
