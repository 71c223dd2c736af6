"""Cache policies beside kvpress (NVIDIA): the same model, prompts and budgets; how often a needle is found again.

The needle of `redraft bench cache`: a sentence in filler, and its beginning again at the end. It is asked in two places: inside, where
the question is part of the compressed context, and after it, where the choice of slots does not know the question. Both engines score
the right answer's tokens: right if each is the likeliest, and the mean log-probability of a token against the engine's own full cache.

kvpress gets an environment of its own, because it needs an older transformers:
  python3 -m venv /tmp/kvpress
  /tmp/kvpress/bin/pip install kvpress==0.5.5 transformers==5.2.0 torch==2.13.0
  redraft calibrate smollm2 --method think
  scripts/prove cache-peers smollm2 --python /tmp/kvpress/bin/python
ThinK keeps a part of the channels of keys, not of the tokens. Only it needs the calibration; what Redraft refuses is a cell that says so.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from redraft import LLM, SamplingParams, registry
from redraft.bench import cache
from redraft.bench.tasks import Probe, Task, Wanted, build, sources
from redraft.engine.budgets import Policy, budgeted
from redraft.errors import RedraftError
from redraft.models import loader

WORKER = Path(__file__).with_name("_kvpress.py")
METHODS = {  # name -> Redraft's policy; the name is also that of the press. {dropped}: 1 - {part}
    "snapkv": "keep=snapkv:budget={part}",
    "h2o": "keep=h2o:budget={part}",
    "streaming-llm": "keep=streaming-llm:sinks=4,recent={recent}",
    "ada-kv": "keep=ada-kv:budget={part}",
    "think": "codec=think:share={dropped}",
}
INSIDE, AFTER = "inside", "after"


class Peer:
    """The process of kvpress. SystemExit if it cannot start or ends early."""

    def __init__(self, python: Path, model: str, dtype: str, threads: int) -> None:
        if not python.exists():
            sys.exit(f"--python {python}: there is no such file; see scripts/prove cache-peers --help")
        self.process = subprocess.Popen([python, WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.versions = self.ask({"model": model, "dtype": dtype, "threads": threads})

    def ask(self, what: Any) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(what) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        line = self.process.stdout.readline()
        if not line:
            sys.exit("kvpress ended early; its last lines above say why")
        return json.loads(line)

    def score(self, press: str, keep: float, task: Task) -> cache.Scores:
        logprobs, right = (np.full((task.items, len(task.places)), np.nan) for _ in range(2))
        texts = [(probe.ids, probe.context, probe.answers[0].first) for probe in task.probes]
        for probe, found in zip(task.probes, self.ask({"press": press, "keep": keep, "texts": texts}), strict=True):
            logprobs[probe.item, probe.answers[0].place], right[probe.item, probe.answers[0].place] = found
        return cache.Scores(logprobs, right)


def placed(task: Task) -> dict[str, Task]:
    """The task with its questions after the context, and inside it."""

    def asked(probe: Probe) -> Probe:
        return dataclasses.replace(probe, context=probe.answers[0].first)

    return {AFTER: task, INSIDE: dataclasses.replace(task, probes=[asked(probe) for probe in task.probes])}


def own(llm: LLM, policy: str, budget: float, task: Task, batch: int) -> cache.Scores | None:
    """Redraft's scores, None if it refuses so small a budget. The budget is a part of the context, as kvpress counts it."""
    tokens = round(np.mean([probe.context for probe in task.probes]))
    text = policy.replace("{dropped}", f"{1 - budget / 100:g}")
    choice = cache.PolicyAtBudget(policy, budget, budgeted(budget, tokens), Policy.of(text).at(budget, tokens))
    try:
        llm.engine.policies.check(SamplingParams(**choice.params))
    except RedraftError as refused:
        print(refused, file=sys.stderr)
        return None
    return cache.score(llm, task, task.probes, choice, batch, lambda what: None)


def cell(scores: cache.Scores | None, full: cache.Scores) -> str:
    if scores is None:
        return "refused"
    lost = cache.bootstrap((scores.logprobs - full.logprobs).mean(1))
    return f"{scores.right.mean():4.0%} {lost.mean:+6.2f}"


def report(found: Seq[dict[str, Any]], console: Console) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    table.add_column("method")
    for name in ("keeps", *(f"{side}, {place}" for place in (INSIDE, AFTER) for side in ("redraft", "kvpress"))):
        table.add_column(name, justify="right")
    for row in found:
        table.add_row(row["method"], row["keeps"], *row["cells"])
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(prog="prove cache-peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a checkpoint")
    parser.add_argument("--python", type=Path, default=Path("/tmp/kvpress/bin/python"), help="of the environment with kvpress")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: those that are registered")
    parser.add_argument("--budgets", nargs="+", type=float, default=[50, 25, 10, 5], metavar="PERCENT")
    parser.add_argument("--length", type=int, default=512, help="tokens of a text")
    parser.add_argument("--limit", type=int, default=8, help="texts; each has the needle at five depths")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=4, help="texts at once, Redraft only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all scores there")
    given = parser.parse_args()
    folder = str(loader.resolve(given.model))
    llm = LLM(folder, dtype=given.dtype, threads=given.threads, draft="none", prefix_sharing=False, max_seqs=given.batch)
    task = next(
        one
        for one in build(llm.tokenizer, sources([]), Wanted(given.length, given.limit, seed=given.seed), llm.max_model_len - 1)
        if one.name == "needle"
    )
    peer, tasks, console = Peer(given.python, folder, given.dtype, given.threads), placed(task), Console(width=80)
    methods = [name for name in given.methods if name in registry.METHODS[METHODS[name].partition("=")[0]]]
    rows: list[dict[str, Any]] = []
    plain = {
        place: (cache.score(llm, one, one.probes, cache.FULL, given.batch, str), peer.score("full", 1.0, one))
        for place, one in tasks.items()
    }
    for name, budget in [("full", 100.0), *((name, budget) for name in methods for budget in given.budgets)]:
        scores = {
            place: plain[place]
            if name == "full"
            else (own(llm, METHODS[name], budget, one, given.batch), peer.score(name, budget / 100, one))
            for place, one in tasks.items()
        }
        cells = [cell(one, full) for place in (INSIDE, AFTER) for one, full in zip(scores[place], plain[place], strict=True)]
        kept = {
            place: [one and {"right": one.right.tolist(), "logprobs": one.logprobs.tolist()} for one in scores[place]] for place in scores
        }
        rows.append({"method": name, "budget": budget, "keeps": f"{budget:g} %", "cells": cells, "scores": kept})
        print(name, budget, *cells, file=sys.stderr, flush=True)
    report(rows, console)
    apart = max(float(np.abs(one.logprobs - other.logprobs).max()) for one, other in plain.values())
    texts = f"{task.items} texts of {given.length} tokens, {len(task.places)} depths, {given.dtype}"
    console.print(f"\n{texts}. Full caches differ by {apart:.4f} nats at most.")
    console.print(
        "A cell: answers right, and nats that a token of the right answer changes.", *(f"{k} {v}" for k, v in peer.versions.items())
    )
    if given.json:
        given.json.write_text(json.dumps({"versions": peer.versions, "texts": texts, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
