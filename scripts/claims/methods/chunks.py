"""Chunks that are attended as one group: what temperature and scale give beyond parallel encoding, on prompts with facts in two chunks."""

from __future__ import annotations

from functools import cache

import numpy as np

from redraft.core.sequence import Wants
from scripts.claims.claim import Claim, Found
from scripts.claims.lab import F64, Lab
from scripts.proofs.chunks import Text, greedy, logs, run, texts, warmed

CHUNKS, LENGTH = 6, 128
GRID = 1.0, 0.9, 0.8, 0.7, 0.6
PARALLEL = 1.0, 1.0
SMALL = f"{CHUNKS} chunks of {LENGTH} tokens, a number in one, whose it is in another; temperature and scale 0.9 as in the paper's code"


@cache
def seen(lab: Lab) -> dict[tuple[float, float], F64]:
    """[texts, 3] for each temperature and scale: the divergence of the next-token distributions of the computed prompt over question and
    answer, nats of a token of the answer, and the same of the computed prompt."""
    total = CHUNKS * LENGTH + 512
    llm = lab.load(prefix_sharing=True, max_model_len=total, cache_memory=4 * total * 24 << 10)
    found: dict[tuple[float, float], list[list[float]]] = {(t, s): [] for t in GRID for s in GRID}
    for place, text in enumerate(texts(llm, [], CHUNKS, LENGTH, lab.count(8))):
        rows, size = len(text.segments[-1]) + len(text.answer), sum(map(len, text.segments))
        wants = Wants(prompt_logprobs=0, logprobs_of=range(size + len(text.answer) - rows + 1, size + len(text.answer)))
        truth = logs(llm, text.request(f"whole {place}", "", greedy(1), text.answer, wants), rows)
        warmed(llm, text)
        for temperature, scale in found:
            request = text.request("kl", f"ape:temperature={temperature},scale={scale}", greedy(1), text.answer, wants)
            own = logs(llm, request, rows)
            away = float((np.exp(truth) * (truth - own)).sum(1).mean())
            found[temperature, scale].append([away, nats(own, text), nats(truth, text)])
        llm.engine.memory.check()
    return {key: np.array(values) for key, values in found.items()}


def nats(logprobs: F64, text: Text) -> float:
    """The mean log-probability of the answer's tokens, which are the last of the prompt."""
    ids = text.answer
    return float(np.mean([logprobs[len(logprobs) - len(ids) - 1 + i, token] for i, token in enumerate(ids)]))


def nearer(lab: Lab) -> Found:
    found = seen(lab)
    table = [f"T {t}: " + ", ".join(f"S {s} {found[t, s][:, 0].mean():.3f}" for s in GRID) for t in GRID]
    return Found(found[PARALLEL][:, 0] - found[0.9, 0.9][:, 0], ["divergence: " + "; ".join(table)])


def grid(lab: Lab) -> Found:
    """Temperature and scale chosen on the other half of the texts."""
    found, values = seen(lab), []
    count = len(found[PARALLEL])
    for i in range(count):
        others = [j for j in range(count) if j % 2 != i % 2]
        best = min(found, key=lambda key: float(found[key][others, 0].mean()))
        values.append(float(found[PARALLEL][i, 0] - found[best][i, 0]))
    return Found(values)


def answers(lab: Lab) -> Found:
    found = seen(lab)
    table = [f"T {t}: " + ", ".join(f"S {s} {found[t, s][:, 1].mean():.2f}" for s in GRID) for t in GRID]
    return Found(found[0.9, 0.9][:, 1] - found[PARALLEL][:, 1], [f"computed {found[PARALLEL][:, 2].mean():.2f}; " + "; ".join(table)])


def right(lab: Lab) -> Found:
    """Right greedy answers minus those of the computed prompt."""
    total = CHUNKS * LENGTH + 512
    llm, values = lab.load(prefix_sharing=True, max_model_len=total, cache_memory=4 * total * 24 << 10), []
    for place, text in enumerate(texts(llm, [], CHUNKS, LENGTH, lab.count(12))):
        given = [text.request(f"answer {place}", "", greedy(10)), text.request("answer", "ape", greedy(10))]
        whole, own = (text.number in llm.tokenizer.decode(run(llm, one)[0]) for one in given)
        values.append(float(own) - float(whole))
    return Found(values)


CLAIMS = (
    Claim("ape-adaptive", ("reuse=ape",), "Sharper and weaker attention to chunks brings parallel encoding nearer to the computed prompt",
          SMALL, "KL to the computed prompt, T = S = 1 minus APE", nearer),
    Claim("ape-grid", ("reuse=ape",), "Temperature and scale that were tuned on other texts bring it nearer",
          f"the same, the best of 5 x 5 on the other half of the texts, {GRID[-1]} to 1", "KL, T = S = 1 minus APE", grid),
    Claim("ape-answers", ("reuse=ape",), "Answers become likelier than with parallel encoding", SMALL,
          "nats a token of the answer, APE minus T = S = 1", answers),
    Claim("ape-quality", ("reuse=ape",), "Keeps 98 % of the quality of computed prompts (here: 2 of 100 answers lost)", SMALL,
          "right answers, APE minus computed", right, border=-0.02),
)  # fmt: skip
