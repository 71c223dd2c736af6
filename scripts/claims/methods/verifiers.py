"""Rules of verification at single nodes, on distributions of the pair in the package, and whole texts that must not change."""

from __future__ import annotations

from typing import Any

import numpy as np

from redraft import registry
from redraft.bench.divergence import rows
from redraft.core.tree import Kind
from redraft.verify import bound
from scripts.claims.claim import Claim, Found
from scripts.claims.lab import F64, Lab

EVERY, DRAWS, CHILDREN = 6, 24, 3


def nodes(lab: Lab, temperature: float, usual: int = 12) -> list[list[tuple[F64, F64]]]:
    """Of each text: (target, draft) distributions after some of its tokens."""
    pair = lab.pair
    texts = [ids[:96] for ids in lab.prompts(pair, usual)]
    draft = lab.load("embedded-draft", dtype="float32")
    found = []
    for ids in texts:
        both = [list(rows(llm, ids)) for llm in (pair, draft)]
        found.append([tuple(softmax(one[at] / temperature) for one in both) for at in range(16, len(ids), EVERY)])
    return found


def softmax(logits: F64) -> F64:
    weights = np.exp(logits - logits.max())
    return np.asarray(weights / weights.sum())


def by_text(lab: Lab, temperature: float, measure: Any) -> list[float]:
    """The mean over the nodes of each text."""
    dice = np.random.default_rng(lab.seed)
    return [float(np.mean([measure(p, q, dice) for p, q in text])) for text in nodes(lab, temperature)]


def drawn_acceptance(name: str, p: F64, q: F64, kind: Kind, dice: np.random.Generator) -> float:
    """The mean acceptance of a rule over draws of CHILDREN tokens."""
    rule = registry.create("verify", name)
    found = []
    for _ in range(DRAWS):
        if kind is Kind.IID:
            tokens = dice.choice(len(q), CHILDREN, p=q)
        else:  # the largest of log q + Gumbel noise are draws without replacement
            tokens = np.argsort(-(np.log(np.maximum(q, 1e-300)) + dice.gumbel(size=len(q))), kind="stable")[:CHILDREN]
        found.append(bound.acceptance(rule, p, q, tokens.tolist(), kind))
    return float(np.mean(found))


def without_beats_with(lab: Lab) -> Found:
    return Found(by_text(lab, 1.0, lambda p, q, dice: bound.without_replacement(p, q, CHILDREN) - bound.independent(p, q, CHILDREN)))


def top(q: F64) -> list[int]:
    return list(np.argsort(-q, kind="stable")[: CHILDREN - 1])


def greedy_at(temperature: float) -> Any:
    def run(lab: Lab) -> Found:
        def gain(p: F64, q: F64, dice: np.random.Generator) -> float:
            return bound.top_plus_one(p, q, top(q)) - drawn_acceptance("recursive", p, q, Kind.WITHOUT_REPLACEMENT, dice)

        return Found(by_text(lab, temperature, gain))

    return run


def k_seq_share(lab: Lab) -> Found:
    def share(p: F64, q: F64, dice: np.random.Generator) -> float:
        return drawn_acceptance("k-seq", p, q, Kind.IID, dice) / bound.independent(p, q, CHILDREN)

    return Found(by_text(lab, 1.0, share))


def mixing(lab: Lab) -> Found:
    rules = [registry.create("verify", name) for name in ("rapid", "rapid:eta=0")]

    def gain(p: F64, q: F64, dice: np.random.Generator) -> float:
        mixed, plain = (float(np.minimum(rule.mixed(p, q), q).sum()) for rule in rules)
        return mixed - plain

    return Found(by_text(lab, 1.0, gain))


def same_text(lab: Lab) -> Found:
    """The share of prompts whose text is that of plain decoding, at temperature 1, under two drafters."""
    pair = lab.pair
    given = lab.prompts(pair, 24)
    drafts = ("none", "rsd-s:width=4,depth=3", "token-recycling")
    texts = [[one.ids for one in lab.texts(pair, draft, given, tokens=64, temperature=1.0)] for draft in drafts]
    return Found([float(a == b == c) for a, b, c in zip(*texts, strict=True)])


def judged(lab: Lab) -> Found:
    """A judge trained on half of the prompts, on tokens after the others."""
    from redraft_train import judge

    llm, draft = lab.pair, lab.load("embedded-draft", dtype="float32")
    given = [ids[:96] for ids in lab.prompts(llm, 40)]
    found = judge.examples(llm, draft, given, 32)
    held = found.text % 2 == 1
    fitted = judge.fit(found.of(~held))
    chances, values = fitted.chances(found.states), []
    for text in np.unique(found.text[held]):
        right, wrong = (chances[(found.text == text) & (found.right == label)] for label in (True, False))
        if len(right) and len(wrong):
            values.append(float(right.mean() - wrong.mean()))
    path = judge.save(fitted, llm, lab.folder / "judge", {})
    rates = {
        verify: lab.rates(llm, "draft-model:length=6", given[1::2], verify=verify).mean()
        for verify in ("coupled", *(f"judge:path={path},t={t}" for t in (0.9, 0.5)), "judge:t=0")
    }
    notes = [f"{found.right.mean():.0%} of {len(found.right)} tokens are right", *judge.report(fitted, found.of(held)).values()]
    shown = zip(("plain rule", "t = 0.9", "t = 0.5", "t = 0"), rates.values(), strict=True)
    return Found(values, [*notes, "tokens a step: " + ", ".join(f"{name} {rate:.2f}" for name, rate in shown)])


CLAIMS = (
    Claim("coupled-same-text", ("verify=coupled",), "Verification of a tree keeps the target's output (here: the text itself)",
          "24 prompts x 64 tokens at temperature 1, two drafters, against plain decoding", "share of equal texts", same_text, border=0.99),
    Claim("optimal-multi-draft-bounds", ("draft=optimal-multi-draft",),
          "The best possible acceptance is higher without replacement than with",
          "3 children, nodes of 12 texts, temperature 1", "bound, without minus with", without_beats_with),
    Claim("greedy-multi-draft-cold", ("verify=greedy-multi-draft", "draft=optimal-multi-draft"),
          "Top tokens and a random one are accepted more than draws without replacement, at low temperature",
          "3 children, temperature 0.5; its rule reaches its bound", "acceptance, minus recursive's", greedy_at(0.5)),
    Claim("greedy-multi-draft-hot", ("verify=greedy-multi-draft", "draft=optimal-multi-draft"),
          "The same at high temperature, where the order may flip",
          "3 children, temperature 1.5", "acceptance, minus recursive's", greedy_at(1.5)),
    Claim("judge-knows", ("verify=judge",), "The target's state behind a token tells if the text is still right (joins its own)",
          "a judge trained on 20 prompts, forced tokens after 20 others", "chance given to right tokens, minus wrong ones", judged),
    Claim("rapid-accepts", ("verify=rapid", "draft=rapid"), "Mixing the draft's distribution into the target's raises acceptance",
          "nodes of 12 texts, temperature 1, eta 10", "accepted share, minus rejection's", mixing),
    Claim("k-seq-share", ("verify=k-seq",), "k-SEQ accepts at least 1 - 1/e of what any rule could for independent drafts",
          "3 draws, nodes of 12 texts", "acceptance / best possible", k_seq_share, border=1 - 1 / np.e),
)  # fmt: skip
