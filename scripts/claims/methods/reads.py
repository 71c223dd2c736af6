"""Sparse reads on SmolLM2: five facts in a text, then a question about each, with a quarter of the text read."""

from __future__ import annotations

from redraft.bench.tasks import Task
from scripts.claims.claim import Claim, Found
from scripts.claims.lab import Lab
from scripts.claims.methods.caches import profile

LENGTH, BUDGET = 512, 128  # tokens
SENTENCES = {"read": f"sentencekv:tokens={BUDGET},start=4,recent=16,longest=32"}
PAGES = {"read": f"page-top-k:tokens={BUDGET}"}
EVICTED = {"keep": f"snapkv:budget={BUDGET}"}
NATS, SMALL = "nats a token of the answers", "facts about 5 persons in 512 tokens, then 5 questions; 128 tokens are read"


def stated(lab: Lab) -> Task:
    return lab.tasks(LENGTH, 8)["facts, multi-turn"]


def against(other: dict[str, str]):  # type: ignore[no-untyped-def]
    """A run whose number is what a text keeps with sentences beyond the other policy."""

    def run(lab: Lab) -> Found:
        right = [f"{lab.scores(stated(lab), **one).right.mean():.0%}" for one in (SENTENCES, other, {})]
        a, b = lab.nats(stated(lab), **SENTENCES), lab.nats(stated(lab), **other)
        notes = [
            f"against the full cache {a.mean():+.2f}, the other {b.mean():+.2f}",
            "answers right {}, the other {}, full cache {}".format(*right),
        ]
        return Found(a - b, notes)

    return run


def channels(lab: Lab) -> Found:
    return against({"read": f"double-sparsity:tokens={BUDGET},factor=4,profile={profile(lab)}"})(lab)


def loss(lab: Lab) -> Found:
    return Found(lab.nats(stated(lab), **SENTENCES))


CLAIMS = (
    Claim("sentencekv-pages", ("read=sentencekv",), "Sentences keep whole facts: better than pages (Quest) at equal budget",
          SMALL, f"{NATS}, sentences minus pages", against(PAGES)),
    Claim("sentencekv-tokens", ("read=sentencekv",), "Better than tokens that are kept for all questions (SnapKV) at equal budget",
          SMALL, f"{NATS}, sentences minus SnapKV", against(EVICTED)),
    Claim("sentencekv-channels", ("read=sentencekv",), "As good as single tokens that the query chooses (Double Sparsity; here: 0.1 nats)",
          SMALL, f"{NATS}, sentences minus Double Sparsity", channels, border=-0.1),
    Claim("sentencekv-loss", ("read=sentencekv",), "A quarter of the tokens loses little (here: 0.1 nats)",
          SMALL, f"{NATS}, change", loss, border=-0.1),
)  # fmt: skip
