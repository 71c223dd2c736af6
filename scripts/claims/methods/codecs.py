"""Forms in which older pages are stored: what 2 bits lose, what factors and outliers repair, which channels of keys are missed least."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import numpy as np

from redraft import SamplingParams
from redraft.bench.cache import stored
from redraft.core.sequence import Wants
from scripts.claims.claim import Claim, Found
from scripts.claims.lab import Lab
from scripts.claims.methods.caches import running

MOST, CELLS = 1024, 256  # tokens of which log-probabilities are asked, and those of the exact distribution that are compared
BARE, RANK, BOTH, FOUR = (f"gear:{options},block=32" for options in ("rank=0,outliers=0", "outliers=0", "bits=2", "bits=4"))


def divergences(lab: Lab, codec: str) -> np.ndarray:
    """Of each text: the mean KL divergence from the full cache over the scored tokens, each given the same tokens before it. Tokens that
    are unlikely in one of the two count as one."""
    both = zip(rows(lab, ""), rows(lab, codec), strict=True)
    return np.array([np.mean([divergence(*pair) for pair in zip(*text, strict=True)]) for text in both])


def rows(lab: Lab, codec: str) -> list[list[dict[int, float]]]:
    """Log-probabilities by token, for each scored token of each text."""
    if (key := ("rows", codec)) not in lab._runs:
        params, found = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=MOST, ignore_eos=True, codec=codec or None), []
        for probe in running(lab).probes:
            wants = Wants(logprobs_of=[at for _, first, last in probe.answers for at in range(first, last)])
            output = lab.llm.generate([{"prompt_token_ids": probe.ids, "context": probe.context, "wants": wants}], params)[0]
            found.append([dict(one.top) for one in output.prompt_logprobs or () if one is not None])
        lab._runs[key] = found  # type: ignore[assignment]
    return lab._runs[key]  # type: ignore[return-value]


def divergence(exact: dict[int, float], other: dict[int, float]) -> float:
    common = [token for token in sorted(exact, key=exact.__getitem__)[-CELLS:] if token in other]
    p, q = (np.exp([one[token] for token in common]) for one in (exact, other))
    p, q = (np.clip(np.append(x, 1 - x.sum()), 1e-12, None) for x in (p, q))
    return float((p * np.log(p / q)).sum())


def share(lab: Lab, codec: str) -> str:
    return f"{stored(lab.llm, {'codec': codec}):.0%} of the bytes of an exact token"


def repaired(one: str, other: str):  # type: ignore[no-untyped-def]
    """A run whose number is what `other` diverges less than `one`."""

    def run(lab: Lab) -> Found:
        found = {codec: divergences(lab, codec) for codec in dict.fromkeys((BARE, one, other, "int4:block=32"))}
        notes = [f"{codec}: KL {values.mean():.4f}, {share(lab, codec)}" for codec, values in found.items()]
        return Found(found[one] - found[other], notes)

    return run


def four_bits(lab: Lab) -> Found:
    base = "int4:block=32"
    return Found(divergences(lab, FOUR), [share(lab, FOUR), f"{base}: KL {divergences(lab, base).mean():.4f}, {share(lab, base)}"])


def two_bits(lab: Lab) -> Found:
    codec = "kivi:block=32"
    return Found(lab.nats(running(lab), codec=codec), [share(lab, codec)])


def queries(lab: Lab, kind: str) -> Path:
    """A calibration of ThinK on other text than is scored; `norm`: the same for all channels; `random`: it outweighs all keys."""
    from redraft.kv.quantization.think import Queries, ThinK

    path = lab.folder / f"queries-{kind}.safetensors"
    if not path.exists():
        text = (Path(sysconfig.get_path("stdlib")) / "tarfile.py").read_text(encoding="utf-8")
        made = ThinK.calibrate(lab.llm.runner, [lab.llm.tokenizer.encode(text)], samples=2)
        dice = np.random.default_rng(lab.seed).random(made.scores.shape, np.float32)
        scores = {"norm": np.ones_like(made.scores), "random": 10 ** (20 * dice)}
        Queries(scores.get(kind, made.scores), made.model, made.texts, made.tokens).save(path)
    return path


def thin(lab: Lab, part: float, kind: str = "queries") -> np.ndarray:
    return lab.nats(running(lab), codec=f"think:share={part},block=32,profile={queries(lab, kind)}")


def think_loss(lab: Lab) -> Found:
    lost = {part: thin(lab, part) for part in (0.3, 0.4, 0.5, 0.6, 0.75)}
    notes = [f"without {part:.0%} of the channels {values.mean():+.3f} nats" for part, values in lost.items()]
    return Found(lost[0.4], [*notes, "without 40 %: " + share(lab, f"think:profile={queries(lab, 'queries')}")])


def think_beats(kind: str):  # type: ignore[no-untyped-def]
    def run(lab: Lab) -> Found:
        mine, other = thin(lab, 0.6), thin(lab, 0.6, kind)
        return Found(mine - other, [f"against the full cache {mine.mean():+.3f}, the other {other.mean():+.3f}"])

    return run


TEXTS = "running text of 256 tokens, "
CLAIMS = (
    Claim("kivi-2-bits", ("codec=kivi",), "2 bits with a grid for each channel of the keys keep the quality (here: 0.05 nats)",
          TEXTS + "2 bits", "nats a token, change", two_bits, border=-0.05),
    Claim("gear-rank", ("codec=gear",), "Factors of the error repair what 2 bits lose", TEXTS + "2 bits: codes alone, and with rank 1",
          "KL a token, alone minus with factors", repaired(BARE, RANK)),
    Claim("gear-outliers", ("codec=gear",), "Outliers stored apart repair more",
          TEXTS + "2 bits, rank 1: without outliers, and with 1 of a kind",
          "KL a token, without minus with", repaired(RANK, BOTH)),
    Claim("gear-4-bits", ("codec=gear",), "With 4 bits nothing is lost that can be seen (here: a KL of 0.01)", TEXTS + "4 bits",
          "KL a token", four_bits, border=0.01, below=True),
    Claim("think-loss", ("codec=think",), "40 % of the channels of keys can be left out (here: 0.05 nats)", TEXTS + "40 %",
          "nats a token, change", think_loss, border=-0.05),
    Claim("think-queries", ("codec=think",), "Queries and keys choose better channels than keys alone", TEXTS + "60 %",
          "nats a token, both minus keys alone", think_beats("norm")),
    Claim("think-random", ("codec=think",), "Chosen channels are better than random ones", TEXTS + "60 %",
          "nats a token, chosen minus random", think_beats("random")),
)  # fmt: skip
