"""What it saves that a batch reads the keys of a common prefix once, and that it changes no bit.

Jordan Juravsky, Bradley Brown, Ryan Ehrlich, Daniel Y. Fu, Christopher Ré, Azalia Mirhoseini, Hydragen: High-Throughput LLM Inference with
Shared Prefixes, 2024, arXiv 2402.05099: attention over a shared prefix once for all texts, over the rest for each, merged by the sums of
their weights. Here the kernels do it for all rows that list the same page.

Texts of a batch begin with the same prefix and go on with tokens of their own. "shared": all list the same pages; "private": each has
copies of them. Both decode the same token again and again; the two take turns, and the time is that of the processor. All logits must be
equal bit for bit. The paper: the time of a step hardly grows with a shared prefix.
"""

from __future__ import annotations

import argparse
import sys
import sysconfig
import time
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from redraft import LLM, SamplingParams
from redraft.config import EngineConfig
from redraft.core.batch import Batch
from redraft.core.plan import Accepted, Work
from redraft.core.sequence import Request, Sequence
from redraft.core.taps import Taps
from redraft.core.tree import EMPTY
from redraft.ops.arrays import array
from redraft.setup import Setup

PARAMS = SamplingParams(temperature=0, max_tokens=8)


class Timed(NamedTuple):
    """shared, private: seconds of a decoding step, by round; differing: logits of which a bit differs; pages: of the prefix, of all texts
    together, if they are private."""

    shared: list[float]
    private: list[float]
    differing: int
    pages: int


def loaded(model: str, batch: int, prefix: int, own: int, **options: Any) -> LLM:
    """A model whose pool holds the batch twice: once with shared, once with private pages."""
    longest = prefix + own + 32
    setup = Setup.of(EngineConfig.of(model=model))
    blocks = (batch + 2) * -(-longest // 32) + batch * (-(-own // 32) + 2)
    memory = blocks * setup.backend.block_bytes(setup.checkpoint.spec)
    return LLM(model, draft="none", max_model_len=longest, cache_memory=memory, **options)


def text(llm: LLM, length: int, module: str = "argparse") -> list[int]:
    ids = llm.tokenizer.encode((Path(sysconfig.get_path("stdlib")) / f"{module}.py").read_text("utf-8"))
    assert len(ids) >= length, f"{module}.py has {len(ids)} tokens"
    return ids[:length]


def opened(llm: LLM, prefix: list[int], own: int, batch: int, source: Sequence | None) -> list[Sequence]:
    """Texts that end with a token which is not stored. source: holds the prefix, which is copied from it; None: they share its pages."""
    memory, seqs = llm.runner.memory, []
    for i in range(batch):
        tokens = [*prefix, *((7 * i + 3 * j) % llm.runner.spec.vocab for j in range(own + 1))]
        seq = Sequence((1 if source is None else 1 + batch) + i, Request("", tokens, PARAMS), 0, tokens, len(tokens), 0, len(tokens) + 8)
        memory.open(seq)
        if source is None:
            memory.attach(seq, len(prefix))
        else:
            memory.paged.splice(seq, source, 0, len(prefix), exact=True)
        seqs.append(seq)
    if own:
        work = [Work(seq, own) for seq in seqs]
        llm.runner.forward(Batch.pack(work, [EMPTY] * batch, memory.reserve(work, [EMPTY] * batch)))
        memory.move(memory.commit(work, [Accepted()] * batch))
    return seqs


def step(llm: LLM, seqs: list[Sequence]) -> tuple[Any, float]:
    """The logits of a decoding step, f[batch, vocab], and its seconds. It leaves no trace."""
    memory, work, trees = llm.runner.memory, [Work(seq, 1) for seq in seqs], [EMPTY] * len(seqs)
    batch = Batch.pack(work, trees, memory.reserve(work, trees))
    began = time.process_time()
    out = llm.runner.forward(batch, Taps(logits=True))
    seconds = time.process_time() - began
    for seq in seqs:
        memory.discard(seq)
    return array(out.logits), seconds


def compared(llm: LLM, prefix: list[int], own: int, batch: int, rounds: int) -> Timed:
    """prefix: whole pages of tokens; own: further tokens of each text."""
    memory = llm.runner.memory
    llm.generate([[*prefix, 0]], temperature=0, max_tokens=1)  # publishes the pages
    source = Sequence.holder(Request("", [*prefix, 0], PARAMS), [*prefix, 0])
    memory.open(source)
    memory.attach(source, len(prefix))
    shared, private = opened(llm, prefix, own, batch, None), opened(llm, prefix, own, batch, source)
    times: tuple[list[float], list[float]] = ([], [])
    differing = 0
    for _ in range(rounds):
        found = [step(llm, shared), step(llm, private)]
        for to, (_, seconds) in zip(times, found, strict=True):
            to.append(seconds)
        bits = [np.ascontiguousarray(logits).view(np.uint8) for logits, _ in found]
        differing += int((bits[0] != bits[1]).sum())
    for seq in (*shared, *private, source):
        memory.free(seq)
    memory.check()
    assert not memory.used()
    return Timed(*times, differing, batch * len(prefix) // 32)


def main() -> int:
    parser = argparse.ArgumentParser(prog="prove shared-prefix", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="embedded")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--prefixes", type=int, nargs="+", default=[32, 256, 512, 896], help="tokens, multiples of 32")
    parser.add_argument("--own", type=int, default=24, help="further tokens of each text")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if any(length % 32 or length <= 0 for length in options.prefixes):
        parser.error("--prefixes: positive multiples of 32 are allowed")

    llm = loaded(options.model, options.batch, max(options.prefixes), options.own, threads=options.threads)
    print(f"{options.model}, {llm.runner.backend.name}: {options.batch} texts, prefix + {options.own} tokens; seconds of a decoding step")
    print(f"{'prefix':>8}{'shared':>10}{'private':>10}{'ratio':>8}{'smallest':>10}{'largest':>9}{'logits':>10}")
    whole, right = text(llm, max(options.prefixes)), True
    for length in options.prefixes:
        found = compared(llm, whole[:length], options.own, options.batch, options.rounds + 1)
        ratios = [b / a for a, b in zip(found.shared[1:], found.private[1:], strict=True)]  # the first round warms up
        bits = f"{found.differing} off" if found.differing else "equal"
        print(f"{length:>8}{median(found.shared[1:]):>10.4f}{median(found.private[1:]):>10.4f}{median(ratios):>8.2f}"
              f"{min(ratios):>10.2f}{max(ratios):>9.2f}{bits:>10}", flush=True)  # fmt: skip
        right &= not found.differing
    print("held" if right else "FAILED")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
