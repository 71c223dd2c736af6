"""Prompt tokens that a replayed agent computes, turn by turn, by what its server reuses.

The history of an agent grows, is edited, put into another order and trimmed in the middle (scripts/agent_trace.py makes one). The ways:

none      every prompt is computed in full
prefix    the prefix cache alone; exact
REUSE     the prefix cache, and a method of `llm.edit`, as --reuse pie names it. The text before is the last one that was computed in
          full. A turn of which the method would take over less than half of what the prefix cache lacks is computed in full, so that later
          turns find it
CHUNKS    the prefix cache, and a method that reuses declared chunks, as --chunks cacheblend names it. The results of tools are the chunks
peer      llama.cpp's server with --cache-reuse, if --peer-python has the package xllamacpp and --gguf the model

For each way the proof prints the tokens that were computed, by kind of turn: those of the prompt, of chunks before it, and rows that ran
again, which count by the layers that they ran. For ways that are not exact it prints the divergence of the next token's distribution from
that of `prefix`, KL(prefix || way), over the likeliest 1,024 tokens.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import NamedTuple

import numpy as np

from redraft import LLM, SamplingParams, registry
from redraft.core.sequence import Request
from redraft.engine.output import checked
from scripts import agent_trace
from scripts.agent_trace import Turn

KINDS = ("grow", "edit", "move", "trim")
PEER = """
import json, sys, xllamacpp
p = xllamacpp.CommonParams()
p.model.path, p.n_ctx, p.n_parallel, p.cache_ram_mib, p.ctx_shift = sys.argv[1], int(sys.argv[2]), 1, 0, False
p.n_cache_reuse, p.cpuparams.n_threads, p.cpuparams_batch.n_threads = int(sys.argv[3]), 1, 1
server = xllamacpp.Server(p)
for line in sys.stdin:
    reply = server.handle_completions({"prompt": json.loads(line), "n_predict": 1, "cache_prompt": True, "temperature": 0})
    print(json.dumps(reply["timings"]["prompt_n"]), flush=True)
"""


class Ran(NamedTuple):
    """computed: prompt tokens, by turn; tops: the log-probabilities of the likeliest next tokens, by turn, empty if they are not known."""

    computed: list[int]
    tops: list[dict[int, float]]


def encoded(llm: LLM, turns: Seq[Turn]) -> list[list[list[int]]]:
    """Blocks are encoded one by one and their ids joined, as special tokens between messages have it."""
    return [[llm.tokenizer.encode(block, special=False) for block in turn.blocks] for turn in turns]


def run(llm: LLM, requests: Iterable[Request]) -> Ran:
    """The requests one after another, each made when those before it have ended."""
    engine, found = llm.engine, Ran([], [])
    chunks: list[Request] = []
    lacking = engine.chunk_texts.lacking

    def noted(request: Request) -> list[Request]:
        chunks.extend(texts := lacking(request))
        return texts

    engine.chunk_texts.lacking = noted  # type: ignore[method-assign]
    engine.table.forget()
    for request in requests:
        engine.add(request)
        rows = [row for _ in iter(lambda: engine.has_work, False) for event in checked(engine.step()) for row in event.logprobs]
        before = sum(len(text.prompt) - (text.cached_tokens or 0) for text in chunks)
        chunks.clear()
        own = len(request.prompt) - (request.cached_tokens or 0) - request.reused_tokens
        found.computed.append(own + round(request.repair_rows) + before)
        found.tops.append(dict(rows[0].top))
    engine.chunk_texts.lacking = lacking  # type: ignore[method-assign]
    return found


def exact(llm: LLM, texts: Seq[list[int]]) -> Ran:
    """The prefix cache alone."""
    return run(llm, (Request(str(i), list(ids), params(llm)) for i, ids in enumerate(texts)))


def chunked(llm: LLM, turns: Seq[Turn], blocks: Seq[list[list[int]]], reuse: str) -> Ran:
    """With the results as chunks."""

    def requests() -> Iterator[Request]:
        for i, (turn, ids) in enumerate(zip(turns, blocks, strict=True)):
            ends = np.cumsum([0, *map(len, ids)]).tolist()
            head, first = ends[len(agent_trace.TASK)], ends[turn.results[0]]  # what is left before the first result is a chunk too
            spans = [(head, first)] * (first > head) + [(ends[place], ends[place + 1]) for place in turn.results]
            yield Request(str(i), [token for block in ids for token in block], params(llm), reuse=reuse, chunks=spans)

    return run(llm, requests())


def edited(llm: LLM, texts: Seq[list[int]], reuse: str) -> Ran:
    """With a method of edits where it takes over enough."""
    memory, method = llm.runner.memory, registry.create("reuse", reuse).open(llm.runner)

    def requests() -> Iterator[Request]:
        full: list[int] = []
        for i, ids in enumerate(texts):
            stored = memory.match(ids, "")
            request = Request(str(i), list(ids), params(llm), reuse=reuse, before=full)
            spans = method.spans(request, stored, lambda tokens: memory.match([*tokens, 0], ""))
            if 2 * sum(span.length for span in spans if span.at >= stored) < len(ids) - stored:
                request.reuse, request.before, full = "", [], ids
            yield request

    return run(llm, requests())


def params(llm: LLM) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=1, logprobs=min(1024, llm.runner.spec.vocab), seed=0)


def peer(python: Path, gguf: Path, texts: Seq[list[int]], shortest: int) -> Ran:
    """llama.cpp's server in a process of its own. shortest: the tokens of the shortest piece that it takes over."""
    context = -(-(max(map(len, texts)) + 64) // 256) * 256
    command = [str(python), "-c", PEER, str(gguf), str(context), str(shortest)]
    given = "".join(json.dumps(ids) + "\n" for ids in texts)
    done = subprocess.run(command, input=given, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
    return Ran([int(line) for line in done.stdout.splitlines()], [])


def divergence(true: Ran, other: Ran) -> list[float]:
    """KL of each turn in nats; a token that is not among the likeliest of the other counts as its least likely one."""
    found = []
    for one, two in zip(true.tops, other.tops, strict=True):
        low = min(two.values())
        p, q = np.array(list(one.values())), np.array([two.get(token, low) for token in one])
        found.append(float((np.exp(p) * (p - q)).sum()))
    return found


def show(name: str, turns: Seq[Turn], ran: Ran, whole: int, true: Ran) -> None:
    by_kind = [sum(rows for rows, turn in zip(ran.computed, turns, strict=True) if turn.kind == kind) for kind in KINDS]
    total = sum(ran.computed)
    change = "" if not ran.tops else "exact" if ran.tops == true.tops else f"{np.mean(divergence(true, ran)):.2g}"
    print(f"{name:<24}{total:>10}{total / whole:>8.1%}" + "".join(f"{rows:>8}" for rows in by_kind) + f"{change:>12}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="prove agent-trace", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="embedded")
    parser.add_argument("--trace", type=Path, help="what scripts/agent_trace.py wrote; else one of the standard library")
    parser.add_argument("--turns", type=int, default=24)
    parser.add_argument("--most", type=int, help="letters of a history before it is trimmed; else what fits")
    parser.add_argument("--reuse", nargs="*", default=["pie"], help="methods of llm.edit")
    parser.add_argument("--chunks", nargs="*", default=["cacheblend"], help="methods that reuse declared chunks")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peer-python", type=Path, help="an interpreter with xllamacpp")
    parser.add_argument("--gguf", type=Path, help="the same model for llama.cpp")
    parser.add_argument("--peer-shortest", type=int, nargs="*", default=[16], help="values of --cache-reuse")
    options = parser.parse_args()
    if options.peer_python and options.gguf is None:
        parser.error("--peer-python needs --gguf")

    llm = LLM(options.model, draft="none", threads=options.threads, max_seqs=4)
    most = options.most or min(9000, llm.max_model_len)
    turns = agent_trace.read(options.trace) if options.trace else agent_trace.trace(agent_trace.standard_library(), options.turns, most, 0)
    blocks = encoded(llm, turns)
    texts = [[token for block in ids for token in block] for ids in blocks]
    whole, longest = sum(map(len, texts)), max(map(len, texts))
    if longest >= llm.max_model_len:
        parser.error(f"a prompt has {longest} tokens: max_model_len = {llm.max_model_len} leaves no room; --most makes it shorter")
    kinds = ", ".join(f"{sum(turn.kind == kind for turn in turns)} {kind}" for kind in KINDS)
    print(f"{options.model}: {len(turns)} turns ({kinds}), up to {longest} tokens")
    print(f"{'':<24}{'computed':>10}{'share':>8}" + "".join(f"{kind:>8}" for kind in KINDS) + f"{'KL':>12}")
    true = exact(llm, texts)
    show("none", turns, Ran([len(ids) for ids in texts], []), whole, true)
    show("prefix", turns, true, whole, true)
    for reuse in options.reuse:
        show(reuse, turns, edited(llm, texts, reuse), whole, true)
    for reuse in options.chunks:
        show(reuse, turns, chunked(llm, turns, blocks, reuse), whole, true)
    for shortest in options.peer_shortest if options.peer_python else ():
        show(f"llama.cpp {shortest}", turns, peer(options.peer_python, options.gguf, texts, shortest), whole, true)
    llm.engine.memory.check()
    return 0 if not llm.engine.memory.used() else 1


if __name__ == "__main__":
    sys.exit(main())
