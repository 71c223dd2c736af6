"""The same load on several deployments of one model: latencies, reuse and hand-over, in interleaved rounds.

    scripts/prove deployments smollm2.gguf --of "--replicas 2" --of "--instances prefill=1,decode=1" --rate 2
    scripts/prove deployments smollm2.gguf --of "--router round-robin" --of "--router prefix-affinity" --both "--replicas 2" --mooncake FILE

Each round starts every deployment in turn as `redraft serve` with the given options, sends the load, and stops it. The first deployment is
the reference: medians over the rounds are printed with their range, and as ratios to the reference.

--mooncake: a trace of block hashes, whose requests become prompts that share text as the trace's do. A block of 512 tokens becomes
`--block` words, so that prompts fit a small context.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import json
import random
import shlex
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any
from urllib.request import urlopen

ROOT = Path(__file__).resolve().parent.parent.parent
SHOWN = {
    "median_ttft_ms": "TTFT ms, median",
    "p99_ttft_ms": "TTFT ms, P99",
    "median_itl_ms": "gap ms, median",
    "p99_itl_ms": "gap ms, P99",
    "p99_second_ms": "second token after ms, P99",
    "output_throughput": "tokens/s",
    "cached": "prompt tokens cached, share",
    "copied": "tokens copied",
    "found": "tokens found, not copied",
    "lost": "texts computed again",
}


@contextmanager
def served(options: list[str]) -> Iterator[str]:
    """The address of a server with these options."""
    command = [sys.executable, "-m", "redraft", "serve", *options, "--port", "0", "--no-access-log", "--max-queue", "100000"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stderr is not None
        said = []
        try:
            for line in iter(process.stderr.readline, ""):
                said.append(line)
                if "Uvicorn running on " in line:
                    yield line.partition("Uvicorn running on ")[2].split()[0]
                    break
            else:
                sys.exit("the server did not start:\n" + "".join(said))
        finally:
            process.terminate()
            process.communicate()


def counted(url: str) -> dict[str, float]:
    """The sums over workers of the server's counters."""
    found: dict[str, float] = defaultdict(float)
    with urlopen(f"{url}/metrics") as reply:
        for line in reply.read().decode().splitlines():
            if not line.startswith("#"):
                name, _, rest = line.partition("{")
                found[name.removeprefix("redraft:")] += float(rest.rpartition(" ")[2])
    return found


def mooncake(path: Path, count: int, block: int, longest: int, output: int, folder: Path) -> Path:
    """A file of prompts with the trace's sharing."""

    def words(block_id: int, n: int) -> str:
        dice = random.Random(block_id)
        return " ".join("".join(dice.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(3)) for _ in range(n))

    target = folder / "prompts.jsonl"
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines, target.open("w", encoding="utf-8") as out:
        for line in islice(lines, count):
            hashes = json.loads(line)["hash_ids"][: longest // block]
            out.write(json.dumps({"prompt": "\n".join(words(one, block) for one in hashes), "max_tokens": output}) + "\n")
    return target


def run(url: str, load: Any) -> dict[str, float]:
    from redraft.bench.load.client import Target
    from redraft.bench.load.drive import measure
    from redraft.bench.load.figures import figures

    found = asyncio.run(measure(Target(url, temperature=0.0), load, lambda _: nullcontext(lambda record: None)))
    if failed := [record.failure for record in found.run.records if record.failure is not None]:
        sys.exit(f"{len(failed)} requests failed, such as {failed[0]}")
    made: dict[str, float] = figures(found.run, {})
    second = sorted(1000 * record.itl[0] for record in found.run.done if record.itl)
    now = counted(url)
    return made | {
        "p99_second_ms": second[int(0.99 * (len(second) - 1))] if second else 0.0,
        "cached": now["prefix_cache_hits_total"] / max(1.0, now["prefix_cache_queries_total"]),
        "copied": now["handover_copied_tokens_total"],
        "found": now["handover_found_tokens_total"],
        "lost": now["handover_lost_texts_total"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog=sys.argv[0], description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--of", action="append", required=True, help="options of a deployment, repeated for more")
    parser.add_argument("--both", default="", help="options of all deployments")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--rate", type=float, default=2.0, help="requests a second, Poisson")
    parser.add_argument("--input", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("--output", type=int, default=64, help="tokens of a text")
    parser.add_argument("--trace", type=Path, help="a CSV file with arrivals and lengths")
    parser.add_argument("--scale", type=float, default=1.0, help="how many times faster the trace is played")
    parser.add_argument("--mooncake", type=Path)
    parser.add_argument("--block", type=int, default=16)
    parser.add_argument("--longest", type=int, default=512, help="words of a prompt of --mooncake, at most")
    options = parser.parse_args()

    from redraft.bench.load.workload import Load

    results: dict[str, list[dict[str, float]]] = {of: [] for of in options.of}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(options.rounds):
            if options.mooncake is not None:
                prompts = mooncake(options.mooncake, options.requests, options.block, options.longest, options.output, Path(folder))
                load = Load(rate=options.rate, prompts=prompts, output_len=options.output, seed=turn)
            elif options.trace is not None:
                load = Load(trace=options.trace, scale=options.scale, count=options.requests, seed=turn)
            else:
                load = Load(rate=options.rate, count=options.requests, input_len=options.input, output_len=options.output, seed=turn)
            for of in options.of if turn % 2 == 0 else options.of[::-1]:
                with served([options.model, *shlex.split(options.both), *shlex.split(of)]) as url:
                    results[of].append(run(url, load))
    reference = {name: median(one[name] for one in results[options.of[0]]) for name in SHOWN}
    for of in options.of:
        print(f"{of} {options.both}: {options.rounds} rounds of {options.requests} requests")
        for name, title in SHOWN.items():
            values = [one[name] for one in results[of]]
            ratio = f"  {median(values) / reference[name]:5.2f}" if of != options.of[0] and reference[name] else ""
            print(f"  {title:28} {median(values):9.2f}  ({min(values):.2f} to {max(values):.2f}){ratio}")


if __name__ == "__main__":
    main()
