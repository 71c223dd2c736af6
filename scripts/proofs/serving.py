"""Throughput and latency of `redraft serve`, without and with speculation, beside llama.cpp's servers.

The prompts (the completions of our suite) are the same, greedy, with a fixed number of tokens, streamed, with a fixed number of
requests in flight. Each measurement starts a server and ends it afterwards: no other server runs meanwhile, and no cache and no
drafter has seen the prompts. The servers take turns, and ratios are those of one round. All servers have the same number of threads,
and the client shares the machine with them. LLM.generate runs the same requests as one batch, without HTTP and without a client. After
Ctrl-C the results so far are shown.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from redraft.bench import files, prompts
from redraft.bench.load import drive
from redraft.bench.load.client import Target
from redraft.bench.load.figures import Run, figures
from redraft.bench.load.workload import Load
from redraft.bench.peers.gguf import converted
from redraft.errors import RedraftError
from redraft.models import loader
from redraft.models.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
OFF = "redraft, off"
PATIENCE = 180.0  # seconds until a server is ready
SHOWN = {
    "tokens/s": ("output_throughput",),
    "ttft": ("median_ttft_ms", "p99_ttft_ms"),
    "tpot": ("median_tpot_ms", "p99_tpot_ms"),
    "itl": ("median_itl_ms", "p99_itl_ms"),
    "e2el": ("median_e2el_ms", "p99_e2el_ms"),
}
COMPARED = ("output_throughput", "median_ttft_ms", "median_tpot_ms", "median_e2el_ms")
CONVERT = (
    "import sys; from pathlib import Path; from redraft.bench.peers.gguf import converted;"
    " print(converted(Path(sys.argv[1]), sys.argv[2], tokenizer=True))"
)


@dataclass(frozen=True)
class Side:
    """A server. command: contains {port}; ready: a path that is requested until it answers; extra: fields of the body that other
    servers do not know; ids: the endpoint that returns the ids of a text, the field of the text, and other fields; counts: whether
    streams have usage."""

    name: str
    command: list[str]
    ready: str
    ids: tuple[str, str, dict[str, Any]]
    extra: dict[str, Any] = field(default_factory=dict)
    counts: bool = True


@dataclass(frozen=True)
class Measured:
    """One measurement. figures: those of `redraft bench serve`; texts: by request, None if there is no text to compare."""

    figures: dict[str, Any]
    texts: list[str] | None = None


Found = dict[tuple[int, str], list[Measured]]  # by requests in flight and name: one per round


def sides(options: argparse.Namespace, file: Path | None, longest: int) -> list[Side]:
    own = [sys.executable, "-m", "redraft", "serve", options.model, "--port", "{port}", "--threads", str(options.threads)]
    own += ["--dtype", options.dtype]
    ids = ("/tokenize", "prompt", {})
    found = [
        Side(OFF, [*own, "--draft", "none"], "/ready", ids),
        Side(f"redraft, {options.draft}", [*own, "--draft", options.draft], "/ready", ids),
    ]
    threads = str(options.threads)
    if file is not None and options.peer_python is not None:
        command = [str(options.peer_python), "-m", "llama_cpp.server", "--model", str(file), "--port", "{port}", "--n_ctx", str(longest)]
        command += ["--n_threads", threads, "--n_threads_batch", threads, "--verbose", "False"]
        command += ["--logits_all", "False", "--interrupt_requests", "False"]  # both defaults slow it down
        only = {"repeat_penalty": 1.0, "min_tokens": options.tokens}
        found.append(Side("llama-cpp-python", command, "/v1/models", ("/extras/tokenize", "input", {}), only, counts=False))
    if file is not None and options.llama_server is not None:
        most = max(options.concurrency)
        command = [str(options.llama_server), "-m", str(file), "--port", "{port}", "-np", str(most), "-c", str(most * longest), "-cb"]
        command += ["-t", threads, "-tb", threads, "--no-webui"]
        ids = ("/tokenize", "content", {"add_special": True, "parse_special": True})
        found.append(Side("llama-server", command, "/health", ids))
    return found


@contextlib.contextmanager
def running(side: Side, threads: int) -> Iterator[str]:
    """The address of the running server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [part.replace("{port}", str(port)) for part in side.command],
            stdout=said,
            stderr=said,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )
        try:
            until = time.monotonic() + PATIENCE
            while True:
                with contextlib.suppress(OSError), urllib.request.urlopen(url + side.ready, timeout=5):
                    break
                if process.poll() is not None or time.monotonic() > until:
                    said.seek(0)
                    words = said.read().decode(errors="replace").strip().splitlines()[-5:]
                    raise RedraftError(f"{side.name} does not start: " + " | ".join(words))
                time.sleep(0.1)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def measure(side: Side, url: str, asks: Path, count: int, warmups: int, concurrency: int, tokens: int) -> Run:
    target = Target(url, temperature=0.0, extra=side.extra)
    load = Load(prompts=asks, concurrency=concurrency, count=count, warmups=warmups)
    found = asyncio.run(drive.measure(target, load, lambda _: contextlib.nullcontext(lambda record: None)))
    failures = [record.failure for record in [*found.warmups, *found.run.records] if not record.done]
    if failures:
        raise RedraftError(f"{side.name}: {len(failures)} requests failed, the first: {failures[0]}")
    for record in found.run.records:
        if not side.counts:  # the end of the text was not allowed before all tokens
            record.output_tokens, record.counted = tokens, "max_tokens"
        elif record.output_tokens != tokens:
            raise RedraftError(f"{side.name} wrote {record.output_tokens} tokens, {tokens} were requested")
    return found.run


def differing(side: Side, url: str, texts: list[str], wanted: list[list[int]]) -> list[int]:
    """The prompts that the server reads as other ids."""
    path, name, more = side.ids
    found = []
    for i, (text, ids) in enumerate(zip(texts, wanted, strict=True)):
        body = json.dumps({name: text} | more).encode()
        request = urllib.request.Request(url + path, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as reply:
            if json.load(reply)["tokens"] != ids:
                found.append(i)
    return found


def direct(options: argparse.Namespace) -> int:
    """The child process that runs the batch: throughput and texts."""
    from redraft import LLM, SamplingParams

    texts, others = chosen(options.requests)
    llm = LLM(options.model, draft=options.draft, threads=options.threads, dtype=options.dtype, max_seqs=max(options.concurrency))
    params = SamplingParams(temperature=0, max_tokens=options.tokens, ignore_eos=True)
    llm.generate(others, params)
    begun = time.perf_counter()
    outputs = llm.generate(texts, params)
    took = time.perf_counter() - begun
    written = sum(len(output.outputs[0].token_ids) for output in outputs)
    print(json.dumps({"output_throughput": written / took, "texts": [output.outputs[0].text for output in outputs]}))
    return 0


def batch(options: argparse.Namespace, draft: str) -> Measured:
    command = [sys.executable, __file__, *sys.argv[1:], "--draft", draft, "--direct"]
    ran = subprocess.run(command, cwd=ROOT, env=environment(options.threads), capture_output=True, text=True)
    if ran.returncode:
        raise RedraftError(f"LLM.generate: {ran.stderr.strip().splitlines()[-1:]}")
    found = json.loads(ran.stdout.splitlines()[-1])
    return Measured({"output_throughput": found["output_throughput"]}, found["texts"])


def environment(threads: int) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}


def chosen(requests: int) -> tuple[list[str], list[str]]:
    """(texts to continue, evenly of all kinds; the other texts, for the warm-up)"""
    kinds = list(dict.fromkeys(one.category for one in prompts.load() if one.prompt is not None))
    taken = prompts.load(None, kinds, requests)
    names = {one.id for one in taken}
    others = [one.prompt for one in prompts.load(None, kinds) if one.id not in names]
    if len(taken) < requests or not others:
        raise RedraftError(f"--requests {requests}: the suite has {len(taken) + len(others)} texts to continue, one of them for warming up")
    return [one.prompt or "" for one in taken], [text or "" for text in others][:8]


def gguf(options: argparse.Namespace) -> Path:
    """The file for llama.cpp, written by the interpreter that has the package."""
    folder = Path(loader.resolve(options.model)).resolve()
    if options.peer_python is None:
        return converted(folder, options.dtype, tokenizer=True)
    command = [str(options.peer_python), "-c", CONVERT, str(folder), options.dtype]
    ran = subprocess.run(command, cwd=ROOT, env=environment(options.threads), capture_output=True, text=True)
    if ran.returncode:
        raise RedraftError(ran.stderr.strip().splitlines()[-1].partition(": ")[2])
    return Path(ran.stdout.splitlines()[-1])


# ---- what was found


def ratios(found: Found, at: int, name: str, figure: str, base: str = OFF) -> list[float]:
    """Ratios to `base` in each round; empty if one of them has no such figure."""
    both = zip(found.get((at, name), ()), found.get((at, base), ()), strict=False)
    return [one.figures[figure] / other.figures[figure] for one, other in both if one.figures.get(figure) and other.figures.get(figure)]


def spread(values: list[float]) -> str:
    """The median and, of several values, the range."""
    if not values:
        return ""
    ends = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
    return f"{statistics.median(values):.2f}{ends}"


def tables(found: Found) -> Iterator[str]:
    """Markdown tables: medians over the rounds, then ratios."""
    yield "| in flight | server | tokens/s | TTFT, ms | TPOT, ms | ITL, ms | E2EL, ms |"
    yield "|---|---|---|---|---|---|---|"
    for (at, name), rounds in found.items():
        cells = []
        for figures_ in SHOWN.values():
            there = [[one.figures[figure] for one in rounds if one.figures.get(figure) is not None] for figure in figures_]
            cells.append(" / ".join(f"{statistics.median(values):.1f}" for values in there if values))
        yield f"| {at} | {name} | {' | '.join(cells)} |"
    yield ""
    yield f"| in flight | to {OFF} | tokens/s | TTFT | TPOT | E2EL |"
    yield "|---|---|---|---|---|---|"
    for at, name in found:
        if name != OFF:
            yield f"| {at} | {name} | {' | '.join(spread(ratios(found, at, name, figure)) for figure in COMPARED)} |"


def texts_equal(found: Found, name: str) -> tuple[int, int]:
    """(number of texts equal to the first of `redraft, off`, number of compared texts)"""
    base = next(rounds[0].texts for (_, of), rounds in found.items() if of == OFF)
    pairs = [
        (text, right)
        for (_, of), rounds in found.items()
        if of == name
        for one in rounds
        for text, right in zip(one.texts or (), base or (), strict=True)
    ]
    return sum(text == right for text, right in pairs), len(pairs)


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/prove serving", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("model", nargs="?", default="embedded")
    parser.add_argument("--peer-python", type=Path, help="interpreter with llama-cpp-python[server], gguf and what Redraft imports")
    parser.add_argument("--llama-server", type=Path, help="llama.cpp's own server")
    parser.add_argument("--draft", default="token-recycling", help="the drafter of the server with speculation")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=2, help="threads of each server")
    parser.add_argument("--concurrency", type=lambda text: [int(part) for part in text.split(",")], default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=32, help="requests per measurement")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens per request")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--direct", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    return direct(options) if options.direct else compare(options)


def compare(options: argparse.Namespace) -> int:
    if options.json is not None:
        files.check_writable(options.json)
    texts, others = chosen(options.requests)
    tokenizer = Tokenizer(Path(loader.resolve(options.model)))
    ids = [tokenizer.encode(text) for text in texts]
    longest = max(len(tokenizer.encode(text)) for text in texts + others) + options.tokens + 8
    file = None
    if options.peer_python is not None or options.llama_server is not None:
        try:
            file = gguf(options)
        except RedraftError as error:
            print(f"without llama.cpp: {error}", file=sys.stderr)
    every = sides(options, file, longest)
    most, found = max(options.concurrency), dict[tuple[int, str], list[Measured]]()
    checked: set[str] = set()  # servers with compared ids
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(KeyboardInterrupt):  # the results so far are shown
        asks = Path(folder) / "asks.jsonl"
        asks.write_text("".join(json.dumps({"prompt": text, "max_tokens": options.tokens}) + "\n" for text in [*texts, *others]))
        for number in range(options.rounds):

            def add(at: int, name: str, one: Measured, number: int = number) -> None:
                found.setdefault((at, name), []).append(one)
                speed = one.figures["output_throughput"]
                print(f"round {number + 1} of {options.rounds}, {at} in flight, {name}: {speed:.1f} tokens/s", file=sys.stderr, flush=True)

            for at in options.concurrency:
                for side in every:
                    with running(side, options.threads) as url:
                        if side.name not in checked and (wrong := differing(side, url, texts, ids)):
                            raise RedraftError(f"{side.name} reads {len(wrong)} of {len(texts)} prompts as other ids: {texts[wrong[0]]!r}")
                        checked.add(side.name)
                        run = measure(side, url, asks, len(texts), len(others), at, options.tokens)
                    add(at, side.name, Measured(figures(run, {}), [record.text for record in run.records]))
            for name, draft in (("off", "none"), (options.draft, options.draft)):
                add(most, f"LLM.generate, {name}", batch(options, draft))
    if not found:
        return 130
    return show(options, every, found, sum(map(len, ids)))


def show(options: argparse.Namespace, every: list[Side], found: Found, read: int) -> int:
    print(
        f"{options.model}, {options.dtype}: {options.requests} prompts of {read} tokens in all, {options.tokens} tokens each, greedy;"
        f" {options.threads} threads, {os.cpu_count()} cores ({platform.machine()}); medians of {options.rounds} rounds."
    )
    print("Latencies: median / 99th percentile of the requests of a round. All servers read the prompts as the same ids.")
    if any(side.name == "llama-cpp-python" for side in every):
        print("llama-cpp-python's server serves one request at a time: the others wait at a lock, which its times to first token show.")
    print()
    print(*tables(found), sep="\n")
    print()
    wrong = 0
    for name in dict.fromkeys(name for _, name in found):
        equal, compared = texts_equal(found, name)
        print(f"{name}: {equal} of {compared} texts equal those of {OFF}")
        wrong += compared - equal if "llama" not in name.split(",")[0] else 0
    most = max(options.concurrency)
    for name in ("off", options.draft):
        cost = [1 - value for value in ratios(found, most, f"redraft, {name}", "output_throughput", f"LLM.generate, {name}")]
        print(f"HTTP, {most} in flight, {name}: {statistics.median(cost):.1%} of the throughput of LLM.generate")
    if options.json is not None:
        commands = {side.name: side.command for side in every}
        rounds = [{"in_flight": at, "server": name, "rounds": [one.figures for one in some]} for (at, name), some in found.items()]
        files.write(options.json, {"options": {k: str(v) for k, v in vars(options).items()}, "commands": commands, "measured": rounds})
    return 1 if wrong else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except RedraftError as error:
        sys.exit(f"error: {error}")
