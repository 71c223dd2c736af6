"""Prompts of any lengths share a step without padding, and no prompt sees another.

Siyan Zhao, Daniel Israel, Guy Van den Broeck, Aditya Grover, Prepacking: A Simple Method for Fast Prefilling and Increased Throughput in
Large Language Models, 2024, arXiv 2404.09529, packs prompts into the rows of a padded batch. Rows here are ragged, so that there is
nothing to pack: the proof measures what the paper claims.

64 prompts of log-normal lengths run in one step. The proof counts the rows that were computed and those of a batch that is padded to the
longest prompt, and times both in interleaved rounds: the padded batch is 64 prompts of the largest length. Then one token of one prompt
is changed, for several prompts in turn. The log-probabilities of all other prompts must keep every bit for --new tokens, and those of the
changed prompt must not.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from statistics import median
from typing import Any

from redraft import LLM, SamplingParams

Prompts = list[list[int]]
TOP = 8  # log-probabilities that are compared for each token; they are normalised over the whole vocabulary


def lognormal(count: int, longest: int, vocab: int, seed: int = 0) -> Prompts:
    """Random tokens; the lengths have a median of a quarter of the longest one."""
    dice = random.Random(seed)
    lengths = [min(longest, max(2, round(dice.lognormvariate(0, 0.9) * longest / 4))) for _ in range(count)]
    return [[dice.randrange(vocab) for _ in range(length)] for length in lengths]


def loaded(model: str, prompts: Prompts, **options: Any) -> LLM:
    """A model whose steps have room for all prompts, each padded to the longest. No prefix is shared."""
    rows, longest = len(prompts) * max(map(len, prompts)), max(map(len, prompts))
    memory = {"prefix_sharing": False, "cache_memory": options.pop("cache_memory", None)}
    budgets = {"token_budget": max(rows, len(prompts)), "max_seqs": len(prompts), "max_model_len": longest + 32}
    return LLM(model, draft="none", **budgets, **{k: v for k, v in memory.items() if v is not None}, **options)


def bits(llm: LLM, prompts: Prompts, new: int) -> list[Any]:
    """Of each prompt, its new tokens and their log-probabilities."""
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, logprobs=TOP))
    return [(output.outputs[0].token_ids, output.outputs[0].logprobs) for output in outputs]


def changed(llm: LLM, prompts: Prompts, places: list[int], new: int) -> tuple[int, int]:
    """(other prompts that changed, changed prompts that stayed) over runs in which the prompt at one of the places differs by one token."""
    before, others, stayed = bits(llm, prompts, new), 0, 0
    for place in places:
        prompt = list(prompts[place])
        prompt[len(prompt) // 2] = (prompt[len(prompt) // 2] + 1) % llm.engine.runner.spec.vocab
        after = bits(llm, [*prompts[:place], prompt, *prompts[place + 1 :]], new)
        differs = [one != other for one, other in zip(before, after, strict=True)]
        others += sum(differs) - differs[place]
        stayed += not differs[place]
    return others, stayed


def rows(llm: LLM, prompts: Prompts) -> list[int]:
    """The rows of each step in which the prompts run."""
    runner, found = llm.engine.runner, []
    forward = runner.forward

    def counted(batch: Any, *taps: Any) -> Any:
        found.append(len(batch.tokens))
        return forward(batch, *taps)

    runner.forward = counted  # type: ignore[method-assign]
    try:
        llm.generate(prompts, SamplingParams(temperature=0, max_tokens=1))
    finally:
        runner.forward = forward  # type: ignore[method-assign]
    return found


def seconds(llm: LLM, prompts: Prompts) -> float:
    began = time.perf_counter()
    llm.generate(prompts, SamplingParams(temperature=0, max_tokens=1))
    return time.perf_counter() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="embedded")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--longest", type=int, default=256, help="tokens of the longest prompt")
    parser.add_argument("--changes", type=int, default=8, help="prompts that are changed, one in each run")
    parser.add_argument("--new", type=int, default=4, help="tokens after each prompt that are compared")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds")
    options = parser.parse_args()

    llm = loaded(options.model, [[0] * options.longest] * options.prompts)
    vocab = llm.engine.runner.spec.vocab
    prompts = lognormal(options.prompts, options.longest, vocab)
    longest = max(map(len, prompts))
    padded = [(prompt * longest)[:longest] for prompt in prompts]
    steps, full = rows(llm, prompts), len(prompts) * longest
    print(f"{options.model}: {len(prompts)} prompts of {min(map(len, prompts))} to {longest} tokens")
    print(f"rows computed {sum(steps)} in {len(steps)} step, padded {full}: {full / sum(steps):.2f} times as many")
    ratios = [seconds(llm, padded) / seconds(llm, prompts) for _ in range(options.rounds + 1)][1:]  # the first warms up
    print(f"padded batch: {median(ratios):.2f} times the time ({min(ratios):.2f} to {max(ratios):.2f})")
    places = random.Random(1).sample(range(len(prompts)), min(options.changes, len(prompts)))
    others, stayed = changed(llm, prompts, places, options.new)
    print(f"one token changed in {len(places)} prompts in turn: {others} other prompts changed a bit, {stayed} changed prompts kept all")
    right = others == stayed == 0 and sum(steps) == sum(map(len, prompts)) and len(steps) == 1
    print("held" if right else "FAILED")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
