"""What an eviction policy gives up, dropped or stored in few bits."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import numpy as np

from redraft.bench.cache import stored
from redraft.bench.tasks import NEEDLE
from scripts.claims.claim import Claim, Found
from scripts.claims.lab import Lab

LENGTH = 400  # tokens of a text
KEEP = "h2o:budget=0.25"


def peaks(lab: Lab) -> Path:
    """A calibration of MiKV on other text than is scored."""
    from redraft.kv.quantization.mikv import MiKV

    path = lab.folder / "peaks.safetensors"
    if not path.exists():
        text = (Path(sysconfig.get_path("stdlib")) / "tarfile.py").read_text(encoding="utf-8")
        MiKV.calibrate(lab.llm.runner, [lab.llm.tokenizer.encode(text)], samples=4).save(path)
    return path


def coded(lab: Lab, bits: int, balance: bool = True) -> dict[str, str]:
    options = f"profile={peaks(lab)}" if balance else "balance=false"
    return {"keep": KEEP, "codec": f"mikv:bits={bits},{options}"}


def nats(lab: Lab, policy: dict[str, str]) -> np.ndarray:
    """Of each text whose question comes after what the policy saw: what the answer changes against the full cache."""
    return lab.nats(lab.tasks(LENGTH, 8)[NEEDLE[0]], **policy)


def notes(lab: Lab, policies: dict[str, dict[str, str]]) -> list[str]:
    task = lab.tasks(LENGTH, 8)[NEEDLE[0]]
    found = [
        f"{name}: {lab.scores(task, **policy).right.mean():.0%} right, {nats(lab, policy).mean():+.2f}" for name, policy in policies.items()
    ]
    return [f"the full cache: {lab.scores(task).right.mean():.0%} right", *found]


def beats_dropping(lab: Lab) -> Found:
    four, dropped = coded(lab, 4), {"keep": KEEP}
    each = [f"{stored(lab.llm, coded(lab, bits)):.0%}" for bits in (4, 2)]
    share = f"of the bytes of an exact token, one in codes takes {each[0]} with 4 bits, {each[1]} with 2"
    policies = {"evicted": dropped, "4 bits": four, "2 bits": coded(lab, 2), "2 bits, not balanced": coded(lab, 2, False)}
    return Found(nats(lab, four) - nats(lab, dropped), [*notes(lab, policies), share])


def four_bits(lab: Lab) -> Found:
    return Found(nats(lab, coded(lab, 4)), notes(lab, {"4 bits": coded(lab, 4), "4 bits, not balanced": coded(lab, 4, False)}))


def two_bits(lab: Lab) -> Found:
    return Found(nats(lab, coded(lab, 2)) - nats(lab, {"keep": KEEP}))


def balancer(lab: Lab) -> Found:
    return Found(nats(lab, coded(lab, 2)) - nats(lab, coded(lab, 2, False)))


SMALL = f"a fact in {LENGTH} tokens of filler, the question after them, H2O keeps 25 %"
CLAIMS = (
    Claim("mikv-dropped", ("codec=mikv",), "Tokens that are kept in few bits keep what evicting them forgets",
          f"{SMALL}; 4 bits against none", "nats a token, 4 bits minus evicted", beats_dropping),
    Claim("mikv-4-bits", ("codec=mikv",), "Low bits for three quarters of the tokens lose nearly nothing (here: 0.1 nats)",
          f"{SMALL}; 4 bits", "nats a token, change", four_bits, border=-0.1),
    Claim("mikv-2-bits", ("codec=mikv",), "Even 2 bits are better than nothing", f"{SMALL}; 2 bits against none",
          "nats a token, 2 bits minus evicted", two_bits),
    Claim("mikv-balancer", ("codec=mikv",), "A balancer of channels makes 2 bits better", f"{SMALL}; 2 bits",
          "nats a token, with minus without", balancer),
)  # fmt: skip
