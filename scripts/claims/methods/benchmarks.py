"""What benchmarks of cache policies claim: whether a policy knew the question decides."""

from __future__ import annotations

from redraft.bench.tasks import FACTS, NEEDLE
from scripts.claims.claim import Claim, Found
from scripts.claims.lab import Lab

LENGTH = 400  # tokens of a text
EVICTS, READS = {"keep": "snapkv:budget=0.25"}, {"read": "page-top-k:tokens=128"}


def question_seen(lab: Lab) -> Found:
    after, within = (lab.tasks(LENGTH, 6)[name] for name in NEEDLE)
    right = [f"{lab.scores(task, **policy).right.mean():.0%}" for task in (within, after) for policy in (EVICTS, {})]
    notes = [f"right: question in the context {right[0]}, full cache {right[1]}; after it {right[2]}, full cache {right[3]}"]
    return Found(lab.nats(within, **EVICTS) - lab.nats(after, **EVICTS), notes)


def whole_cache_read(lab: Lab) -> Found:
    task = lab.tasks(LENGTH, 6)[FACTS[1]]
    reads, evicts = lab.nats(task, **READS), lab.nats(task, **EVICTS)
    return Found(reads - evicts, [f"against the full cache: sparse reads {reads.mean():+.2f}, eviction {evicts.mean():+.2f} nats a token"])


CLAIMS = [
    Claim(
        "scbench-question-seen",
        ("keep=snapkv",),
        "SCBench: a policy that keeps what the first question needs looks perfect in tests with one turn, and loses what later "
        "requests on the same context ask for",
        "SnapKV keeps 25 % of 400 tokens; a question about a fact in filler stands in the context, or comes after the eviction",
        "nats a token of the answer, with the question seen minus not seen",
        question_seen,
    ),
    Claim(
        "scbench-whole-cache",
        ("read=page-top-k",),
        "SCBench: methods that keep the whole cache and read a part of it stay robust where evictions collapse",
        "five questions about one context of 400 tokens: page-top-k reads 128 tokens, SnapKV keeps 25 %",
        "nats a token of the answers, sparse reads minus eviction",
        whole_cache_read,
    ),
]
