"""CacheBlend on prompts of six chunks whose caches were computed apart: how near to the computed prompt, and how fast."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np

from redraft import registry
from redraft.card import Card, Guarantee
from redraft.core.sequence import Wants
from redraft.kv.reuse.cacheblend import CacheBlend
from redraft.kv.reuse.reuse import Pass, Repair, Spliced
from scripts.claims.claim import Claim, Found
from scripts.claims.lab import F64, Lab
from scripts.proofs.chunks import greedy, logs, run, texts, warmed

CHUNKS, LENGTH = 6, 256
PAPER, NEAR, ANY = "cacheblend:ratio=0.15", "cacheblend:ratio=0.15,nearness=0.5", "any-rows:ratio=0.15"
SMALL = f"{CHUNKS} chunks of {LENGTH} tokens with facts in two, 15 % of the rows run again"


@dataclass(frozen=True)
class AnyRows(CacheBlend):
    """As many rows, chosen at random."""

    card: ClassVar[Card] = Card("Rows at random", "none", Guarantee.LOSSY)

    def repair(self, text: Spliced) -> Repair:
        rows = np.random.default_rng(len(text.rows)).permutation(text.rows)[: int(self.ratio * len(text.rows))]
        yield Pass(np.sort(rows))


@cache
def seen(lab: Lab) -> dict[str, F64]:
    """[texts, 2] for each method: the divergence of its next-token distributions from those of the computed prompt, over question and
    answer, and how many times as fast the first token comes, in processor time."""
    registry.METHODS["reuse"]["any-rows"] = f"{__name__}:AnyRows"
    total = CHUNKS * LENGTH + 512
    llm = lab.load(prefix_sharing=True, max_model_len=total, cache_memory=4 * total * 24 << 10)
    found: dict[str, list[list[float]]] = {name: [] for name in (PAPER, NEAR, ANY)}
    try:
        for place, text in enumerate(texts(llm, [], CHUNKS, LENGTH, lab.count(6))):
            rows, size = len(text.segments[-1]) + len(text.answer), sum(map(len, text.segments))
            wants = Wants(prompt_logprobs=0, logprobs_of=range(size + len(text.answer) - rows + 1, size + len(text.answer)))
            truth = logs(llm, text.request(f"whole {place}", "", greedy(1), text.answer, wants), rows)
            warmed(llm, text)
            whole = run(llm, text.request(f"time {place}", "", greedy(1)))[1]
            for name, values in found.items():
                own = logs(llm, text.request("kl", name, greedy(1), text.answer, wants), rows)
                taken = run(llm, text.request("time", name, greedy(1)))[1]
                values.append([float((np.exp(truth) * (truth - own)).sum(1).mean()), whole / taken])
            llm.engine.memory.check()
    finally:
        del registry.METHODS["reuse"]["any-rows"]
    return {name: np.array(values) for name, values in found.items()}


def near(name: str):  # type: ignore[no-untyped-def]
    return lambda lab: Found(seen(lab)[name][:, 0])


def chosen(lab: Lab) -> Found:
    return Found(seen(lab)[ANY][:, 0] - seen(lab)[PAPER][:, 0])


def last_rows(lab: Lab) -> Found:
    return Found(seen(lab)[PAPER][:, 0] - seen(lab)[NEAR][:, 0])


def faster(lab: Lab) -> Found:
    return Found(seen(lab)[PAPER][:, 1])


CLAIMS = (
    Claim("cacheblend-rows", ("reuse=cacheblend",), "15 % of the rows suffice (here: KL to the computed prompt below 0.05)",
          SMALL, "KL over question and answer", near(PAPER), border=0.05, below=True),
    Claim("cacheblend-chosen", ("reuse=cacheblend",), "The rows that differ most are better than as many others",
          SMALL, "KL, rows at random minus CacheBlend", chosen),
    Claim("cacheblend-nearness", ("reuse=cacheblend",), "Our own: to prefer rows near the end brings it nearer still",
          SMALL, "KL, nearness 0 minus 0.5", last_rows),
    Claim("cacheblend-time", ("reuse=cacheblend",), "The first token comes 2.2 to 3.3 times as fast as with the whole prompt computed",
          SMALL, "processor time to the first token, computed / CacheBlend", faster, border=2.2),
)  # fmt: skip
