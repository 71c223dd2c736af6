"""Papers whose lesson the engine follows, without a method of their own."""

from __future__ import annotations

import time

import numpy as np

from redraft import LLM, SamplingParams
from redraft.core.noise import sample_seed
from scripts.claims.claim import Claim, Found
from scripts.claims.lab import F64, Lab
from scripts.claims.rotary import OFFSETS, shift_errors

DRAFTS = ("draft-model:length=4", "token-recycling")
BATCH, TOKENS, ROUNDS = 8, 48, 5


def ragged(lab: Lab) -> list[list[int]]:
    """Eight prompts of different lengths."""
    given = sorted(lab.prompts(lab.pair, 40), key=len)
    return given[:: max(1, len(given) // BATCH)][:BATCH]


def together(llm: LLM, given: list[list[int]], params: list[SamplingParams]) -> tuple[list[list[int]], float]:
    """The texts of one batch, and the processor time."""
    began = time.process_time()
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in given], params)
    return [output.outputs[0].token_ids for output in outputs], time.process_time() - began


def rounds(lab: Lab) -> tuple[list[float], list[float]]:
    """(1.0 for each text that is the same in a batch of eight and alone, the time of eight alone over that of the batch in each round)."""
    if "rounds" not in lab._runs:
        given, same, ratios = ragged(lab), [], []
        for draft in DRAFTS:
            llm = lab.opened(lab.pair, draft).sibling(draft_total=16 * BATCH)
            for turn in range(ROUNDS):
                params = [
                    SamplingParams(temperature=turn % 2, max_tokens=TOKENS, ignore_eos=True, seed=sample_seed(lab.seed + turn, i))
                    for i in range(len(given))
                ]
                texts, batched = together(llm, given, params)
                alone, seconds = zip(*(together(llm, [ids], [one]) for ids, one in zip(given, params, strict=True)), strict=True)
                same += [float(text == own) for text, (own,) in zip(texts, alone, strict=True)]
                ratios.append(sum(seconds) / batched)
        lab._runs["rounds"] = same, ratios  # type: ignore[assignment]
    return lab._runs["rounds"]  # type: ignore[return-value]


def batch_same(lab: Lab) -> Found:
    same, _ = rounds(lab)
    lengths = [len(ids) for ids in ragged(lab)]
    return Found(same, [f"{sum(same):.0f} of {len(same)} texts equal; prompts of {min(lengths)} to {max(lengths)} tokens"])


def batch_pays(lab: Lab) -> Found:
    return Found(rounds(lab)[1])


def shifts(lab: Lab, dtype: str) -> F64:
    """[pairs, offsets, (key 0, other keys)]"""
    return shift_errors(lab.count(32), dtype, lab.seed)


def bf16_grows(lab: Lab) -> Found:
    """Angles as Redraft computes them: in float64, whatever the dtype of keys."""
    found, notes = shifts(lab, "bfloat16"), []
    for dtype in ("float32", "bfloat16"):
        means = shifts(lab, dtype).mean(0)
        for i, key in enumerate(("key 0", "other keys")):
            notes.append(f"{dtype}, {key}: " + ", ".join(f"{one:.1e} at {at:,}" for one, at in zip(means[:, i], OFFSETS, strict=True)))
    far, near = found[:, OFFSETS.index(100_000)].mean(1), found[:, OFFSETS.index(1_000)].mean(1)
    return Found(np.log2(far / near), notes)


def bf16_angles(lab: Lab) -> Found:
    """Angles in bfloat16, as the paper found them in training."""
    found = shift_errors(lab.count(32), "bfloat16", lab.seed, exact=False)
    means = found.mean((0, 2))
    return Found(
        np.log2(found[:, 1].mean(1) / found[:, 0].mean(1)),
        [", ".join(f"{one:.1e} at {at:,}" for one, at in zip(means, OFFSETS, strict=True))],
    )


CLAIMS = (
    Claim("batch-spec-done-right-same", ("paper=batch-spec-done-right",),
          "Texts of a batch that accept different numbers of tokens equal those that run alone",
          "8 prompts of different lengths, two drafters, greedy and sampled, float32; pages need no realignment and no grouping (EXSPEC)",
          "share of equal texts", batch_same, border=0.99),
    Claim("batch-spec-done-right-pays", ("paper=batch-spec-done-right",),
          "A batch of 8 has up to 3 times the throughput of batch 1 (here: more)",
          "the same", "processor time, alone / batch of 8", batch_pays, border=1.0),
    Claim("anchor-attention-shift", ("paper=anchor-attention",),
          "In bfloat16 a shift of all positions changes scores, the more the farther",
          "angles in float64, turned vectors rounded to bfloat16", "log2 of the error at 100,000 / at 1,000", bf16_grows),
    Claim("anchor-attention-angles", ("paper=anchor-attention",), "The same where the angles themselves are in bfloat16",
          "angles in bfloat16, which Redraft never has", "log2 of the error at 1,000 / at 0", bf16_angles),
)  # fmt: skip
