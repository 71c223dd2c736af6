"""Flags of vLLM, SGLang and llama.cpp, and the options of Redraft to use instead."""

from __future__ import annotations

from collections.abc import Iterable

import typer

MODEL = "the argument MODEL"

OURS = {  # their flag -> ours; suggested only if the verb has it
    "--model": MODEL,
    "-m": MODEL,
    "-hf": MODEL,
    "--hf-repo": MODEL,
    "--model-id": MODEL,
    "--ctx-size": "--max-model-len",
    "-c": "--max-model-len",
    "--context-length": "--max-model-len",
    "--num-ctx": "--max-model-len",
    "--max-seq-len": "--max-model-len",
    "-n": "--max-tokens",
    "--predict": "--max-tokens",
    "--n-predict": "--max-tokens",
    "--max-new-tokens": "--max-tokens",
    "--temp": "--temperature",
    "-s": "--seed",
    "--repeat-penalty": "--repetition-penalty",
    "--typical": "--typical-p",
    "--top-nsigma": "--top-n-sigma",
    "--dynatemp-exp": "--dynatemp-exponent",
    "--mirostat-ent": "--mirostat-tau",
    "--mirostat-lr": "--mirostat-eta",
    "--dry-sequence-breaker": "--dry-sequence-breakers",
    "-sys": "--system",
    "--system-prompt": "--system",
    "--chat-template-file": "--chat-template",
    "-t": "--threads",
    "--gpu-memory-utilization": "--cache-fraction",
    "--mem-fraction-static": "--cache-fraction",
    "--kv-cache-memory-bytes": "--cache-memory",
    "--kv-cache-dtype": "--codec",
    "--cache-type-k": "--codec",
    "--cache-type-v": "--codec",
    "-ctk": "--codec",
    "-ctv": "--codec",
    "--quantization": "--quant",
    "-q": "--quant",
    "--max-num-seqs": "--max-seqs",
    "--parallel": "--max-seqs",
    "-np": "--max-seqs",
    "--max-num-batched-tokens": "--token-budget",
    "--batch-size": "--token-budget",
    "--ubatch-size": "--token-budget",
    "-b": "--token-budget",
    "-ub": "--token-budget",
    "--scheduling-policy": "--scheduler",
    "--data-parallel-size": "--replicas",
    "-dp": "--replicas",
    "--dp-size": "--replicas",
    "--data-parallel-backend": "--ray",
    "--kv-transfer-config": "--instances",
    "--disaggregation-mode": "--instances",
    "--lora-modules": "--lora",
    "--lora-paths": "--lora",
    "--lora-scaled": "--lora",
    "--speculative-config": "--draft, --draft-model and --draft-rows",
    "--spec-type": "--draft",
    "--spec-draft-model": "--draft-model",
    "--speculative-model": "--draft-model",
    "--model-draft": "--draft-model",
    "-md": "--draft-model",
    "--num-speculative-tokens": "--draft-rows",
    "--draft-max": "--draft-rows",
    "--spec-draft-n-max": "--draft-rows",
    "--no-enable-prefix-caching": "--no-prefix-sharing",
    "--input-file": "--prompts",
    "-i": "--prompts",
    "-o": "--output",
    "--output-file": "--output",
    "--no-chat-template": "--raw",
}
WITHOUT = {  # their flags without a counterpart -> why
    "--tensor-parallel-size": "a model lies whole on one device, chosen by --device",
    "-tp": "a model lies whole on one device, chosen by --device",
    "--pipeline-parallel-size": "a model lies whole on one device, chosen by --device",
    "-pp": "a model lies whole on one device, chosen by --device",
    "--tensor-split": "a model lies whole on one device, chosen by --device",
    "-ngl": "a model lies whole on one device, chosen by --device",
    "--n-gpu-layers": "a model lies whole on one device, chosen by --device",
    "--gpu-layers": "a model lies whole on one device, chosen by --device",
    "--trust-remote-code": "Redraft never runs code of a checkpoint",
    "--revision": "write MODEL as repo@revision",
    "--tokenizer": "the tokenizer is the one in the folder of the model",
    "--enforce-eager": "there are no CUDA graphs to switch off",
    "--enable-chunked-prefill": "prompts are always read in chunks, of --token-budget rows",
    "--enable-prefix-caching": "equal prefixes are computed once unless --no-prefix-sharing is given",
    "--enable-lora": "--lora NAME=FOLDER is enough, or --lora-dir and --admin-key of redraft serve",
    "--max-loras": "a batch may hold any number of adapters",
    "--max-cpu-loras": "all adapters stay in memory until they are unloaded",
    "--max-lora-rank": "adapters of every rank up to 1024 are applied",
    "--fully-sharded-loras": "a model lies whole on one device, chosen by --device",
    "--swap-space": "nothing is swapped; a preempted request is computed again",
    "-cnv": "that is the command 'redraft chat'",
    "--conversation": "that is the command 'redraft chat'",
    "--interactive": "that is the command 'redraft chat'",
    "-f": "pipe the file in: redraft generate < FILE",
    "--file": "pipe the file in: redraft generate < FILE",
}


def answer(context: typer.Context, unknown: str, typed: Iterable[str]) -> str:
    """The error about an option that the verb of `context` does not have: what to write instead, if there is anything.

    unknown: the option as the parser names it, which of -ngl sees -n only; typed: the words of the command line.
    """
    flag = _whole(unknown, typed).replace("_", "-")
    verb = context.command_path
    known = {name for parameter in context.command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    ours = OURS.get(flag)
    if flag in known:
        return f"{verb}: {unknown} is written {flag}"
    if ours == MODEL and "model" in known:
        return f"{verb}: {flag} is {MODEL} here: {verb} MODEL"
    if ours is not None and ours.partition(",")[0] in known:
        return f"{verb}: {flag} is {ours} here"
    if flag in WITHOUT:
        return f"{verb}: no option {flag}: {WITHOUT[flag]}"
    close = near(flag, (name for name in known if name.startswith("--")))
    return f"{verb}: no option {unknown}" + (f"; did you mean {' or '.join(close)}?" if close else "; --help lists the options")


def _whole(unknown: str, typed: Iterable[str]) -> str:
    """The word of the command line with the unknown option if it is a flag of vLLM or llama.cpp, else the option."""
    words = (word.partition("=")[0] for word in typed)
    return next((word for word in words if word.startswith(unknown) and (word in OURS or word in WITHOUT)), unknown)


def near(name: str, known: Iterable[str]) -> list[str]:
    """Of `known` those that a typing error away may be meant: at most one edit for
    every four characters begun. Only the nearest are returned.

    >>> near("--max-token", ["--max-tokens", "--min-tokens", "--max-seqs"])
    ['--max-tokens']
    >>> near("--ctx-size", ["--max-seqs"])
    []
    """
    bare = name.strip("-")
    found = {one: _edits(bare, one.strip("-")) for one in known}
    least = min(found.values(), default=0)
    return sorted(one for one, edits in found.items() if edits == least) if least <= -(-len(bare) // 4) and least < len(bare) else []


def _edits(a: str, b: str) -> int:
    """The least number of letters to insert, delete, replace or swap with their neighbours that make one word of the other."""
    before, last = [0] * (len(b) + 1), list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        row = [i]
        for j, other in enumerate(b, 1):
            row.append(min(last[j] + 1, row[-1] + 1, last[j - 1] + (letter != other)))
            if i > 1 and j > 1 and letter == b[j - 2] and a[i - 2] == other:
                row[j] = min(row[j], before[j - 2] + 1)
        before, last = last, row
    return last[-1]
