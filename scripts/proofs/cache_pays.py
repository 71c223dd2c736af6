"""What a cache policy is worth to users of a server whose memory is short: `scripts/prove cache-pays smollm2`.

needle: chats of 4,000 tokens hide a five-digit number and ask for it at their end; greedy answers that have it, whole cache and policies.
pool: the same chats, whose first 2,000 tokens are shared, in a pool of 12,000 tokens. Each policy's engine takes requests until no
further one is admitted; then rounds of steps are interleaved: requests in flight, and tokens a second while all write.
total: tokens a second over whole requests, with the time in which their prompts are read, for answers of several lengths.
batch: 8 texts of 7,500 tokens with a cache of their own each: seconds of a step, interleaved.

Times are of the processor, as a ratio to the whole cache; spreads are quartiles over rounds. A machine with other work adds noise.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from redraft import LLM, SamplingParams, registry
from redraft.bench.tasks import sources
from redraft.core.sequence import Request
from redraft.engine.budgets import Policy
from redraft.engine.engine import Engine
from redraft.engine.output import checked
from redraft.models.runner import Runner
from redraft.ops.format import PAGE

LENGTH, SHARED, POOL = 4000, 2000, 12_000  # tokens
BATCH, CACHED = 8, 7500
WHOLE = "whole"
POLICIES = (WHOLE, "keep=snapkv:budget=0.25,pool=15", "keep=snapkv:budget=0.1,pool=15", "keep=snapkv:budget=0.05,pool=15")
NAMES = "Paris", "Berlin", "Madrid", "Rome", "Vienna", "Oslo", "Cairo", "Lima", "Tokyo", "Delhi"
DEPTHS = 0.05, 0.25, 0.5, 0.75, 0.95  # of the number, in the text that is not shared
SLICE = 4  # steps


@dataclass(frozen=True)
class Chat:
    ids: list[int]
    number: str


def chats(llm: LLM, texts: list[Path], count: int) -> list[Chat]:
    """Prompts in SmolLM2's chat form that begin with the same SHARED tokens. A right reply goes on with the number."""
    dice, tokenizer = random.Random(1), llm.tokenizer
    filler = [token for found in sources(texts).values() for text in found for token in tokenizer.encode(text, special=False)]
    shared = [*tokenizer.encode("<|im_start|>user\n"), *filler][:SHARED]
    made = []
    for i in range(count):
        name, number = dice.choice(NAMES), str(dice.randrange(10_000, 100_000))
        fact = tokenizer.encode(f"\nThe special magic number for {name} is {number}.\n", special=False)
        asks = f"the special magic number for {name} mentioned in the text"
        end = tokenizer.encode(f"\n\nWhat is {asks}?<|im_end|>\n<|im_start|>assistant\nT{asks[1:]} is")
        room = LENGTH - SHARED - len(fact) - len(end)
        at, cut = dice.randrange(SHARED, len(filler) - room), int(DEPTHS[i % len(DEPTHS)] * room)
        own = filler[at : at + room]
        made.append(Chat([*shared, *own[:cut], *fact, *own[cut:], *end], number))
    return made


def params(policy: str, tokens: int) -> SamplingParams:
    chosen = {} if policy == WHOLE else dict(Policy.of(policy).parts)
    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, seed=0, **chosen)


def engine(llm: LLM, tokens: int) -> Engine:
    """With a cache of its own."""
    own = llm.runner
    runner = Runner(own.spec, own.weights, own.backend, -(-tokens // PAGE), source=own.source)
    drafter = registry.create("draft", "none").open(runner, llm.engine.sampler)
    return Engine(runner, llm.scheduler, drafter, llm.engine.verifier.own, llm.engine.sampler, max_model_len=min(tokens, llm.max_model_len))


def run(made: Engine, until: Callable[[], bool] = lambda: False) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    while made.has_work and not until():
        for event in checked(made.step()):
            found.setdefault(event.request.id, []).extend(event.tokens)
    return found


def warm(made: Engine, chat: Chat) -> None:
    """Reads the shared tokens."""
    made.add(Request("warm", [*chat.ids[:SHARED], 0], params(WHOLE, 1)))
    run(made)


def spread(values: Any) -> str:
    low, middle, high = np.percentile(values, [25, 50, 75])
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def needle(llm: LLM, given: list[Chat], policies: list[str]) -> None:
    print(f"needle: {len(given)} chats of {LENGTH} tokens")
    for policy in policies:
        made = engine(llm, 4 * POOL)
        for i, chat in enumerate(given):
            made.add(Request(str(i), chat.ids, params(policy, 12)))
        found = run(made)
        right = sum(chat.number in llm.tokenizer.decode(found[str(i)]) for i, chat in enumerate(given))
        print(f"  {policy:36} {right} of {len(given)}", flush=True)


def pool(llm: LLM, given: list[Chat], policies: list[str], rounds: int) -> None:
    print(f"pool: {POOL} tokens, {LENGTH} of a prompt, {SHARED} of them shared")
    engines: dict[str, Engine] = {}
    for policy in policies:
        engines[policy] = made = engine(llm, POOL)
        warm(made, given[0])
        for i in range(99):
            made.add(Request(str(i), given[i % len(given)].ids, params(policy, SLICE * rounds + 128)))
            run(made, lambda made=made: not made.waiting and all(seq.stored >= seq.prompt_len for seq in made.running))
            plan = made.scheduler.plan([], made.running, made.memory)
            probe = made.admission.sequence(Request("probe", given[(i + 1) % len(given)].ids, params(policy, 128).but(seed=0)), 0)
            if plan.preempt or not made.scheduler.plan([probe], made.running, made.memory).admit:
                break
    seconds = alternate(engines, rounds)
    flight = {policy: len(made.running) for policy, made in engines.items()}
    for policy in policies:
        rate = flight[policy] / seconds[policy]
        ratio = spread(rate / (flight[WHOLE] / seconds[WHOLE]))
        times = flight[policy] / flight[WHOLE]
        print(f"  {policy:36} {flight[policy]:3} in flight, {times:.2f} times; {np.median(rate):.1f} tokens/s, {ratio} times", flush=True)


def alternate(engines: dict[str, Engine], rounds: int) -> dict[str, Any]:
    """Processor seconds of a step in each round."""
    seconds: dict[str, list[float]] = {policy: [] for policy in engines}
    for _ in range(rounds):
        for policy, made in engines.items():
            began, running = time.process_time(), len(made.running)
            for _ in range(SLICE):
                made.step()
            seconds[policy].append((time.process_time() - began) / SLICE)
            assert len(made.running) == running, "a text ended or lost its pages while others were timed"
    return {policy: np.array(values) for policy, values in seconds.items()}


def total(llm: LLM, given: list[Chat], policies: list[str], answers: list[int]) -> None:
    print(f"total: {len(given)} requests in a pool of {POOL} tokens, prompts included")
    for tokens in answers:
        whole = 0.0
        for policy in policies:
            made = engine(llm, POOL)
            warm(made, given[0])
            for i, chat in enumerate(given):
                made.add(Request(str(i), chat.ids, params(policy, tokens)))
            began, flight, steps = time.process_time(), 0, 0
            while made.has_work:
                checked(made.step())
                flight, steps = flight + len(made.running), steps + 1
            seconds = time.process_time() - began
            whole = whole or seconds
            rate = len(given) * tokens / seconds
            shown = f"{rate:.1f} tokens/s, {whole / seconds:.2f} times, {flight / steps:.1f} in flight a step"
            print(f"  {tokens} tokens, {policy:36} {shown}, {made.preemptions} preempted", flush=True)


def batch(llm: LLM, given: list[Chat], policies: list[str], rounds: int) -> None:
    """The whole cache: texts with the same prompt whose shared pages are copied, so that each text reads its own."""
    print(f"batch: {BATCH} texts of {CACHED} tokens")
    ids = (given[0].ids + given[1].ids)[:CACHED]
    engines = {}
    for policy in policies:
        engines[policy] = made = engine(llm, (BATCH + 1) * (CACHED + SLICE * rounds + 256))
        for i in range(BATCH):
            made.add(Request(str(i), ids, params(policy, SLICE * rounds + 64)))
            run(made, lambda made=made: not made.waiting and all(seq.stored >= seq.prompt_len for seq in made.running))
        if policy == WHOLE:
            first, memory = made.running[0], made.memory
            for seq in made.running[1:]:
                memory.free(seq)
                seq.tokens[:] = first.tokens
                memory.import_(seq, memory.export(first), 0, memory.read)
    seconds = alternate(engines, rounds)
    for policy, each in seconds.items():
        print(f"  {policy:36} {1000 * np.median(each):.1f} ms a step, {spread(seconds[WHOLE] / each)} times as fast", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="prove cache-pays", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or GGUF file of SmolLM2")
    parser.add_argument("--part", action="append", choices=["needle", "pool", "total", "batch"], help="repeated for more; else all")
    parser.add_argument("--policy", action="append", help="seam=name:option=value, repeated for more")
    parser.add_argument("--texts", action="append", type=Path, default=[], help="files of filler; else Python's library")
    parser.add_argument("--count", type=int, default=24, help="chats")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--answer", action="append", type=int, help="tokens of an answer in `total`, repeated for more; else 128 and 1024")
    options = parser.parse_args()
    policies = [WHOLE, *options.policy] if options.policy else list(POLICIES)
    llm = LLM(options.model, dtype="bfloat16", draft="none", cache_memory="256MiB")
    given, parts = chats(llm, options.texts, options.count), options.part or ["needle", "pool", "total", "batch"]
    if "needle" in parts:
        needle(llm, given, policies)
    if "pool" in parts:
        pool(llm, given, policies, options.rounds)
    if "total" in parts:
        total(llm, given, policies, options.answer or [128, 1024])
    if "batch" in parts:
        batch(llm, given, [WHOLE, "keep=snapkv:budget=0.25,pool=15"], options.rounds)


if __name__ == "__main__":
    main()
