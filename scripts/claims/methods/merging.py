"""Policies that merge slots: what merging keeps beyond dropping the same slots, and what their other rules are worth."""

from __future__ import annotations

from redraft.bench.tasks import Task, Wanted, build, sources
from scripts.claims.claim import Claim, Found
from scripts.claims.lab import Lab

GIVEN, LENGTH = 224, 320  # tokens of a text that count as its prompt, and all


def running(lab: Lab) -> Task:
    wanted = Wanted(length=LENGTH, count=lab.count(6), given=GIVEN, seed=lab.seed)
    return {task.name: task for task in build(lab.llm.tokenizer, sources([]), wanted, LENGTH)}["standard library"]


def against(task: str, one: str, other: str):  # type: ignore[no-untyped-def]
    """A run whose number is what a text keeps with one policy beyond the other."""

    def run(lab: Lab) -> Found:
        chosen = running(lab) if task == "running" else lab.tasks(LENGTH, 8)["key-value, multi-turn"]
        a, b = lab.nats(chosen, keep=one), lab.nats(chosen, keep=other)
        return Found(a - b, [f"against the full cache {a.mean():+.3f}, the other {b.mean():+.3f}"])

    return run


MERGED = "nats a token, merged minus dropped"
TEXT = f"running text, {LENGTH - GIVEN} tokens behind {GIVEN}"
CLAIMS = (
    Claim("elastic-cache-half", ("keep=elastic-cache",), "Merging tokens into the nearest kept ones loses less than dropping them",
          f"{TEXT}, 50 %", MERGED, against("running", "elastic-cache:budget=0.5", "elastic-cache:budget=0.5,merge=false")),
    Claim("elastic-cache-fifth", ("keep=elastic-cache",), "So it does at a fifth", f"{TEXT}, 20 %", MERGED,
          against("running", "elastic-cache:budget=0.2", "elastic-cache:budget=0.2,merge=false")),
    Claim("d2o-merge", ("keep=d2o",), "Evicted tokens that join similar ones are not lost", f"{TEXT}, 20 %", MERGED,
          against("running", "d2o:budget=0.2", "d2o:budget=0.2,merge=false")),
    Claim("d2o-layers", ("keep=d2o",), "Budgets by the variance of attention lose less than even ones", f"{TEXT}, 20 %, without merging",
          "nats a token, by variance minus even",
          against("running", "d2o:budget=0.2,merge=false", "d2o:budget=0.2,merge=false,adaptive=false")),
    Claim("ems-merge", ("keep=ems",), "At very small budgets evicting and merging loses less than evicting", f"{TEXT}, 5 %", MERGED,
          against("running", "ems:budget=0.05,window=8", "ems:budget=0.05,window=8,similar=1")),
    Claim("ems-global", ("keep=ems",), "The larger of both scores finds more than the global one",
          f"five questions about key-value pairs in {LENGTH} tokens, 25 %", "nats a token, both minus global",
          against("pairs", "ems:budget=0.25,window=16", "ems:budget=0.25,window=16,score=global")),
    Claim("ems-local", ("keep=ems",), "and more than the local one", "the same", "nats a token, both minus local",
          against("pairs", "ems:budget=0.25,window=16", "ems:budget=0.25,window=16,score=local")),
    Claim("kvmerger-merge", ("keep=kvmerger",), "Runs of similar keys lose less if they are merged than if their pivot stays alone",
          f"{TEXT}, cosines above 0.8", MERGED, against("running", "kvmerger:similar=0.8", "kvmerger:similar=0.8,weights=pivot")),
    Claim("kvmerger-gaussian", ("keep=kvmerger",), "Gaussian weights are at least as good as plain means", "the same",
          "nats a token, Gaussian minus mean", against("running", "kvmerger:similar=0.8", "kvmerger:similar=0.8,weights=mean")),
    Claim("kvmerger-count", ("keep=kvmerger",), "A slot that counts as its tokens keeps the mass of the run (ours)", "the same",
          "nats a token, counted minus plain", against("running", "kvmerger:similar=0.8,count=true", "kvmerger:similar=0.8")),
)  # fmt: skip
