"""Text whose cache is kept at another place: spans that nobody declared, and chunks with the cache of earlier prompts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from functools import cache
from random import Random
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from redraft import LLM, SamplingParams
from redraft.bench.tasks import sources
from redraft.core.sequence import Request, Wants
from redraft.engine.output import Progress, Stats, checked
from redraft.kv.reuse import kvshare
from redraft.ops.arrays import array
from redraft.ops.format import PAGE
from scripts.claims.claim import Claim, Found
from scripts.claims.lab import Lab

F64 = NDArray[np.float64]
ONE = SamplingParams(temperature=0, max_tokens=1, seed=0, ignore_eos=True)
NUMBERS = itertools.count()


def loaded(lab: Lab) -> LLM:
    return lab.load(max_model_len=1024, cache_memory="400MB", prefix_sharing=True)


@cache
def book(lab: Lab) -> list[int]:
    llm = loaded(lab)
    return [token for texts in sources([]).values() for text in texts for token in llm.tokenizer.encode(text[:200_000], special=False)]


def logs(llm: LLM, request: Request, rows: int = 1, forced: Seq[int] = ()) -> F64:
    """Log-probabilities [rows, V] after the last `rows` tokens of a prompt, or after the new tokens `forced`."""
    seen, forward = [], llm.runner.forward

    def watched(batch: Any, taps: Any) -> Any:
        out = forward(batch, taps)
        if out.logits is not None:
            seen.append(array(out.logits).astype(np.float64))
        return out

    llm.runner.forward = watched  # type: ignore[method-assign]
    try:
        request.params = request.params.but(max_tokens=len(forced) + 1, logprobs=1)
        llm.engine.add(request, [Progress(list(forced), Stats())] if forced else ())
        while llm.engine.has_work:
            checked(llm.engine.step())
    finally:
        llm.runner.forward = forward  # type: ignore[method-assign]
    x = np.concatenate(seen)[-rows:]
    x -= x.max(1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(1, keepdims=True)))


def divergence(truth: F64, found: F64) -> float:
    return float((np.exp(truth) * (truth - found)).sum(1).mean())


def request(prompt: Seq[int], reuse: str = "", salt: str = "", **more: Any) -> Request:
    return Request(f"claim {next(NUMBERS)}", list(prompt), ONE, salt, reuse=reuse, **more)


# ---- kvshare

LENGTH, FORCED = 560, (0, 12, 18)  # tokens of a prompt; new tokens after which distributions are compared
EVERY = "kvshare:least=0,ratio=0.15,spread=-100"  # as many rows whatever scores them


class Shared(NamedTuple):
    """saved: part of the prompt tokens that were not computed; without: by deviation alone; once: with no repair after the prompt. Numbers
    of the last three are divergences from the computed prompt, by the count of new tokens."""

    saved: float
    none: list[float]
    without: list[float]
    once: list[float]
    later: list[float]


@contextmanager
def deviation_alone() -> Iterator[None]:
    """Scores are not multiplied by attention."""
    own = kvshare._importance
    kvshare._importance = lambda seen, rows: np.ones(len(rows))  # type: ignore[assignment]
    try:
        yield
    finally:
        kvshare._importance = own


@cache
def shared(lab: Lab) -> list[Shared]:
    """Prompts that have 80 % of their tokens in common with one before, in two parts that moved."""
    llm, text, found = loaded(lab), book(lab), []
    for i in range(lab.count(10)):
        dice = Random(lab.seed + i)
        at, other = (dice.randrange(len(text) - 2 * LENGTH) for _ in range(2))
        old, strange = text[at : at + LENGTH], text[other : other + LENGTH // 5]
        cut, half = dice.randrange(LENGTH // 4, LENGTH // 2), len(strange) // 2
        gone = LENGTH // 5
        new = [*strange[:half], *old[:cut], *strange[half:], *old[cut + gone :]]
        truth = request(new, salt="computed")
        llm.engine.add(truth)
        truth.params = truth.params.but(max_tokens=FORCED[-1])
        while llm.engine.has_work:
            checked(llm.engine.step())
        forced = truth.sequences[0].tokens[len(new) :]
        logs(llm, request(old))
        first = request(new, "kvshare:least=0")
        logs(llm, first)
        lacked = len(new) - (first.cached_tokens or 0)
        saved = 1 - (lacked - first.reused_tokens + first.repair_rows) / lacked
        truths = [logs(llm, request(new, salt="computed"), forced=forced[:count]) for count in FORCED]
        with deviation_alone():
            without = away(llm, new, forced, truths, EVERY + ",later=0")
        ways = "kvshare:least=0,ratio=0", EVERY + ",later=0", EVERY + ",later=16"
        none, once, later = (away(llm, new, forced, truths, reuse) for reuse in ways)
        found.append(Shared(saved, none, without, once, later))
        llm.engine.table.forget()
    return found


def away(llm: LLM, prompt: list[int], forced: list[int], truths: list[F64], reuse: str) -> list[float]:
    runs = zip(FORCED, truths, strict=True)
    return [divergence(truth, logs(llm, request(prompt, reuse), forced=forced[:count])) for count, truth in runs]


def saves(lab: Lab) -> Found:
    return Found([one.saved for one in shared(lab)])


def means(runs: Seq[Seq[float]]) -> str:
    return ", ".join(f"{value:.3f}" for value in np.mean(runs, 0))


def attended(lab: Lab) -> Found:
    runs = shared(lab)
    notes = [f"{name}: {means([getattr(one, name) for one in runs])} after {FORCED} new tokens" for name in ("none", "without", "once")]
    return Found([float(np.mean(one.without) - np.mean(one.once)) for one in runs], notes)


def repaired_later(lab: Lab) -> Found:
    runs = shared(lab)
    notes = [f"{name}: {means([getattr(one, name) for one in runs])} after {FORCED} new tokens" for name in ("once", "later")]
    return Found([float(np.mean(one.once[1:]) - np.mean(one.later[1:])) for one in runs], notes)


# ---- cache-craft

POOL, EACH, PIECE, PROMPTS, WARM, END = 24, 4, 64, 44, 20, 20
CRAFT = "cache-craft"


class Crafted(NamedTuple):
    """rows: computed, of the prompts after the first WARM ones; prefix: by the prefix cache alone; divergences, by prompt."""

    rows: float
    prefix: int
    chosen: list[float]
    drawn: list[float]
    none: list[float]


@cache
def crafted(lab: Lab) -> list[Crafted]:
    """Prompts of chunks that are drawn as Zipf has it. What the prefix cache computes is counted with a cache that forgets nothing."""
    llm, text, found = loaded(lab), book(lab), []
    for i in range(lab.count(5)):
        dice = Random(lab.seed + i)
        at = dice.randrange(len(text) - POOL * PIECE - END)
        pieces = [text[at + k * PIECE : at + (k + 1) * PIECE] for k in range(POOL)]
        head, pages, made = text[at - 8 : at], set(), []
        rows, prefix = 0.0, 0
        away: tuple[list[float], ...] = ([], [], [])
        for number in range(PROMPTS):
            chosen: list[int] = []
            while len(chosen) < EACH:
                (k,) = dice.choices(range(POOL), [1 / (k + 1) for k in range(POOL)])
                chosen += [] if k in chosen else [k]
            last = at + (chosen[-1] + 1) * PIECE
            prompt = [*head, *(token for k in chosen for token in pieces[k]), *text[last : last + END]]
            chunks = [(len(head) + k * PIECE, len(head) + (k + 1) * PIECE) for k in range(EACH)]
            ends = range(PAGE, len(prompt), PAGE)
            cached = next((end for end in reversed(ends) if tuple(prompt[:end]) in pages), 0)
            pages |= {tuple(prompt[:end]) for end in ends}
            wants = Wants(prompt_logprobs=0, logprobs_of=range(len(prompt) - END + 1, len(prompt)))
            one = request(prompt, CRAFT, chunks=chunks, wants=wants)
            ours = logs(llm, one, END)
            if number < WARM:
                continue
            rows += len(prompt) - (one.cached_tokens or 0) - one.reused_tokens + one.repair_rows
            prefix += len(prompt) - cached
            if one.repair_rows:
                made = [ours]
                for again in (drawn, nothing):
                    other = request(prompt, CRAFT, chunks=chunks, wants=wants)
                    other.spans = [span._replace(again=again(span, dice)) for span in one.spans]
                    made.append(logs(llm, other, END))
                truth = logs(llm, request(prompt, salt=f"computed {number}", wants=wants), END)
                for values, one_of in zip(away, made, strict=True):
                    values.append(divergence(truth, one_of))
        found.append(Crafted(rows, prefix, *away))
        llm.engine.table.forget()
    return found


def drawn(span: Any, dice: Random) -> Seq[int]:
    return sorted(dice.sample(range(span.at, span.at + span.length), min(len(span.again), span.length)))


def nothing(span: Any, dice: Random) -> Seq[int]:
    return ()


def computes_less(lab: Lab) -> Found:
    runs = crafted(lab)
    values = [f"{np.mean([np.mean(getattr(one, name)) for one in runs]):.4f}" for name in ("none", "chosen")]
    notes = [f"divergence from computed prompts, where rows ran again: {values[1]}; without these rows {values[0]}"]
    return Found([one.rows / one.prefix for one in runs], notes)


def outward(lab: Lab) -> Found:
    return Found([float(np.mean(one.drawn) - np.mean(one.chosen)) for one in crafted(lab)])


ZIPF = f"{EACH} of {POOL} chunks of {PIECE} tokens, drawn as Zipf has it, {PROMPTS - WARM} prompts after {WARM}"
CLAIMS = (
    Claim("kvshare-saves", ("reuse=kvshare",), "Of prompts that are nearly the same, few tokens are computed (here: 60 % less)",
          f"{LENGTH} tokens of code, 80 % of them in an earlier prompt in two parts that moved; the prefix cache finds none",
          "part of the prompt that was not computed, repair counted", saves, border=0.6),
    Claim("kvshare-attention", ("reuse=kvshare",), "Deviation times attention finds the rows that matter, better than deviation alone",
          "the same, 15 % of the rows", "divergence from the computed prompt, deviation alone minus both", attended),
    Claim("kvshare-later", ("reuse=kvshare",), "Rows that new tokens attend to, repaired while text is generated, keep later tokens right",
          f"the same, repairs up to the 16th new token; distributions after {FORCED[1]} and {FORCED[2]} given ones",
          "divergence, without minus with later repairs", repaired_later),
    Claim("cache-craft-rows", ("reuse=cache-craft",), "51 % less is computed than with a prefix cache", ZIPF,
          "rows computed, ours / a prefix cache that forgets nothing", computes_less, border=0.49, below=True),
    Claim("cache-craft-order", ("reuse=cache-craft",), "Tokens with most attention on earlier chunks are the right ones to repair", ZIPF,
          "divergence from the computed prompt, as many tokens at random minus these", outward),
)  # fmt: skip
