"""Accepted tokens per step of drawn trees with an equal number of nodes: chain, i.i.d., RSD-C, RSD-S, DySpec and others.

Each way of drawing is measured in a few shapes, and all are printed. The best shape counts. A tree is verified by the rule that was
made for it and by `coupled`, at temperature 1, on a pair of a target and a draft model. The prompts are those of the suite. Intervals
are bootstraps over prompts (95 %). Two ways are compared by paired differences over the same prompts: one is better if the interval of
the difference excludes zero.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from redraft import LLM, SamplingParams
from redraft.bench import prompts as suite
from redraft.bench.compare import Dialogue
from redraft.core.noise import sample_seed

SHARED = Path(__file__).resolve().parent.parent.parent.parent / "shared" / "models"
PAIRS = {
    "pilot": (str(SHARED / "pilot-16m"), str(SHARED / "pilot-1m")),
    "embedded": ("embedded", "embedded-draft"),
}
SHAPES = {
    6: {
        "chain": ["draft-model:length=6"],
        "i.i.d.": ["spectr:drafts=2,length=3", "spectr:drafts=3,length=2"],
        "top + one": ["optimal-multi-draft:children=2,depth=2"],
        "RSD-C": ["rsd-c:branching=2x2", "rsd-c:branching=2x1x1", "rsd-c:branching=3x1"],
        "RSD-S": ["rsd-s:width=2,depth=3", "rsd-s:width=3,depth=2"],
        "DySpec": ["dyspec"],
    },
    14: {
        "chain": ["draft-model:length=14"],
        "i.i.d.": ["spectr:drafts=4,length=3", "spectr:drafts=7,length=2", "spectr:drafts=2,length=7"],
        "top + one": ["optimal-multi-draft:children=2,depth=3", "optimal-multi-draft:children=3,depth=2"],
        "RSD-C": ["rsd-c:branching=2x2x2", "rsd-c:branching=3x2x1", "rsd-c:branching=4x1x1"],
        "RSD-S": ["rsd-s:width=4,depth=3", "rsd-s:width=7,depth=2", "rsd-s:width=3,depth=4"],
        "DySpec": ["dyspec"],
    },
}
RULES = {
    "chain": ["rejection"],
    "i.i.d.": ["multi-candidate", "k-seq"],
    "top + one": ["greedy-multi-draft"],
    "RSD-C": ["recursive"],
    "RSD-S": ["recursive"],
    "DySpec": ["recursive"],
}
ORDER = ["chain", "i.i.d.", "RSD-C", "RSD-S"]  # as the RSD paper ranks them; the DySpec paper claims to beat all fixed trees


@dataclass(frozen=True)
class Cell:
    """Accepted tokens and steps of each prompt, for one way of drawing, one shape and one rule."""

    way: str
    shape: str
    rule: str
    accepted: np.ndarray
    steps: np.ndarray
    drafted: float
    seconds: float

    @property
    def mean(self) -> float:
        return float(self.accepted.sum() / self.steps.sum())


def measure(llm: LLM, way: str, shape: str, rule: str, budget: int, chosen: Seq[list[int]], params: Seq[SamplingParams]) -> Cell:
    sibling = llm.sibling(draft=shape, verify=rule, draft_rows=budget, draft_total=budget * 64)
    start = time.perf_counter()
    outputs = sibling.generate([{"prompt_token_ids": ids} for ids in chosen], params)
    stats = [[one.stats for one in output.outputs] for output in outputs]
    faults = {one.fault for many in stats for one in many if one.fault}
    if faults:
        raise SystemExit(f"{shape} under {rule}: {faults}")
    accepted, steps = (np.array([sum(getattr(one, name) for one in many) for many in stats], float) for name in ("accepted", "steps"))
    drafted = sum(one.drafted for many in stats for one in many) / steps.sum()
    return Cell(way, shape, rule, accepted, steps, drafted, time.perf_counter() - start)


def resampled(cells: Seq[Cell], rng: np.random.Generator, draws: int = 2000) -> list[np.ndarray]:
    """Accepted tokens per step of each cell, over the same resampled prompts."""
    n = len(cells[0].steps)
    chosen = rng.integers(0, n, (draws, n))
    return [cell.accepted[chosen].sum(1) / cell.steps[chosen].sum(1) for cell in cells]


def interval(values: np.ndarray) -> str:
    low, high = np.percentile(values, [2.5, 97.5])
    return f"{low:.3f} to {high:.3f}"


def judge(better: Cell, worse: Cell, rng: np.random.Generator) -> str:
    one, other = resampled([better, worse], rng)
    low, high = np.percentile(one - other, [2.5, 97.5])
    word = "confirmed" if low > 0 else "refuted" if high < 0 else "undecided"
    gain = better.mean - worse.mean
    return f"{better.way} ({better.rule}) above {worse.way} ({worse.rule}): {word}, {gain:+.3f} ({low:+.3f} to {high:+.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(prog="prove acceptance", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", choices=PAIRS, action="append", help="all unless given")
    parser.add_argument("--budget", type=int, choices=SHAPES, action="append", help="nodes per step; all unless given")
    parser.add_argument("--limit", type=int, default=None, help="the largest number of prompts, evenly from all categories")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens per prompt")
    parser.add_argument("--seeds", type=int, default=1, help="texts of each prompt")
    parser.add_argument("--shapes", nargs="+", default=None, help="only shapes that begin like one of these, such as rsd-s:width=4")
    parser.add_argument("--coins", action="store_true", help="only the rules that reject at random, not coupled")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 140)
    for name in options.pair or PAIRS:
        target, draft = PAIRS[name]
        if name != "embedded" and not Path(target).exists():
            console.print(f"{name}: {target} is not here and is left out")
            continue
        llm = LLM(target, draft_model=draft, dtype=options.dtype, draft="none", max_seqs=64, token_budget=4096)
        prompts = suite.load(None, None, options.limit)
        ids = [Dialogue(one, llm.tokenizer).ids() for one in prompts]
        room = min(llm.max_model_len, 1024) - options.tokens
        chosen = [one for one in ids if len(one) < room]
        common = SamplingParams(temperature=options.temperature, top_k=0, top_p=1.0, max_tokens=options.tokens, n=options.seeds)
        params = [common.but(seed=sample_seed(0, i)) for i in range(len(chosen))]
        for budget in options.budget or SHAPES:
            report(console, llm, name, budget, jobs(budget, options.shapes, options.coins), chosen, params, options.temperature)


def jobs(budget: int, wanted: Seq[str] | None, coins: bool) -> list[tuple[str, str, str]]:
    """(way, shape, rule) of everything that is measured."""
    found = [(way, shape) for way, shapes in SHAPES[budget].items() for shape in shapes]
    chosen = [(way, shape) for way, shape in found if wanted is None or shape.startswith(tuple(wanted))]
    return [(way, shape, rule) for way, shape in chosen for rule in [*RULES[way], *([] if coins else ["coupled"])]]


def report(
    console: Console,
    llm: LLM,
    name: str,
    budget: int,
    wanted: Seq[tuple[str, str, str]],
    chosen: Seq[list[int]],
    params: Seq[SamplingParams],
    temperature: float,
) -> None:
    rng = np.random.default_rng(0)
    cells = []
    for i, (way, shape, rule) in enumerate(wanted):
        print(f"\r{name} {budget} nodes: {i + 1}/{len(wanted)} {shape} {rule}\033[K", end="", file=sys.stderr, flush=True)
        cells.append(measure(llm, way, shape, rule, budget, chosen, params))
    print("\r\033[K", end="", file=sys.stderr)
    table = Table(title=f"{name}: accepted tokens per step, {budget} nodes, temperature {temperature:g}, {len(chosen)} prompts", box=None)
    for heading in ("way", "shape", "rule", "accepted/step", "95 %", "nodes/step", "steps", "s"):
        table.add_column(heading, justify="left" if heading in ("way", "shape", "rule") else "right")
    best: dict[tuple[str, bool], Cell] = {}
    for cell in cells:
        key = cell.way, cell.rule == "coupled"
        if key not in best or cell.mean > best[key].mean:
            best[key] = cell
        (spread,) = resampled([cell], rng)
        table.add_row(
            cell.way, cell.shape, cell.rule, f"{cell.mean:.3f}", interval(spread), f"{cell.drafted:.1f}", f"{cell.steps.sum():.0f}",
            f"{cell.seconds:.1f}",
        )  # fmt: skip
    console.print(table)
    console.print("the best shapes, by the rules that reject at random:")
    orders = [*((better, worse) for worse, better in pairwise(ORDER)), *(("DySpec", way) for way in ORDER), ("top + one", "RSD-C")]
    for better, worse in orders:
        if (better, False) in best and (worse, False) in best:
            console.print(" ", judge(best[better, False], best[worse, False], rng))
    console.print("the best shapes, each rule against coupled:")
    for way in SHAPES[budget]:
        if (way, True) in best:
            console.print(" ", judge(best[way, False], best[way, True], rng))
    console.print()


if __name__ == "__main__":
    main()
