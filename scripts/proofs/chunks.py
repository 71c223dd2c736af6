"""Prompts of chunks whose cache is kept: `scripts/prove chunks smollm2 --chunks 6 --length 384`.

A prompt is a system message, `--chunks` pieces of a book of `--length` tokens, and a question. A five-digit number is hidden in one
chunk; a name in another says which city the number belongs to. The cache of every chunk is there, and their order is new.

Each reuse method is compared with the same prompt computed in full:
kl: mean divergence of the next-token distributions of the computed prompt from those with reuse, over the question and the answer;
right: greedy answers with the number, of the texts whose computed prompt gives it too;
rows: rows that were computed, in whole rows, of the prompt;
first token: seconds of the processor until the first new token, computed / reused, in interleaved runs.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from redraft import LLM, SamplingParams
from redraft.bench.tasks import sources
from redraft.core.sequence import NO_WANTS, Request, Wants
from redraft.kv.reuse.chunks import FILLER, texts_of
from redraft.ops.arrays import array

NAMES = "Paris", "Berlin", "Madrid", "Rome", "Vienna", "Oslo", "Cairo", "Lima", "Tokyo", "Delhi"
PEOPLE = "Anna", "Boris", "Clara", "David", "Emma", "Felix", "Greta", "Henry", "Irene", "Jacob"
COMPUTED = "computed"


@dataclass(frozen=True)
class Text:
    """segments: head, chunks, question; answer: the tokens that a right reply begins with; number: as text."""

    segments: list[list[int]]
    answer: list[int]
    number: str

    def request(self, name: str, reuse: str, params: SamplingParams, more: Seq[int] = (), wants: Wants = NO_WANTS) -> Request:
        ends = np.cumsum([len(segment) for segment in self.segments]).tolist()
        prompt = [token for segment in self.segments for token in segment] + list(more)
        chunks = list(pairwise(ends[:-1])) if reuse else []
        return Request(name, prompt, params, "" if reuse else name, reuse=reuse, chunks=chunks, wants=wants)


@dataclass
class Seen:
    divergence: list[float] = field(default_factory=list)  # of each text
    right: list[bool] = field(default_factory=list)
    rows: list[float] = field(default_factory=list)  # computed, a part of the prompt
    faster: list[float] = field(default_factory=list)


def texts(llm: LLM, files: list[Path], chunks: int, length: int, count: int) -> list[Text]:
    dice, spell = random.Random(1), lambda text: llm.tokenizer.encode(text, special=False)
    book = [token for found in sources(files).values() for text in found for token in spell(text)]
    head = llm.tokenizer.encode("<|im_start|>system\nYou are a helpful AI assistant.<|im_end|>\n<|im_start|>user\n")
    made = []
    for _ in range(count):
        name, who, number = dice.choice(NAMES), dice.choice(PEOPLE), str(dice.randrange(10_000, 100_000))
        one, two = spell(f"\nThe special magic number for {name} is {number}.\n"), spell(f"\nThe home of {who} is {name}.\n")
        at = dice.randrange(len(book) - chunks * length)
        pieces = [book[at + k * length : at + (k + 1) * length] for k in range(chunks)]
        for k, fact in zip(dice.sample(range(chunks), min(2, chunks)), (one, two)):
            cut = dice.randrange(length - len(fact))
            pieces[k] = [*pieces[k][:cut], *fact, *pieces[k][cut : length - len(fact)]]
        asks = f"the special magic number for {name} mentioned in the text"
        end = spell(f"\n\nWhat is {asks}?<|im_end|>\n<|im_start|>assistant\nT{asks[1:]} is")
        made.append(Text([head, *pieces, end], spell(f" {number}"), number))
    return made


def greedy(tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, seed=0)


def run(llm: LLM, request: Request, stop: int = 10**9) -> tuple[list[int], float]:
    """The new tokens, and the processor time until the first one."""
    tokens: list[int] = []
    first, began = 0.0, time.process_time()
    llm.engine.add(request)
    while llm.engine.has_work:
        for event in llm.engine.step():
            if event.error is not None:
                raise event.error
            if not tokens and event.tokens:
                first = time.process_time() - began
            tokens += event.tokens
    return tokens, first


def warmed(llm: LLM, text: Text) -> None:
    """Computes the cache of the chunks, each alone."""
    for i, chunk in enumerate(texts_of(text.request("warm", "any", greedy(1)))):
        run(llm, Request(f"warm {i}", [*chunk, FILLER], greedy(1)))


def logs(llm: LLM, request: Request, rows: int) -> NDArray[np.float64]:
    """Log-probabilities [rows, V] after the last `rows` tokens of the prompt."""
    seen: list[NDArray[np.float64]] = []
    forward = llm.runner.forward

    def watched(batch, taps):  # type: ignore[no-untyped-def]
        out = forward(batch, taps)
        if out.logits is not None:
            seen.append(array(out.logits).astype(np.float64))
        return out

    llm.runner.forward = watched  # type: ignore[method-assign]
    try:
        run(llm, request)
    finally:
        llm.runner.forward = forward  # type: ignore[method-assign]
    x = np.concatenate(seen)[-rows:]
    x -= x.max(1, keepdims=True)
    found: NDArray[np.float64] = x - np.log(np.exp(x).sum(1, keepdims=True))
    return found


def compare(llm: LLM, text: Text, methods: Seq[str], place: int, rounds: int, seen: dict[str, Seen]) -> None:
    rows = len(text.segments[-1]) + len(text.answer)
    size = sum(map(len, text.segments))
    wants = Wants(prompt_logprobs=0, logprobs_of=range(size + len(text.answer) - rows + 1, size + len(text.answer)))
    truth = logs(llm, text.request(f"kl {place}", "", greedy(1), text.answer, wants), rows)
    answer, _ = run(llm, text.request(f"answer {place}", "", greedy(10)))
    seen[COMPUTED].right.append(text.number in llm.tokenizer.decode(answer))
    warmed(llm, text)
    for method in methods:
        one, found = seen[method], logs(llm, text.request("kl", method, greedy(1), text.answer, wants), rows)
        one.divergence.append(float((np.exp(truth) * (truth - found)).sum(1).mean()))
        request = text.request("answer", method, greedy(10))
        one.right.append(text.number in llm.tokenizer.decode(run(llm, request)[0]))
        new = size - (request.cached_tokens or 0) - request.reused_tokens
        one.rows.append((new + request.repair_rows) / size)
    for i in range(rounds):
        whole = run(llm, text.request(f"time {place} {i}", "", greedy(1)))[1]
        for method in methods:
            seen[method].faster.append(whole / run(llm, text.request("time", method, greedy(1)))[1])


def quartiles(values: Seq[float]) -> str:
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model")
    parser.add_argument("--chunks", type=int, default=6)
    parser.add_argument("--length", type=int, default=384, help="tokens of a chunk")
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2, help="of interleaved timing, for each text")
    parser.add_argument("--book", type=Path, nargs="*", default=[], help="text files; by default parts of the standard library")
    parser.add_argument("--reuse", nargs="+", default=[f"cacheblend:ratio={ratio}" for ratio in (0, 0.05, 0.15, 0.2, 0.3, 1)])
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    total = args.chunks * args.length + 512
    llm = LLM(args.model, draft="none", max_model_len=total, cache_memory=4 * total * 24 << 10, threads=args.threads)
    seen = {name: Seen() for name in (COMPUTED, *args.reuse)}
    for place, text in enumerate(texts(llm, args.book, args.chunks, args.length, args.texts)):
        compare(llm, text, args.reuse, place, args.rounds, seen)
        llm.engine.memory.check()
    print(f"{args.chunks} chunks of {args.length} tokens, {args.texts} texts; computed: {sum(seen[COMPUTED].right)} right")
    print(f"{'reuse':26}{'kl':>7}{'worst':>7}{'right':>7}{'rows':>7}  first token, times as fast")
    for name in args.reuse:
        one = seen[name]
        worst, right = max(one.divergence), sum(a and b for a, b in zip(one.right, seen[COMPUTED].right, strict=True))
        print(f"{name:26}{np.mean(one.divergence):7.3f}{worst:7.3f}{right:7}{np.mean(one.rows):7.2f}  {quartiles(one.faster)}")


if __name__ == "__main__":
    main()
