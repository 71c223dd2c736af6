"""Native kernels: same seed, same text, without any tolerance: under every cache policy, with every lossless drafter, in batches of 1 to
16 of one policy or of several, in chunks of 1 to 512 rows, greedy and sampled, in float32, bfloat16 and quantized weights, on one and
two threads, over prefixes that other requests of any policy left in the cache; with --adapters, texts of several LoRA adapters and of the
model in the same batches. A GGUF file runs as it is stored.

Each text is compared token by token with what an engine that shares no prefixes writes without a drafter, alone, its prompt in one
chunk, on one thread. A condition is drawn at random (--seed) until --tokens were compared. The proof fails where a text differs, where
a drafter never had a token accepted or one rejected, where a lossy policy changed no text, and where no prefix was reused after
a policy.

With --beside PYTHON, every text of every policy is written by this interpreter and by PYTHON, which may lack PyTorch, each with its own
default drafter, in one batch; the proof fails where a text differs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.proofs.identity import DRAFT_MODELS, MODELS, cut_prompts
from tests.adapters import make

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
STREAM, SMALL = "streaming-llm:sinks=4,recent=44", "budget=64,recent=8,sinks=1,history=32"
TOP, LABELS = "page-top-k:tokens=96", "double-sparsity:tokens=32,profile={profile}"
SENTENCES = "sentencekv:tokens=72,start=4,recent=8,longest=16"
POLICIES: dict[str, dict[str, str]] = {
    "plain": {},
    "streaming-llm": {"keep": STREAM},
    "scissorhands": {"keep": f"scissorhands:{SMALL}"},
    "ada-kv": {"keep": "ada-kv:budget=64,window=8,sinks=1"},
    "int8": {"codec": "int8"},
    "int4": {"codec": "int4:block=32"},
    "kivi": {"codec": "kivi:block=32"},
    "gear": {"codec": "gear:block=32"},
    "page-top-k": {"read": TOP},
    "double-sparsity": {"read": LABELS},
    "sentencekv": {"read": SENTENCES},
    "infllm": {"read": "infllm:tokens=80,local=32,sinks=4,block=32"},
    "layer-skip": {"depth": "layer-skip:speedup=1.5"},
    "streaming-llm, int8": {"keep": STREAM, "codec": "int8"},
    "streaming-llm, page-top-k": {"keep": STREAM, "read": TOP},
    "snapkv, sentencekv": {"keep": "snapkv:budget=160", "read": SENTENCES},
    "ada-kv, int8, page-top-k": {"keep": "ada-kv:budget=128,window=8,sinks=1", "codec": "int8", "read": TOP},
    "int4, double-sparsity": {"codec": "int4:block=64", "read": LABELS},
    "layer-skip, int4": {"depth": "layer-skip:speedup=1.5", "codec": "int4:block=32"},
}
NEAR = "int8"  # the only policy that may change nothing
SHARED = "plain", "streaming-llm", "layer-skip"  # whose requests find prefixes in the cache; those of others have page formats
ALONE = "none", "auto", "suffix", "ngram", "token-recycling", "copyspec", "aded", "self-skip:skip=1", "union:parts=token-recycling+copyspec"
WITH_A_SECOND_MODEL = ("draft-model", "rsd-c", "rsd-s", "dyspec", "spectr", "optimal-multi-draft")
# Most conditions are wide batches in large chunks on one thread, because these cost least for each token.
BATCHES = 1, 2, 3, 5, 8, *[16] * 7
CHUNKS = 1, 2, 7, 16, 31, 33, *[64, 128, 512] * 3
THREADS = *[1] * 7, 2


@dataclass
class Result:
    """tokens: compared, by policy; reused: prompt tokens found in the cache, by policy."""

    tokens: Counter[str] = field(default_factory=Counter)
    conditions: int = 0
    accepted: Counter[str] = field(default_factory=Counter)
    drafted: Counter[str] = field(default_factory=Counter)
    reused: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def add(self, other: Result) -> None:
        for name in ("tokens", "accepted", "drafted", "reused", "changed"):
            getattr(self, name).update(getattr(other, name))
        self.conditions += other.conditions
        self.faults += other.faults


class Proof:
    """One model in one form of numbers. Expected texts are made when they are first needed, by an engine of their own."""

    def __init__(self, model: str, numbers: str, prompts: int, new: int, place: Path, adapters: int) -> None:
        from redraft import LLM, SamplingParams

        self.model, self.numbers, self.new, self.params = model, numbers, new, SamplingParams
        where = str(MODELS.get(model, model))
        made = {f"a{i}": make(place / f"a{i}", Path(where), seed=i, rank=4 + 6 * i, size=0.1) for i in range(adapters)}
        self.adapters = [None, *made]
        options = {"backend": "native", "threads": 1, "max_model_len": 256, "cache_fraction": 0.05, "lora": made, **NUMBERS[numbers]}
        self.llm = LLM(where, draft_model=DRAFT_MODELS.get(model), **options)
        self.alone = LLM(where, draft="none", prefix_sharing=False, **options)
        story = model.startswith(("babyllama", "stories"))
        self.prompts = cut_prompts(self.llm.tokenizer, story, prompts)
        self.profile = self._calibrate(place / "profile.safetensors")
        self.drafters = [*ALONE, *(WITH_A_SECOND_MODEL if model in DRAFT_MODELS else ())]
        self.expected: dict[tuple[str, str, int], list[int]] = {}

    def _calibrate(self, path: Path) -> Path:
        from redraft.kv.sparse_attention.double_sparsity import DoubleSparsity

        return DoubleSparsity.calibrate(self.llm.runner, self.prompts).save(path)

    def of(self, policy: str, sampling: str, i: int) -> Any:
        options = {seam: text.format(profile=self.profile) for seam, text in POLICIES[policy].items()}
        lora = self.adapters[i % len(self.adapters)]
        return self.params(**SAMPLING[sampling], max_tokens=self.new, ignore_eos=True, seed=i, lora=lora, **options)

    def text(self, policy: str, sampling: str, i: int) -> list[int]:
        key = policy, sampling, i
        if key not in self.expected:
            self.alone.runner.backend.use_threads(1)
            (made,) = self.alone.generate([{"prompt_token_ids": self.prompts[i]}], [self.of(*key)])
            self.expected[key] = made.outputs[0].token_ids
        return self.expected[key]

    def run(self, rng: Any, result: Result) -> None:
        """One condition."""
        drafter, sampling = str(rng.choice(self.drafters)), str(rng.choice(list(SAMPLING)))
        batch, chunk, threads = (int(rng.choice(values)) for values in (BATCHES, CHUNKS, THREADS))
        rows, names = int(rng.choice([4, 8, 16])), list(POLICIES)
        order = [int(i) for i in rng.integers(0, len(self.prompts), max(batch, 4))]
        mixed, one = bool(rng.integers(2)), str(rng.choice(names))
        policies = [str(rng.choice(names)) if mixed else one for _ in order]
        wanted = [self.text(policy, sampling, i) for policy, i in zip(policies, order, strict=True)]
        self.llm.runner.backend.use_threads(threads)
        engine = self.llm.sibling(draft=drafter, token_budget=max(chunk, batch), max_seqs=batch, draft_rows=rows)
        found = engine.generate(
            [{"prompt_token_ids": self.prompts[i]} for i in order],
            [self.of(policy, sampling, i) for policy, i in zip(policies, order, strict=True)],
        )
        said = f"{self.model} {self.numbers} {sampling} {drafter} batch={batch} chunk={chunk} rows={rows} threads={threads}"
        for i, policy, expected, output in zip(order, policies, wanted, found, strict=True):
            own, stats = output.outputs[0].token_ids, output.outputs[0].stats
            result.tokens[policy] += len(own)
            result.reused[policy] += output.cached_tokens
            result.changed[policy] += own != self.expected.get(("plain", sampling, i), own)
            result.accepted[drafter] += stats.accepted
            result.drafted[drafter] += stats.drafted
            if own != expected:
                place = next((at for at, (a, b) in enumerate(zip(own, expected, strict=False)) if a != b), min(len(own), len(expected)))
                result.faults.append(f"{said} {policy}: prompt {i} differs at token {place}, {output.cached_tokens} cached")
        result.conditions += 1


def run(model: str, numbers: str, tokens: int, minutes: float, seed: int, prompts: int, new: int, adapters: int) -> Result:
    """One process's work, until so many tokens were compared or so many minutes are over. Prints how far it is once a minute."""
    import numpy as np

    rng, result = np.random.default_rng([seed, *model.encode(), *numbers.encode()]), Result()
    with tempfile.TemporaryDirectory() as folder:
        proof = Proof(model, numbers, prompts, new, Path(folder), adapters)
        began = printed = time.perf_counter()
        while result.tokens.total() < tokens and (now := time.perf_counter()) - began < 60 * minutes:
            proof.run(rng, result)
            if now - printed > 60:
                printed = now
                at = f"{result.tokens.total():,} of {tokens:,} tokens, {len(result.faults)} texts differ, {(now - began) / 60:.0f} minutes"
                print(f"  {Path(model).name} {numbers}: {at}", file=sys.stderr, flush=True)
    return result


def written(model: str, numbers: str, prompts: int, new: int) -> list[list[int]]:
    """The texts of all prompts under every policy and way of sampling, in batches of one way, with the default drafter."""
    with tempfile.TemporaryDirectory() as folder:
        proof, found = Proof(model, numbers, prompts, new, Path(folder), 0), []
        for sampling in SAMPLING:
            asked = [(policy, i) for policy in POLICIES for i in range(len(proof.prompts))]
            outputs = proof.llm.generate(
                [{"prompt_token_ids": proof.prompts[i]} for _, i in asked], [proof.of(policy, sampling, i) for policy, i in asked]
            )
            found += [output.outputs[0].token_ids for output in outputs]
    return found


TEXTS = """
import json, sys
from scripts.proofs.bit_exact import written
model, numbers, prompts, new = sys.argv[1:]
print(json.dumps([written(model, numbers, int(prompts), int(new)), "torch" in sys.modules]))
"""


def beside(python: str, jobs: list[tuple[str, str]], prompts: int, new: int) -> int:
    """The number of texts of the two interpreters that differ."""
    faults = 0
    for model, numbers in jobs:
        both = []
        for one in (sys.executable, python):
            command = [one, "-c", TEXTS, model, numbers, str(prompts), str(new)]
            both.append(json.loads(subprocess.run(command, cwd=Path(__file__).parents[2], check=True, stdout=subprocess.PIPE).stdout))
        (own, _), (other, loaded) = both
        differ = sum(a != b for a, b in zip(own, other, strict=True))
        said = f"{sum(map(len, own)):,} tokens of {len(own)} texts, {differ} differ; PyTorch {'loaded' if loaded else 'not loaded'} beside"
        print(f"{Path(model).name:12} {numbers:9} {said}", flush=True)
        faults += differ
    return faults


def judged(total: Result) -> list[str]:
    """What was not proved."""
    faults = list(total.faults)
    for drafter, drafted in sorted(total.drafted.items()):
        if drafter != "none" and not 0 < total.accepted[drafter] < drafted:
            faults.append(f"{drafter}: {total.accepted[drafter]} of {drafted} accepted: nothing was proved")
    for policy, tokens in total.tokens.items():
        if policy not in ("plain", NEAR) and tokens and not total.changed[policy]:
            faults.append(f"{policy}: no text differs from the plain one: nothing was proved")
        if policy in SHARED and not total.reused[policy]:
            faults.append(f"{policy}: no prefix was found in the cache: nothing was proved")
    return faults


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/prove bit-exact", description=__doc__)
    parser.add_argument("--tokens", type=int, default=1_000_000, help="to compare, over all models and numbers")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="the longest that one model in one form of numbers may take")
    parser.add_argument("--model", action="append", help=f"a folder, or of {', '.join(sorted(MODELS))}; else embedded and pilot-16m")
    parser.add_argument("--numbers", action="append", choices=sorted(NUMBERS), help="else all")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--new", type=int, default=64, help="tokens of a text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--adapters", type=int, default=0, help="random LoRA adapters beside the model")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--beside", metavar="PYTHON", help="compare with the texts of another environment's interpreter")
    chosen = parser.parse_args()
    jobs = [(model, numbers) for model in chosen.model or ("embedded", "pilot-16m") for numbers in chosen.numbers or NUMBERS]
    if chosen.beside:
        sys.exit(bool(beside(chosen.beside, jobs, chosen.prompts, chosen.new)))
    each = -(-chosen.tokens // len(jobs))
    began, total = time.perf_counter(), Result()
    with multiprocessing.get_context("spawn").Pool(chosen.processes, maxtasksperchild=1) as pool:
        rest = each, chosen.minutes, chosen.seed, chosen.prompts, chosen.new, chosen.adapters
        waiting = [(job, pool.apply_async(run, (*job, *rest))) for job in jobs]
        for (model, numbers), handle in waiting:
            one = handle.get()
            seen = f"{one.tokens.total():>9,} tokens, {one.conditions:>4} conditions"
            print(f"{Path(model).name:12} {numbers:9} {seen}, {len(one.faults)} texts differ", flush=True)
            total.add(one)
    for drafter, drafted in sorted(total.drafted.items()):
        print(f"{drafter:42} {drafted:>9,} drafted, {total.accepted[drafter]:>8,} accepted")
    for policy, tokens in sorted(total.tokens.items()):
        print(f"{policy:28} {tokens:>9,} tokens, {total.reused[policy]:>8,} from the cache")
    faults, minutes = judged(total), (time.perf_counter() - began) / 60
    print(f"{total.tokens.total():,} tokens, {total.conditions} conditions, {minutes:.1f} minutes: {len(faults)} faults")
    for fault in faults[:20]:
        print(f"  {fault}")
    sys.exit(bool(faults))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
    main()
