"""Prompt tokens that a batch computes, in order of arrival and in the order of its shared prefixes.

Documents, each with several questions, are shuffled. The pool has memory for a few of the documents, so that in order of arrival most have
left the cache when their next question comes. The proof counts the rows of prompts that each scheduler computes, the steps, the rows of a
step and the preemptions, and the seconds of the processor as a ratio to the first scheduler. Every text must be the same under all of
them, `batchllm` must compute each document once, and no page may be held afterwards.

The paper (Zheng et al., 2024, arXiv 2412.03594) has 35.8 % of prompt tokens found by a cache in order of arrival, and 55 % with one shared
prefix for each prompt, of 58.1 % that are possible.
"""

from __future__ import annotations

import argparse
import random
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any, NamedTuple

from redraft import LLM, SamplingParams
from redraft.config import EngineConfig
from redraft.setup import Setup

FILES = (
    "argparse", "ast", "base64", "bdb", "bisect", "calendar", "cmd", "code", "codecs", "configparser", "contextlib", "copy", "csv",
    "difflib", "dis", "doctest", "enum", "filecmp", "fileinput", "fractions", "ftplib", "functools", "gettext", "glob", "gzip", "hashlib",
    "heapq", "hmac", "inspect", "ipaddress", "linecache", "locale", "mailbox", "mimetypes", "netrc",
)  # fmt: skip
QUESTIONS = (
    "What does this module do?", "Which names does it define?", "Name one function of it.", "Which modules does it import?",
    "Who would use it?", "What can go wrong in it?", "Is there a class in it?", "Write a test for it.", "Explain its first function.",
    "How would you rename it?",
)  # fmt: skip
Prompts = list[list[int]]


class Counted(NamedTuple):
    """texts: token ids of each prompt, in order; prompt_rows, rows: computed, of prompts and all; held: pages after the batch."""

    texts: list[list[int]]
    prompt_rows: int
    rows: int
    steps: int
    preempted: int
    seconds: float
    held: int


def batch(llm: LLM, documents: int, each: int, length: int, seed: int = 0) -> Prompts:
    """The first `length` tokens of modules of the standard library, each with questions, shuffled."""
    library, encode = Path(sysconfig.get_path("stdlib")), llm.tokenizer.encode
    texts = (encode((library / f"{name}.py").read_text("utf-8", "replace")) for name in FILES if (library / f"{name}.py").exists())
    chosen = [ids[:length] for ids in texts if len(ids) >= length][:documents]
    assert len(chosen) == documents, f"only {len(chosen)} modules have {length} tokens"
    questions = [encode(f"\n\n# Question: {text}\n# Answer:", special=False) for text in QUESTIONS]
    found = [ids + questions[i % len(questions)] for ids in chosen for i in range(each)]
    random.Random(seed).shuffle(found)
    return found


def loaded(model: str, length: int, room: float, new: int, **options: Any) -> LLM:
    """A model whose pool holds `room` documents with a question and the new tokens each."""
    longest = length + 32 + new
    setup = Setup.of(EngineConfig.of(model=model))
    memory = int(room * -(-longest // 32)) * setup.backend.block_bytes(setup.checkpoint.spec)
    return LLM(model, draft="none", max_model_len=longest, cache_memory=memory, **options)


def counted(llm: LLM, prompts: Prompts, scheduler: str, new: int, seed: int = 0) -> Counted:
    """A batch with an empty prefix cache."""
    engine, runner, rows = llm.engine, llm.runner, []
    engine.table.forget()
    forward, before = runner.forward, engine.preemptions

    def counts(batch: Any, *taps: Any) -> Any:
        rows.append(len(batch.tokens))
        return forward(batch, *taps)

    params = [SamplingParams(temperature=0.8, seed=seed + i, max_tokens=new, ignore_eos=True) for i in range(len(prompts))]
    began = time.process_time()
    runner.forward = counts  # type: ignore[method-assign]
    try:
        outputs = llm.generate(prompts, params, scheduler=scheduler)
    finally:
        runner.forward = forward  # type: ignore[method-assign]
    seconds = time.process_time() - began
    engine.memory.check()
    texts = [output.outputs[0].token_ids for output in outputs]
    drawn = sum(len(text) - 1 for text in texts)  # the last token of a text is never a row
    return Counted(texts, sum(rows) - drawn, sum(rows), len(rows), engine.preemptions - before, seconds, engine.memory.used())


def least(prompts: Prompts, page: int = 32) -> int:
    """The prompt tokens of which none that others begin with in whole pages is computed twice."""
    pages = {tuple(prompt[:end]) for prompt in prompts for end in range(page, len(prompt), page)}
    return page * len(pages) + sum(len(prompt) - (len(prompt) - 1) // page * page for prompt in prompts)


def main() -> int:
    parser = argparse.ArgumentParser(prog="prove batchllm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="embedded")
    parser.add_argument("--documents", type=int, default=20)
    parser.add_argument("--questions", type=int, default=10, help="of each document")
    parser.add_argument("--length", type=int, default=256, help="tokens of a document")
    parser.add_argument("--new", type=int, default=8, help="tokens after each prompt")
    parser.add_argument("--room", type=float, default=4.0, help="documents that fit into the pool")
    parser.add_argument("--schedulers", nargs="+", default=["sarathi", "fcfs", "batchllm"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the order")
    options = parser.parse_args()

    llm = loaded(options.model, options.length, options.room, options.new, threads=options.threads)
    prompts = batch(llm, options.documents, options.questions, options.length, options.seed)
    whole, floor = sum(map(len, prompts)), least(prompts)
    print(f"{options.model}: {len(prompts)} prompts, {whole} tokens, {1 - floor / whole:.1%} of them shared; {llm.blocks} blocks of 32")
    print(f"{'':<12}{'prompt rows':>12}{'saved':>8}{'steps':>8}{'rows/step':>11}{'preempted':>11}{'time':>7}")
    first, right = None, True
    for scheduler in options.schedulers:
        found = counted(llm, prompts, scheduler, options.new)
        first = first or found
        time_, saved = found.seconds / first.seconds, 1 - found.prompt_rows / whole
        print(f"{scheduler:<12}{found.prompt_rows:>12}{saved:>8.1%}{found.steps:>8}{found.rows / found.steps:>11.1f}"
              f"{found.preempted:>11}{time_:>7.2f}", flush=True)  # fmt: skip
        right &= found.texts == first.texts and not found.held
        if scheduler == "batchllm":
            right &= found.prompt_rows == floor
    print("held" if right else "FAILED")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
