"""Trees that a draft model draws: accepted tokens a step at an equal number of nodes, on the pair in the package at temperature 1."""

from __future__ import annotations

from functools import partial

import numpy as np

from redraft import SamplingParams
from redraft.core.noise import sample_seed
from scripts.claims.claim import Claim, Found
from scripts.claims.lab import F64, Lab

BUDGET, TOKENS = 14, 48
CHAIN, IID, COMBED, BEAM = "draft-model:length=14", "spectr:drafts=4,length=3", "rsd-c:branching=2x2x2", "rsd-s:width=4,depth=3"


def accepted(lab: Lab, draft: str, verify: str, usual: int = 32, rows: int = BUDGET, temperature: float = 1.0) -> F64:
    """Accepted tokens a step of each prompt's text."""
    key = ("accepted", draft, verify, usual, rows, temperature)
    if key not in lab._runs:
        pair = lab.pair
        opened = lab.opened(pair, draft, verify, rows).sibling(draft_total=rows * 64)
        given = lab.prompts(pair, usual)
        params = [
            SamplingParams(temperature=temperature, max_tokens=TOKENS, seed=sample_seed(lab.seed, i), ignore_eos=True)
            for i in range(len(given))
        ]
        outputs = opened.generate([{"prompt_token_ids": ids} for ids in given], params)
        stats = [output.outputs[0].stats for output in outputs]
        if faults := {one.fault for one in stats if one.fault}:
            raise SystemExit(f"{draft}: {faults}")
        lab._runs[key] = np.array([one.accepted / one.steps for one in stats])  # type: ignore[assignment]
    return lab._runs[key]  # type: ignore[return-value]


def better(one: tuple[str, str], other: tuple[str, str], lab: Lab, rows: int = BUDGET) -> Found:
    a, b = (accepted(lab, *way, rows=rows) for way in (one, other))
    return Found(a - b, [f"accepted a step {a.mean():.3f}, against {b.mean():.3f}"])


def best_of(one: tuple[str, str], others: tuple[tuple[str, str], ...], lab: Lab) -> Found:
    """Against the best of the others by its mean."""
    rival = max(others, key=lambda way: accepted(lab, *way).mean())
    found = better(one, rival, lab)
    return Found(found.values, [*found.notes, f"the best other is {rival[0]}"])


def draft_pays(lab: Lab) -> Found:
    pair = lab.pair
    given = lab.prompts(pair, 12)
    texts = lab.texts(pair, "draft-model:length=3", given, tokens=64)
    ratio = lab.speedup(pair, "draft-model:length=3", given, tokens=64)
    return Found(ratio, [f"tokens a step {np.mean([one.rate for one in texts]):.2f}"])


def stop_pays(lab: Lab) -> Found:
    """A forward of the draft counts by its bytes: 0.1 of the target's, and 0.02 for each row of a step."""
    pair = lab.pair
    given = lab.prompts(pair, 24)

    def worth(draft: str) -> F64:
        texts = lab.texts(pair, draft, given, tokens=64)
        return np.array([len(one.ids) / (one.steps + 0.12 * one.drafted) for one in texts])

    fixed = {length: worth(f"draft-model:length={length}") for length in (1, 2, 3, 5, 8)}
    best = max(fixed, key=lambda length: fixed[length].mean())
    stop = max((worth(f"draft-model:length=8,stop={stop}") for stop in (0.3, 0.5, 0.7)), key=np.mean)
    return Found(stop - fixed[best], [f"tokens a weighted forward {stop.mean():.2f}, best fixed length {best}: {fixed[best].mean():.2f}"])


REC, MULTI = "recursive", "multi-candidate"

CLAIMS = (
    Claim("draft-model-pays", ("draft=draft-model",), "Speculative decoding with a small model is 2 to 3 times as fast (here: faster)",
          "pair in the package, greedy, chains of 3, in turns", "processor time, plain / drafted", draft_pays, border=1.0),
    Claim("draft-model-stop", ("draft=draft-model",),
          "Stopping a draft when it becomes unsure beats every fixed length (SpecDec++, 7 to 11 %)",
          "stop at 0.3, 0.5, 0.7 against lengths 1, 2, 3, 5, 8; a drafted token counts 0.12 of a step",
          "tokens a weighted forward, difference", stop_pays),
    Claim("dyspec-trees", ("draft=dyspec",), "A tree grown by the draft's own probabilities beats every fixed tree",
          "14 nodes; the best of chain, i.i.d., RSD-C and RSD-S", "accepted a step, difference",
          partial(best_of, ("dyspec", REC), ((CHAIN, "rejection"), (IID, MULTI), (COMBED, REC), (BEAM, REC)))),
    Claim("rsd-s-beam", ("draft=rsd-s",), "Whole sequences without replacement (RSD-S) beat a fixed branching (RSD-C)",
          "14 nodes", "accepted a step, difference", partial(better, (BEAM, REC), (COMBED, REC))),
    Claim("rsd-c-replacement", ("draft=rsd-c", "verify=recursive"), "Siblings without replacement beat independent ones",
          "14 nodes, RSD-C against 4 chains of 3", "accepted a step, difference", partial(better, (COMBED, REC), (IID, MULTI))),
    Claim("rsd-s-chain", ("draft=rsd-s",), "Trees without replacement beat a chain of as many nodes",
          "14 nodes", "accepted a step, difference", partial(better, (BEAM, REC), (CHAIN, "rejection"))),
    Claim("spectr-drafts", ("draft=spectr", "verify=k-seq"), "Several independent drafts beat one of the same length",
          "4 drafts of 3 tokens with k-SEQ, against one", "accepted a step, difference",
          partial(better, (IID, "k-seq"), ("draft-model:length=3", "rejection"))),
    Claim("multi-candidate-naive", ("verify=multi-candidate",),
          "Testing drafts against residuals accepts more than comparing them with the target's own sample",
          "4 independent drafts of 3 tokens", "accepted a step, minus coupled's",
          partial(better, (IID, MULTI), (IID, "coupled"))),
    Claim("rejection-naive", ("verify=rejection",), "Speculative sampling accepts more than comparing with the target's own sample",
          "chains of 4 tokens; coupled compares, with common noise", "accepted a step, minus coupled's",
          partial(better, ("draft-model:length=4", "rejection"), ("draft-model:length=4", "coupled"))),
    Claim("typical-accepts", ("verify=typical",), "Typical acceptance, which is not exact, keeps longer drafts at high temperature",
          "chains of 4 tokens", "accepted a step, minus rejection's",
          partial(better, ("draft-model:length=4", "typical"), ("draft-model:length=4", "rejection"))),
)  # fmt: skip
