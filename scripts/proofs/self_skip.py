"""Acceptance and speed of `self-skip` over the number of layers that it leaves out, from none to all but two.

`redraft compare` with one entry for each number: the plain loop and all entries on the suite's prompts, in one process, with
interleaved rounds. Accepted: of `length` drafted tokens a step; a text's last steps draft fewer, so it is a little more.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from redraft import LLM, SamplingParams
from redraft.bench import compare, report, results
from redraft.bench import prompts as suite
from redraft.draft.self_skip import SelfSkip

PILOT = Path(__file__).resolve().parent.parent.parent.parent / "shared" / "models" / "pilot-16m"


def main() -> None:
    parser = argparse.ArgumentParser(prog="prove self_skip", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(PILOT) if PILOT.exists() else "embedded", help="pilot-16m where it is, else embedded")
    parser.add_argument("--length", type=int, default=4, help="tokens drafted a step")
    parser.add_argument("--temperature", type=float, action="append", help="0 and 1 unless given")
    parser.add_argument("--skip", type=int, action="append", help="layers left out; all numbers that are possible unless given")
    parser.add_argument("--limit", type=int, default=None, help="at most so many prompts, evenly from all categories")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens a prompt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    given = parser.parse_args()
    console, progress = Console(width=None if sys.stdout.isatty() else 140), Console(stderr=True)
    llm = LLM(given.model, dtype=given.dtype, draft=compare.BASELINE, prefix_sharing=False, max_seqs=max(64, given.batch))
    count = len(llm.runner.spec.layers)
    skips = given.skip or range(count - 1)
    drafts = tuple(f"self-skip:skip={skip},length={given.length}" for skip in skips)
    prompts = suite.load(None, None, given.limit)
    for temperature in given.temperature or [0.0, 1.0]:
        params = SamplingParams(temperature=temperature, max_tokens=given.tokens, seed=0)
        options = compare.Options(drafts, params, given.rounds, given.batch)
        with report.bar(progress, compare.ticks(len(prompts), options)) as tick:
            comparison = compare.compare(llm, options, prompts, tick)
        rows = [row for row in results.rows(comparison) if row.category is None]
        report.show(console, comparison, options, rows)
        table = Table(box=None, title=f"layers of {count}, temperature {temperature:g}")
        for heading in ("left out", "accepted", "tokens a step", "speed-up"):
            table.add_column(heading, justify="right")
        table.add_column("layers that draft")
        for skip, row in zip(skips, rows[1:], strict=True):
            kept = sorted(SelfSkip(skip=skip).layers(count))
            length = row.mean_acceptance_length
            speed = "-" if row.speedup is None else f"{row.speedup:.2f} ({row.speedup_low:.2f} to {row.speedup_high:.2f})"
            table.add_row(f"{skip}", f"{(length - 1) / given.length:.0%}", f"{length:.2f}", speed, " ".join(map(str, kept)))
        console.print(table)
        console.print()


if __name__ == "__main__":
    main()
