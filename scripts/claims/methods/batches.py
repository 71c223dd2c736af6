"""Batches of prompts that begin alike: which order computes a prefix once, and what it saves to read its keys once."""

from __future__ import annotations

from functools import cache
from random import Random
from typing import Any

from redraft import SamplingParams, registry
from redraft.core.sequence import Request
from redraft.engine.output import checked
from scripts.claims.claim import Claim, Found
from scripts.claims.lab import Lab
from scripts.proofs import batchllm, shared_prefix
from scripts.proofs.batchllm import Counted

# ---- batchllm

DOCUMENTS, EACH, LENGTH, NEW, ROOM = 8, 6, 128, 4, 2.0


@cache
def batches(lab: Lab) -> list[tuple[int, Counted, Counted]]:
    """For each order of arrival: the tokens of all prompts, and the batch under sarathi and batchllm."""
    llm, found = batchllm.loaded(lab.model, LENGTH, ROOM, NEW, threads=lab.threads), []
    for i in range(lab.count(5)):
        prompts = batchllm.batch(llm, DOCUMENTS, EACH, LENGTH, lab.seed + i)
        found.append((sum(map(len, prompts)), *(batchllm.counted(llm, prompts, name, NEW) for name in ("sarathi", "batchllm"))))
    return found


def saves(lab: Lab) -> Found:
    found = batches(lab)
    shares = [[1 - ran.prompt_rows / whole for ran in (lru, ours)] for whole, lru, ours in found]
    return Found([ours - lru for lru, ours in shares], [f"of prompt tokens: {lru:.1%} and {ours:.1%}" for lru, ours in shares[:1]])


def faster(lab: Lab) -> Found:
    return Found([lru.seconds / ours.seconds for _, lru, ours in batches(lab)])


def order(lab: Lab) -> Found:
    """Some documents have long answers, others short ones."""
    llm, found = batchllm.loaded("embedded", 64, 6.0, 48, threads=lab.threads), []
    by_ratio = registry.create("sched", "batchllm", token_budget=64, max_seqs=16, draft_total=0)

    class ByArrival(type(by_ratio)):  # type: ignore[misc]
        """The same groups in order of arrival."""

        def groups(self, waiting: Any, page: int) -> Any:
            return sorted(super().groups(waiting, page), key=lambda one: one[1][0].id)

    for i in range(lab.count(6)):
        dice, prompts = Random(lab.seed + i), batchllm.batch(llm, 12, 4, 64, lab.seed + i)
        long = {tuple(prompt[:64]): dice.random() < 0.5 for prompt in prompts}
        rates = []
        for scheduler in (by_ratio, ByArrival(token_budget=64, max_seqs=16, draft_total=0)):
            llm.engine.table.forget()
            own, llm.engine.scheduler = llm.engine.scheduler, scheduler
            for number, prompt in enumerate(prompts):
                new = 48 if long[tuple(prompt[:64])] else 4
                llm.engine.add(Request(str(number), list(prompt), SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, seed=0)))
            llm.engine.arrange()
            steps = 0
            while llm.engine.has_work:
                steps += bool(checked(llm.engine.step())) or bool(llm.engine.running)
            llm.engine.scheduler = own
            rates.append(steps)
        found.append(rates[1] / rates[0])
    return Found(found)


# ---- hydragen

BATCH, SHORT, LONG, OWN = 64, 64, 1024, 24


@cache
def steps(lab: Lab, prefix: int) -> shared_prefix.Timed:
    llm = shared_prefix.loaded(lab.model, BATCH, prefix, OWN, threads=lab.threads)
    return shared_prefix.compared(llm, shared_prefix.text(llm, prefix), OWN, BATCH, lab.count(7) + 1)


def reads_once(lab: Lab) -> Found:
    found = steps(lab, LONG)
    pairs = list(zip(found.private, found.shared, strict=True))[1:]  # the first warms up
    return Found([private / shared for private, shared in pairs], [f"{found.differing} bytes of logits differ"])


def flat(lab: Lab) -> Found:
    short, long = steps(lab, SHORT), steps(lab, LONG)
    found = [b / a for a, b in zip(short.shared[1:], long.shared[1:], strict=True)]
    private = [b / a for a, b in zip(short.private[1:], long.private[1:], strict=True)]
    return Found(found, [f"with private pages {sum(private) / len(private):.3g}"])


CLAIMS = (
    Claim("batchllm-prefix", ("sched=batchllm",),
          "Grouped by one shared prefix each, 55 % of prompt tokens are saved, 35.8 % by a cache in order of arrival (here: 10 % more)",
          "8 documents of 128 tokens with 6 questions each, shuffled, memory for 2", "share of prompt tokens saved, minus sarathi's",
          saves, border=0.1),
    Claim("batchllm-speed", ("sched=batchllm",), "1.3 to 10.8 times the throughput of engines with a prefix cache", "the same",
          "processor time of the batch, sarathi / batchllm", faster, border=1.3),
    Claim("batchllm-order", ("sched=batchllm",), "Groups with the most new tokens for each prompt token first fill the steps better",
          "12 documents with 4 questions, 48 or 4 new tokens, 64 rows a step; the groups in order of arrival / in this order",
          "steps of the batch, ratio", order, border=1.0),
    Claim("hydragen-speed", ("paper=hydragen",), "Keys of a shared prefix that are read once for all texts make steps faster",
          f"batch {BATCH}, prefix {LONG:,}, equal bits", "time of a step, private pages / shared pages", reads_once, border=1.0),
    Claim("hydragen-flat", ("paper=hydragen",), "A 16 times longer shared prefix costs less than 15 % of the throughput",
          f"batch {BATCH}, from {SHORT} to {LONG:,} tokens, no matrix units", "time of a step, long / short prefix", flat,
          border=1 / 0.85, below=True),
)  # fmt: skip
