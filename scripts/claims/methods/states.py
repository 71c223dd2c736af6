"""What changes hidden states between layers, and the memory of drafts."""

from __future__ import annotations

import time
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import numpy as np

from redraft import LLM, SamplingParams
from redraft.bench import prompts
from redraft.engine.prepend import PLACE, TEXT, Prepend
from scripts.claims.claim import Claim, Found
from scripts.claims.lab import F64, Lab

# ---- the knob of context sensitivity


def knob(lab: Lab) -> Found:
    """Trains on half of the facts, then asks about the others without words of an intent."""
    from redraft_train import knob as trainer
    from redraft_train.conflicts import conflicts, halves

    model = trainer.load(Path(lab.model))
    own, held = halves(conflicts(trainer.known(model), lab.count(300), lab.seed), lab.seed)
    layer = trainer.chosen(trainer.scan(model, own[:48]))
    found = trainer.train(model, own, layer, steps=100, seed=lab.seed)
    folder = trainer.save(found, lab.model, lab.folder / "knob", {}).parent
    steers = [None, f"context-knob:path={folder}", f"context-knob:path={folder},turn=-1"]
    off, context, prior = (np.array([prefers(lab.llm, model, one, steer) for one in held]) for steer in steers)
    flips, shares = context & ~prior, [f"{one.mean():.2f}" for one in (off, context, prior)]
    notes = [f"{len(held)} held-out prompts answer by the context: off {shares[0]}, turned to it {shares[1]}, turned to prior {shares[2]}",
             f"output of layer {layer}, {found.context:+.1f} and {found.prior:+.1f}"]  # fmt: skip
    return Found(flips.astype(float), notes)


def prefers(llm: LLM, model: Any, one: Any, steer: str | None) -> bool:
    """Whether the context's answer is the likelier of the two."""
    answers = {model.first(one.context): 1e4, model.first(one.prior): 1e4}
    params = SamplingParams(temperature=0, max_tokens=1, logit_bias=answers, steer=steer)
    (reply,) = llm.generate(one.prompt, params)
    return reply.outputs[0].token_ids == [model.first(one.context)]


# ---- token prepending

TEMPLATES = (
    f'This sentence : {PLACE} "{TEXT}" means in one word:"',
    f'After thinking step by step , this sentence : {PLACE} "{TEXT}" means in one word:"',
    f'The essence of a sentence lies in its subject and its action. This sentence : {PLACE} "{TEXT}" means in one word:"',
    f'The topic of this text : {PLACE} "{TEXT}" in one word is:"',
)
WORDS = 24  # of a half
START, EXIT = 1, 7


class Pairs:
    """Of each question: its two halves (same question), a half of another one of its category, and one of another category."""

    def __init__(self, given: Seq[prompts.Prompt], seed: int) -> None:
        dice, found = np.random.default_rng(seed), []
        for one in given:
            words = (one.turns[0] if one.turns else one.prompt or "").split()
            size = min(WORDS, len(words) // 2)
            if size >= 6:
                found.append((one.category, " ".join(words[:size]), " ".join(words[size : 2 * size])))
        self.texts, self.others = found, []
        for i, (category, *_) in enumerate(found):
            near = [j for j, other in enumerate(found) if other[0] == category and j != i]
            far = [j for j, other in enumerate(found) if other[0] != category]
            self.others.append((int(dice.choice(near)) if near else i, int(dice.choice(far))))

    def cosines(self, llm: LLM, method: Prepend) -> F64:
        """[questions, 3]: with its other half, with its topic, with another."""
        halves = [np.array(llm.embed([text[k] for text in self.texts], prepend=method)) for k in (1, 2)]
        first, second = halves
        return np.array([[first[i] @ second[j] for j in (i, near, far)] for i, (near, far) in enumerate(self.others)])


def graded(cosines: F64) -> float:
    """Spearman's correlation of the cosines with the grades, whose ranks are means."""
    ranks = cosines.ravel().argsort().argsort().reshape(cosines.shape)
    return float(np.corrcoef(np.tile([2, 1, 0], len(cosines)), ranks.ravel())[0, 1])


def prepending(lab: Lab, given: Seq[prompts.Prompt] | None = None, exit_at: int = EXIT) -> Found:
    pairs = Pairs(prompts.load() if given is None else given, lab.seed)
    found, notes = [], []
    for template in TEMPLATES:
        plain, own = (pairs.cosines(lab.llm, Prepend(START, last, -2, template)) for last in (START, exit_at))
        found.append((plain, own))
        notes.append(f"{graded(plain):.3f} plain, {graded(own):.3f} prepended: {template[:26]}...")

    def gain(chosen: Any) -> float:
        return float(np.mean([graded(own[chosen]) - graded(plain[chosen]) for plain, own in found]))

    count = len(found[0][0])
    return Found([count * gain(np.arange(count)) - (count - 1) * gain(np.arange(count) != i) for i in range(count)], notes)


# ---- memory of drafts

BATCH, SHARE, TOKENS = 16, 0.4, 32


def capped(lab: Lab) -> Found:
    """Tokens by processor time with drafts in 40 % of the memory over those with all of it. The two take turns."""
    from redraft.sched.draft_memory import DraftMemory

    given, count = lab.prompts(lab.llm, 60), 6
    groups = [[given[(10 * g + i) % len(given)] for i in range(BATCH)] for g in range(count)]
    params = SamplingParams(temperature=0.5, seed=lab.seed, max_tokens=TOKENS, ignore_eos=True)
    options = {"draft": "token-recycling", "draft_rows": 8, "draft_total": 64}
    whole = lab.llm.sibling(**options, draft_memory=1 << 40)
    meter, peaks, tree = whole.engine.draft_memory, [0], whole.engine.begin
    assert isinstance(meter, DraftMemory)

    def begin(*of: Any) -> Any:
        begun = tree(*of)
        if begun is not None:
            sizes = [len(one) for one in begun.trees]
            predicted = meter.predict(begun.plan.work, sizes, whole.engine.memory, logits=begun.taps.logits)
            peaks.append(predicted if any(sizes) else 0)
        return begun

    whole.engine.begin = begin  # type: ignore[method-assign]
    asked = [[{"prompt_token_ids": ids} for ids in group] for group in groups]
    whole.generate(asked[0], params)
    peak = max(peaks)
    limit = int(SHARE * peak)
    small = lab.llm.sibling(**options, draft_memory=limit)
    shares, steps = [], []
    for group in asked:
        rates = []
        for llm in (small, whole):
            began = time.process_time()
            found = llm.generate(group, params)
            rates.append(1 / (time.process_time() - began))
            steps.append(sum(one.outputs[0].stats.steps for one in found))
        shares.append(rates[0] / rates[1])
    found_steps = f"steps of texts {sum(steps[0::2])} with it, {sum(steps[1::2])} without"
    notes = [f"peak of a first run {peak / 1e6:.1f} MB, limit {limit / 1e6:.1f} MB; {found_steps}"]
    return Found(shares, notes)


CLAIMS = (
    Claim("context-knob", ("steer=context-knob",), "One direction of one layer decides between context and prior knowledge",
          "fact conflicts from templates, half of the facts held out, no words of an intent; trained for 100 steps",
          "share of answers by the context at +c and by prior knowledge at -c", knob, border=0.5),
    Claim("token-prepending", ("engine=prepend",), "Prepending the last token's state between layers improves embeddings",
          f"halves of questions: same question, same category, other; 4 templates; layers {START} to {EXIT - 1}",
          "Spearman's correlation with the grades, gain over the plain template (jackknife)", prepending),
    Claim("draft-memory", ("sched=draft_memory",), "Drafts keep 96 % of their throughput with 65 % less memory",
          f"batch {BATCH}, temperature 0.5, token-recycling, {1 - SHARE:.0%} less memory", "tokens by processor time, with / without",
          capped, border=0.95),
)  # fmt: skip
