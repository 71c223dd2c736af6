"""The other side of scripts/prove cache-peers: scores texts under the presses of kvpress, in the environment where that is installed.

JSON lines in, JSON lines out. The first line has the model, its dtype and threads. Each further line names a press, the part that it
keeps, and texts: ids, the number of leading ids that are compressed, and where the answer begins. Nothing of Redraft is imported.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import sys
from typing import Any

import kvpress
import torch
import transformers

WINDOW, POOL, SINKS = 32, 7, 4  # as Redraft's options, so that only the methods differ


def press_of(name: str, keep: float) -> Any:
    """keep: the part of the context's slots that stay; of ThinK, the part of the channels of keys."""
    drop = 1 - keep
    if name == "snapkv":
        return kvpress.SnapKVPress(drop, window_size=WINDOW, kernel_size=POOL)
    if name == "h2o":
        return kvpress.ObservedAttentionPress(drop)
    if name == "streaming-llm":  # the wrapper turns keys to positions within the cache, as kvpress's documentation asks for this method
        return kvpress.KeyRerotationPress(kvpress.StreamingLLMPress(drop, n_sink=SINKS))
    if name == "ada-kv":
        return kvpress.AdaKVPress(kvpress.SnapKVPress(drop, window_size=WINDOW, kernel_size=POOL))
    if name == "think":
        return kvpress.ThinKPress(drop, window_size=WINDOW)
    assert name == "full", name
    return None


@torch.inference_mode()
def score(model: Any, press: Any, ids: list[int], context: int, first: int) -> tuple[float, bool]:
    """The mean log-probability of the tokens from `first` on, and whether each of them is the likeliest. The first `context` tokens are
    read and compressed; the rest follows in one pass."""
    cache = transformers.DynamicCache()
    with press(model) if press is not None else contextlib.nullcontext():
        logits = model(torch.tensor([ids[:context]]), past_key_values=cache, logits_to_keep=1).logits[0]
    begin = cache.get_seq_length() if isinstance(press, kvpress.KeyRerotationPress) else context
    rest = torch.tensor([ids[context:]])
    positions = begin + torch.arange(rest.shape[1])[None]
    after = model(rest, past_key_values=cache, position_ids=positions).logits[0, :-1]
    rows = torch.cat([logits, after]).float()[first - context :].log_softmax(-1)
    right = torch.tensor(ids[first:])
    return float(rows.gather(1, right[:, None]).mean()), bool((rows.argmax(-1) == right).all())


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # output of libraries
    job = json.loads(sys.stdin.readline())
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(job["threads"])
    dtype = getattr(torch, job["dtype"])
    model = transformers.AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype, local_files_only=True).eval()
    versions = {name: importlib.metadata.version(name) for name in ("kvpress", "transformers", "torch")}
    answers.write(json.dumps(versions) + "\n")
    answers.flush()
    for line in sys.stdin:
        asked = json.loads(line)
        press = press_of(asked["press"], asked["keep"])
        model.set_attn_implementation("eager" if asked["press"] == "h2o" else "sdpa")  # the one that each of them asks for
        found = [score(model, press, *text) for text in asked["texts"]]
        answers.write(json.dumps(found) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
