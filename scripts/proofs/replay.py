"""What drafts are worth on a file of prompts, and where the rest is lost: in
drafts, estimates, kernels or Python.

The drafter runs in the engine over each prompt, greedily. Its texts are those
of the plain loop, so only the sizes of its steps matter, and any table of step
times says what they would have taken. For each table the drafter believes that
table exactly. Speeds are of generation alone, after the first token, over the
plain loop with the same table.

- perfect: the best number of nodes of each step in hindsight, from the nodes
  that are drafted where rows cost nothing. What separates it from the next
  column is lost by estimates; what it lacks itself, by drafts.
- given: with the times of --times. What separates it from the next column is
  lost by kernels.
- kernels: with this machine's times, drafting free.
- python: the same, and the time that drafting and learning took.
- learned: the same times, but the drafts are those of the drafter's own cost
  model, which every step corrects.
- clock: these drafts by the clock, the plain loop and the drafter in turns.

Example: scripts/prove replay MODEL --prompts FILE --turns 1 --limit 36
--times 1:6.8,4:7.6,8:8.4,16:12.9,32:23.8
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from redraft import LLM, SamplingParams
from redraft.bench import prompts
from redraft.bench.compare import Dialogue
from redraft.core.cost import KNOTS, CostModel

Times = dict[int, float]


class Believed(CostModel):
    """A table that no step corrects."""

    def observe(self, rows: int, cached: int, texts: int, seconds: float) -> None:
        pass


@dataclass
class Text:
    """rows, cached, kept: of each step after the first token: rows of the model, cached tokens, accepted drafted tokens."""

    tokens: list[int]
    seconds: float
    planning: float
    rows: list[int] = field(default_factory=list)
    cached: list[int] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)

    def took(self, cost: CostModel, planning: float = 0.0) -> float:
        """Seconds by a table."""
        return math.fsum(cost.seconds(rows, cached) or 0.0 for rows, cached in zip(self.rows, self.cached, strict=True)) + planning

    def plain(self, cost: CostModel) -> float:
        first = self.cached[0] if self.cached else 0
        return math.fsum(cost.seconds(1, first + i) or 0.0 for i in range(len(self.tokens) - 1))

    def perfect(self, cost: CostModel) -> float:
        """Only the kept nodes are drafted, as many of them as pay."""
        spent = 0.0
        for kept, cached in zip(self.kept, self.cached, strict=True):
            one = cost.seconds(1, cached) or 0.0
            spent += min((cost.seconds(1 + k, cached) or 0.0) + (kept - k) * one for k in range(kept + 1))
        return spent


class Watch:
    """Sizes of the steps of an engine with one text, and the time of its planner."""

    def __init__(self, llm: LLM) -> None:
        self.llm, self.planner = llm, llm.engine.drafter.own.drafter
        self.rows: list[tuple[int, int]] = []
        forward = llm.runner.forward

        def watched(batch: Any, *taps: Any) -> Any:
            self.rows.append((len(batch.tokens), int(batch.positions[0])))
            return forward(batch, *taps)

        llm.runner.forward = watched  # type: ignore[method-assign]

    @contextmanager
    def believing(self, cost: CostModel) -> Iterator[None]:
        """The planner's next drafts follow this cost model."""
        own, self.planner.cost = self.planner.cost, cost
        try:
            yield
        finally:
            self.planner.cost = own

    def text(self, ids: list[int], tokens: int) -> Text:
        self.rows, stamps, found, spent, counts = [], [], [], [], []
        for delta in self.llm.stream({"prompt_token_ids": ids}, SamplingParams(temperature=0, max_tokens=tokens)):
            if delta.token_ids:
                stamps.append(perf_counter())
                found += delta.token_ids
                counts.append(len(delta.token_ids))
                spent.append(getattr(self.planner, "_spent", 0.0) + getattr(self.planner, "_observed", 0.0))
        steps = self.rows[-(len(counts) - 1) :] if len(counts) > 1 else []
        rows, cached = [n for n, _ in steps], [at for _, at in steps]
        return Text(found, stamps[-1] - stamps[0], sum(spent[1:]), rows, cached, [n - 1 for n in counts[1:]])


def table(times: Times, like: CostModel) -> Believed:
    """Milliseconds of steps by rows as a cost model, between them on a line, attention as in the model `like`."""
    known = sorted(times)
    slope = (times[known[-1]] - times[known[-2]]) / (known[-1] - known[-2])
    shape = [float(np.interp(k, known, [times[n] for n in known])) + max(0, k - known[-1]) * slope for k in KNOTS]
    made = Believed(shape, like.sizes)
    made.unit = times[known[0]] / 1000
    made.token, made.cell = like.token, like.cell
    return made


def calibrated(llm: LLM) -> CostModel:
    llm.generate("Once", SamplingParams(max_tokens=4))
    llm.calibrate()
    cost: CostModel = llm.engine.drafter.own.drafter.cost
    return cost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--prompts", type=Path, help="else the suite of the package")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--turns", type=int)
    parser.add_argument("--chat", action="store_true")
    parser.add_argument("--warm", type=int, default=0, help="learn from so many further prompts first")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--draft", default="auto")
    parser.add_argument("--quant")
    parser.add_argument("--times", help="rows:milliseconds, joined by commas")
    given = parser.parse_args()

    llm = LLM(given.model, draft=given.draft, max_seqs=1, prefix_sharing=False, **({"quant": given.quant} if given.quant else {}))
    plain = llm.sibling(draft="none")
    measured = calibrated(llm)
    print(f"one row {1000 * (measured.seconds(1) or 0):.2f} ms")
    before = ", ".join(f"{n} {(measured.seconds(n) or 0) / (measured.seconds(1) or 1):.2f}" for n in (2, 4, 8, 16, 32))
    print(f"calibrated, rows over one row: {before}")
    own = table({n: 1000 * (measured.seconds(n) or 0) for n in KNOTS}, measured)
    wanted = (
        table({int(n): float(ms) for n, _, ms in (one.partition(":") for one in given.times.split(","))}, measured) if given.times else own
    )
    one = 1000 * (measured.seconds(1) or 0)
    nothing = table({1: one, KNOTS[-1]: one * (1 + 1e-6)}, measured)
    watch, turns = Watch(llm), Watch(plain)

    chosen = prompts.load(given.prompts, limit=given.limit, turns=given.turns, chat=given.chat)
    if given.warm:
        for prompt in prompts.load(given.prompts, limit=given.warm, turns=given.turns, chat=given.chat, without=chosen):
            watch.text(Dialogue(prompt, llm.tokenizer).ids(), given.max_tokens)
    learned = llm.engine.drafter.snapshot()
    rows: dict[str, list[list[float]]] = defaultdict(list)
    for prompt in chosen:
        ids = Dialogue(prompt, llm.tokenizer).ids()
        base = turns.text(ids, given.max_tokens)
        texts = []
        for cost in (measured, nothing, wanted, own):
            llm.engine.drafter.restore(learned)
            with watch.believing(cost):
                texts.append(watch.text(ids, given.max_tokens))
        clock, free, aimed, ours = texts
        assert all(text.tokens == base.tokens for text in texts), f"{prompt.id}: another text"
        if len(base.tokens) < 2:
            continue
        times = [
            (aimed.plain(wanted), free.perfect(wanted)),
            (aimed.plain(wanted), aimed.took(wanted)),
            (ours.plain(own), ours.took(own)),
            (ours.plain(own), ours.took(own, ours.planning)),
            (clock.plain(own), clock.took(own, clock.planning)),
            (base.seconds, clock.seconds),
        ]
        steps = [len(free.rows), len(aimed.rows), len(clock.rows)]
        rows[prompt.category].append([*(x for pair in times for x in pair), len(base.tokens) - 1, *steps, sum(clock.rows), clock.planning])
    llm.engine.drafter.restore(learned)

    after = ", ".join(f"{n} {(measured.seconds(n) or 0) / (measured.seconds(1) or 1):.2f}" for n in (2, 4, 8, 16, 32))
    print(f"learned, rows over one row: {after}")
    print(f"\n{'':<14}{'perfect':>8}{'given':>8}{'kernels':>8}{'python':>8}{'learned':>8}{'clock':>8}  tokens a step")
    pooled = [one for own in rows.values() for one in own]
    for name, found in [*(rows.items() if len(rows) > 1 else ()), ("all", pooled)]:
        sums = np.array(found).sum(0)
        ratios = [sums[2 * i] / sums[2 * i + 1] for i in range(6)]
        kept = [sums[12] / sums[13 + i] for i in range(3)]
        print(f"{name[:13]:<14}" + "".join(f"{x:>8.2f}" for x in ratios) + "  " + " ".join(f"{x:.2f}" for x in kept))
    print("\nspeed over the plain loop; --help explains the columns")
    print("tokens a step: with free rows, with the given times, by the clock")
    print(f"{sums[16] / sums[15]:.2f} rows a step; planning and learning {1000 * sums[17] / sums[15]:.3f} ms a step")


if __name__ == "__main__":
    main()
