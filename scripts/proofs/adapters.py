"""What adapters cost: tokens/s of a batch of 8, of the model alone and with four random LoRA adapters and the model mixed, in turns.

scripts/prove adapters smollm2 [--rank 8] [--rounds 7] [--tokens 64] [--quant int8]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from redraft import LLM, SamplingParams
from redraft.models import loader
from tests import adapters

PROMPTS = ["Once upon a time", "The capital of France is", "def quicksort(xs):", "A short list of birds:"] * 2


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/prove adapters", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--quant", default="none")
    given = parser.parse_args()
    folder = loader.resolve(given.model)
    with tempfile.TemporaryDirectory() as place:
        made = {f"a{i}": str(adapters.make(Path(place) / f"a{i}", folder, rank=given.rank, seed=i, size=0.02)) for i in range(4)}
        llm = LLM(given.model, draft="none", quant=given.quant, lora=made, max_model_len=1024, prefix_sharing=False)
    names = {"the model": [None] * 8, "one adapter": ["a0"] * 8, "four and the model": ["a0", "a1", "a2", "a3", None, "a0", "a1", None]}
    speeds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(given.rounds + 1):  # the first is not counted
        for name in list(names) if turn % 2 else reversed(names):
            params = [SamplingParams(temperature=0, max_tokens=given.tokens, ignore_eos=True, lora=lora) for lora in names[name]]
            began = time.perf_counter()
            outputs = llm.generate(PROMPTS, params)
            count = sum(len(output.outputs[0].token_ids) for output in outputs)
            if turn:
                speeds[name].append(count / (time.perf_counter() - began))
    base = speeds["the model"]
    for name, found in speeds.items():
        ratios = sorted(own / other for own, other in zip(found, base, strict=True))
        share = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f}) of the model"
        print(f"{name:20} {statistics.median(found):7.1f} tokens/s   {share}")


if __name__ == "__main__":
    main()
