"""Native kernels: same seed, same text, without any tolerance. Every lossless drafter, batches of 1 to 16, chunks of 1 to 512 rows,
greedy and sampled, float32, bfloat16 and quantized weights, one and two threads. Each text is compared, token by token, with the text
of the same engine without a drafter: alone, its prompt in one chunk, on one thread.

Conditions are drawn at random (--seed) from all combinations until --tokens tokens were compared. The proof fails if a text differs,
and prints the condition and the place. It also fails if a drafter never had a token accepted or never had one rejected.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.proofs.identity import DRAFT_MODELS, MODELS, cut_prompts

NUMBERS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "bfloat16", "quant": "int8"},
    "int4": {"dtype": "bfloat16", "quant": "int4"},
}
SAMPLING: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.8},
    "top-p": {"temperature": 1.0, "top_p": 0.9},
}
ALONE = ("none", "token-recycling", "copyspec", "aded", "self-skip:skip=1", "union:parts=token-recycling+copyspec")
WITH_A_SECOND_MODEL = ("draft-model", "rsd-c", "rsd-s", "dyspec", "spectr", "optimal-multi-draft")
BATCHES, CHUNKS = (1, 2, 3, 5, 8, 16), (1, 2, 7, 16, 31, 33, 64, 128, 512)


@dataclass
class Result:
    tokens: int = 0
    conditions: int = 0
    accepted: Counter[str] = field(default_factory=Counter)
    drafted: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


def run(model: str, numbers: str, tokens: int, seed: int, prompts: int, new: int) -> Result:
    """The work of one process: conditions of one model and one number format, until `tokens` tokens were compared."""
    import numpy as np

    from redraft import LLM, SamplingParams

    rng = np.random.default_rng([seed, *model.encode(), *numbers.encode()])
    llm = LLM(
        str(MODELS[model]), backend="native", threads=1, max_model_len=256, cache_fraction=0.1, draft_model=DRAFT_MODELS.get(model),
        **NUMBERS[numbers],
    )  # fmt: skip
    story = model.startswith(("babyllama", "stories"))
    texts: list[Any] = [{"prompt_token_ids": ids} for ids in cut_prompts(llm.tokenizer, story, prompts)]
    params = {
        name: [SamplingParams(**SAMPLING[name], max_tokens=new, ignore_eos=True, seed=i) for i in range(prompts)] for name in SAMPLING
    }
    plain = {
        name: [llm.generate([text], [own])[0].outputs[0].token_ids for text, own in zip(texts, of, strict=True)]
        for name, of in params.items()
    }
    result = Result()
    drafters = [*ALONE, *(WITH_A_SECOND_MODEL if model in DRAFT_MODELS else ())]
    while result.tokens < tokens:
        drafter, sampling = str(rng.choice(drafters)), str(rng.choice(list(SAMPLING)))
        batch, chunk, threads = int(rng.choice(BATCHES)), int(rng.choice(CHUNKS)), int(rng.integers(1, 3))
        rows = int(rng.choice([4, 8, 16]))
        llm.runner.backend.use_threads(threads)
        engine = llm.sibling(draft=drafter, token_budget=max(chunk, batch), max_seqs=batch, draft_rows=rows)
        order = rng.permutation(prompts)[: max(batch, 4)].tolist()
        found = engine.generate([texts[i] for i in order], [params[sampling][i] for i in order])
        said = f"{model} {numbers} {sampling} {drafter} batch={batch} chunk={chunk} rows={rows} threads={threads}"
        for i, output in zip(order, found, strict=True):
            own, expected = output.outputs[0].token_ids, plain[sampling][i]
            result.tokens += len(own)
            if own != expected:
                place = next((at for at, (a, b) in enumerate(zip(own, expected, strict=False)) if a != b), min(len(own), len(expected)))
                result.faults.append(f"{said}: prompt {i} differs at token {place}")
            stats = output.outputs[0].stats
            result.accepted[drafter] += stats.accepted
            result.drafted[drafter] += stats.drafted
        result.conditions += 1
    return result


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/prove bit-exact", description=__doc__)
    parser.add_argument("--tokens", type=int, default=1_000_000, help="tokens to compare, over all models and number formats")
    parser.add_argument("--model", action="append", choices=sorted(MODELS), help="default: embedded and pilot-16m")
    parser.add_argument("--numbers", action="append", choices=sorted(NUMBERS), help="default: all")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--new", type=int, default=64, help="new tokens per text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    jobs = [(model, numbers) for model in options.model or ("embedded", "pilot-16m") for numbers in options.numbers or NUMBERS]
    each = -(-options.tokens // len(jobs))
    began, total, faults = time.perf_counter(), Result(), []
    with multiprocessing.get_context("spawn").Pool(options.processes, maxtasksperchild=1) as pool:
        waiting = [(job, pool.apply_async(run, (*job, each, options.seed, options.prompts, options.new))) for job in jobs]
        for (model, numbers), handle in waiting:
            one = handle.get()
            seen = f"{one.tokens:>9,} tokens, {one.conditions:>4} conditions"
            print(f"{model:12} {numbers:9} {seen}, {len(one.faults)} texts differ", flush=True)
            total.tokens += one.tokens
            total.conditions += one.conditions
            total.accepted.update(one.accepted)
            total.drafted.update(one.drafted)
            faults += one.faults
    for drafter, drafted in sorted(total.drafted.items()):
        accepted = total.accepted[drafter]
        print(f"{drafter:42} {drafted:>9,} drafted, {accepted:>8,} accepted")
        if drafter != "none" and not 0 < accepted < drafted:
            faults.append(f"{drafter}: {accepted} of {drafted} accepted: nothing was proved")
    minutes = (time.perf_counter() - began) / 60
    print(f"{total.tokens:,} tokens, {total.conditions} conditions, {minutes:.1f} minutes: {len(faults)} faults")
    for fault in faults[:20]:
        print(f"  {fault}")
    sys.exit(bool(faults))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
    main()
